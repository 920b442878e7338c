"""Users' videos: the right picture at the right time, in chunks and in clips of files given as they are."""

from fractions import Fraction
from pathlib import Path

import av
import field_videos as fv
import make_videos as mv
import numpy as np
import pytest
from field_videos import Style

from avion_dali.data.chunking import ChunkSettings, VideoReport, chunk_video
from avion_dali.data.probe import ChunkFacts, probe_chunk
from avion_dali.data.timing import complete_times

MPEG2 = Style("mpeg2video", options={"qscale": "2", "bf": "2"})
HEVC = Style("libx265", options={"x265-params": "log-level=none:keyint=12:bframes=3"})
RADL = Style("libx265", options={"x265-params": "log-level=none:keyint=12:min-keyint=12:radl=2:open-gop=0"})
REFRESH = Style(options=mv.X264_FAST | {"x264-params": "intra-refresh=1:keyint=15:bframes=0"})
OPEN = Style(options=mv.X264_FAST | {"x264-params": "open-gop=1:bframes=3:keyint=15"})
VP9 = Style("libvpx-vp9", options=mv.VP9_FAST | {"g": "10"})
MPEG4 = Style("mpeg4", options={"qscale": "2"})
MJPEG = Style("mjpeg", pix_fmt="yuvj420p", options={"qscale": "3"})


def cut(video: Path, *, seconds: int = 1, **settings: int) -> tuple[VideoReport, Path]:
    folder = video.parent / "chunks" / video.name
    wanted = ChunkSettings("compat", chunk_seconds=seconds, short_side=96, **settings)
    return chunk_video(video, folder, wanted), folder


def assert_follows_player(video: Path, *, seconds: int = 1) -> VideoReport:
    """Chunks show what a player shows, and no chunk is missing."""
    report, folder = cut(video, seconds=seconds)
    assert report.failed == ""
    assert fv.misplaced(video, folder) == []
    starts = list(fv.chunk_pictures(folder))
    assert starts == list(range(0, len(starts) * seconds, seconds))
    assert starts[-1] < probe_chunk(video).end_s() <= starts[-1] + seconds + 0.1
    return report


def assert_clips_follow_player(video: Path) -> ChunkFacts:
    """All decoders show what a player shows, when the file is used as it is."""
    facts, shown = probe_chunk(video, index=True), fv.timeline(video)
    chunk = fv.chunk_of(facts)
    seconds = [float(second) for second in np.linspace(1e-4, shown[-1][0], 6)]
    slack = 2e-3 if facts.clock_times() is not None else 0.5 / float(facts.fps) + 2e-3
    for decoder in fv.DECODERS:
        for second, number in zip(seconds, fv.clip_numbers(chunk, seconds, decoder), strict=True):
            assert number in fv.on_show(shown, second, slack=slack), (decoder, second)
    assert fv.disagreements(video) == []
    return facts


# --- streams that begin inside a group of pictures


@pytest.mark.parametrize(
    ("style", "ending", "skip"),
    [
        (Style(), "mkv", 4),
        (Style(), "ts", 7),
        (OPEN, "mkv", 4),
        (REFRESH, "mkv", 7),
        (REFRESH, "ts", 4),
        (MPEG2, "ts", 4),
        (MPEG2, "mkv", 7),
        (HEVC, "mkv", 7),
        (HEVC, "ts", 4),
        (MJPEG, "mkv", 5),
    ],
)
def test_streams_that_begin_inside_a_group(tmp_path: Path, style: Style, ending: str, skip: int) -> None:
    whole = fv.write(tmp_path / f"whole.{ending}", style, count=50)
    video = fv.cut_packets(whole, tmp_path / f"v.{ending}", skip=skip)
    assert_follows_player(video)
    assert_clips_follow_player(video)


@pytest.mark.parametrize(("style", "ending"), [(RADL, "mkv"), (VP9, "webm"), (Style("ffv1"), "mkv")])
def test_packets_ahead_of_the_first_keyframe_are_no_damage(tmp_path: Path, style: Style, ending: str) -> None:
    whole = fv.write(tmp_path / f"whole.{ending}", style, count=50)
    video = fv.cut_packets(whole, tmp_path / f"v.{ending}", skip=4)
    facts = probe_chunk(video)
    assert facts.is_counted
    assert facts.start_s > 0
    ref = fv.chunk_of(facts).ref
    ids = [0, 7, facts.num_frames - 1]
    expected = fv.frame_numbers(ref, ids, "reference")
    assert expected[-1] == 49
    assert all(fv.frame_numbers(ref, ids, decoder) == expected for decoder in fv.DECODERS)
    report, folder = cut(video)
    assert report.failed == ""
    (_, first), (_, last) = fv.chunk_pictures(folder).values()
    begins = round(facts.start_s * 30)
    assert first[begins] == first[0] == expected[0], "the first picture stands in until it begins"
    assert last[-1] == 49


@pytest.mark.parametrize(
    ("codec", "ending", "skip"), [("mpeg4", "mp4", 10), ("flv", "flv", 4), ("wmv2", "asf", 7)]
)
def test_pictures_from_before_the_first_keyframe_are_delivered(
    tmp_path: Path, codec: str, ending: str, skip: int
) -> None:
    """Some decoders begin anywhere: their first picture is the first packet's, and time counts from it."""
    style = Style(codec, options={"qscale": "2"}, gop=20)
    whole = fv.write(tmp_path / f"whole.{ending}", style, count=60)
    video = fv.cut_packets(whole, tmp_path / f"v.{ending}", skip=skip)
    facts = probe_chunk(video)
    assert (facts.num_frames, facts.is_counted) == (60 - skip, True)
    clean = range(20 - skip, 60 - skip, 9)  # from the first keyframe on pictures are whole
    for decoder in fv.DECODERS:
        found = fv.frame_numbers(fv.chunk_of(facts).ref, list(clean), decoder)
        assert found == [frame_id + skip for frame_id in clean]
    report, folder = cut(video)
    assert report.failed == ""
    last = list(fv.chunk_pictures(folder).values())[-1][1] if skip > 20 else None
    assert last is None or last[-1] == 59
    assert mv.read_frame_number(mv.decode_all(folder / "1.mp4")[-1]) == 59


# --- the container's clock


@pytest.mark.parametrize("delay", [2, 17])
@pytest.mark.parametrize(
    ("style", "ending"),
    [
        (Style(), "mp4"),
        (Style(), "mkv"),
        (Style(), "ts"),
        (MPEG4, "mov"),
        (HEVC, "mp4"),
        (MJPEG, "mkv"),
        (VP9, "mkv"),
    ],
)
def test_a_picture_that_begins_after_the_sound(tmp_path: Path, style: Style, ending: str, delay: int) -> None:
    video = fv.write(tmp_path / f"v.{ending}", style, delay=delay, sound_seconds=2.5)
    report = assert_follows_player(video)
    assert any("late" in note for note in report.notes)
    facts = assert_clips_follow_player(video)
    assert facts.start_s == pytest.approx(delay / 30, abs=0.07)
    assert facts.clock_times() is not None


@pytest.mark.parametrize("codec", ["mjpeg", "mpeg4", "libx264", "rawvideo"])
def test_avi_states_where_its_picture_begins(tmp_path: Path, codec: str) -> None:
    styles = {"mjpeg": MJPEG, "mpeg4": MPEG4, "libx264": Style(), "rawvideo": Style("rawvideo")}
    video = fv.write(tmp_path / "v.avi", styles[codec], sound_seconds=3, count=30)
    data = bytearray(video.read_bytes())
    at = data.find(b"vids") + 28
    assert data[at : at + 4] == bytes(4)
    data[at : at + 4] = (21).to_bytes(4, "little")
    video.write_bytes(data)
    facts = probe_chunk(video)
    times = facts.clock_times()
    assert times is not None
    assert times[0] == pytest.approx(0.7, abs=0.04)
    report, folder = cut(video)
    assert report.failed == ""
    numbers = [number for _, shown in fv.chunk_pictures(folder).values() for number in shown]
    assert numbers.index(1) >= 21
    for decoder in fv.DECODERS:
        assert fv.clip_numbers(fv.chunk_of(facts), [0.1, float(times[5]) + 0.01], decoder) == [0, 5]


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_a_picture_that_is_late_by_more_than_a_chunk(tmp_path: Path, ending: str) -> None:
    video = fv.write(tmp_path / f"v.{ending}", delay=76, sound_seconds=4)
    report = assert_follows_player(video)
    assert report.made == 5
    assert_clips_follow_player(video)


@pytest.mark.parametrize("hidden", [3, 11])
def test_edit_lists_that_hide_and_that_shift(tmp_path: Path, hidden: int) -> None:
    assert_clips_follow_player(mv.edit_list_video(tmp_path / "hidden.mp4", frames=45, hidden=hidden))
    assert_follows_player(tmp_path / "hidden.mp4")
    video = fv.write(tmp_path / "v.mp4", delay=hidden, sound_seconds=2)
    assert video.read_bytes().count(b"elst") == 2, "the delay is an empty edit"
    assert_clips_follow_player(video)


# --- rates


@pytest.mark.parametrize(
    ("rate", "count", "seconds"),
    [
        (Fraction(1, 60), 4, 15),
        (Fraction(1, 10), 8, 15),
        (Fraction(1, 7), 9, 15),
        (Fraction(1, 2), 20, 15),
        (Fraction(2, 5), 12, 4),
        (Fraction(15, 2), 20, 1),
        (Fraction(999, 100), 25, 1),
    ],
)
@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_slow_constant_rates(tmp_path: Path, ending: str, rate: Fraction, count: int, seconds: int) -> None:
    video = fv.write(tmp_path / f"v.{ending}", rate=rate, count=count)
    assert_follows_player(video, seconds=seconds)
    assert_clips_follow_player(video)
    # A caption that ends just before the next picture comes still shows the one before.
    folder = tmp_path / "chunks" / video.name
    shown, border = fv.timeline(video), seconds
    chunk = fv.chunk_of(probe_chunk(folder / f"{border}.mp4"), start_s=border)
    times = [border + 0.01, border + 0.9 * min(seconds, float(1 / rate))]
    for decoder in fv.DECODERS:
        numbers = fv.clip_numbers(chunk, times, decoder)
        assert all(n in fv.on_show(shown, t, slack=0.02) for n, t in zip(numbers, times, strict=True))


PAUSES = {
    "screen": [0, *(8_000 + 33 * i for i in range(40)), 16_000],
    "pause": [*(33 * i for i in range(30)), *(4_000 + 33 * i for i in range(30))],
    "burst": [*range(0, 2_000, 200), *(2_000 + 17 * i for i in range(40)), 5_000, 5_200],
    "drops": np.cumsum([0, *np.random.default_rng(4).choice([33, 33, 34, 67, 100], 50)]).tolist(),
}


@pytest.mark.parametrize(("name", "rate"), [("screen", 30), ("pause", 30), ("burst", 59), ("drops", 30)])
@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_a_varying_rate_is_as_dense_as_where_it_moves(
    tmp_path: Path, ending: str, name: str, rate: int
) -> None:
    ticks = PAUSES[name]
    video = fv.write(tmp_path / f"v.{ending}", ticks=ticks, time_base=Fraction(1, 1000), count=len(ticks))
    report = assert_follows_player(video, seconds=5)
    folder = tmp_path / "chunks" / video.name
    pictures = fv.chunk_pictures(folder).values()
    assert all(found == pytest.approx(rate, abs=1.5) for found, _ in pictures)
    assert len({number for _, numbers in pictures for number in numbers}) >= 0.95 * len(ticks)
    assert "its frame rate varies" in report.notes[0]
    assert_clips_follow_player(video)


def test_a_varying_rate_may_be_capped(tmp_path: Path) -> None:
    ticks = PAUSES["pause"]
    video = fv.write(tmp_path / "v.mp4", ticks=ticks, time_base=Fraction(1, 1000), count=len(ticks))
    report, folder = cut(video, seconds=5, max_fps=12)
    assert report.failed == ""
    assert {rate for rate, _ in fv.chunk_pictures(folder).values()} == {12}
    assert fv.misplaced(video, folder) == []


@pytest.mark.parametrize("count", [45, 61])
def test_program_streams_state_few_times(tmp_path: Path, count: int) -> None:
    """FFmpeg may give the time that a packet states to an earlier picture than its own."""
    video = fv.write(tmp_path / "v.vob", Style(container="vob"), count=count)
    facts = probe_chunk(video)
    assert (facts.is_cfr, facts.fps, facts.num_frames) == (True, 30, count)
    report, folder = cut(video)
    assert report.failed == ""
    numbers = [number for _, shown in fv.chunk_pictures(folder).values() for number in shown]
    assert numbers == list(range(count))


def test_a_time_that_is_not_before_the_next_one() -> None:
    none = [None] * 5
    times = complete_times([0, *none, 600, *none, 1700, *none[:4], 1700, *none], Fraction(100))
    assert times.tolist() == [100 * i for i in range(23)]
    joined = complete_times([0, 100, 200, 0, 100, 200], Fraction(100))
    assert joined.tolist() == [100 * i for i in range(6)]


def test_the_last_picture_lasts_as_long_as_the_container_says(tmp_path: Path) -> None:
    video = fv.write(
        tmp_path / "v.mkv",
        Style(options=mv.X264_FAST | {"bf": "0"}),
        ticks=[0, 400, 900],
        time_base=Fraction(1, 1000),
        count=3,
        last_duration=2_600,
    )
    assert probe_chunk(video).end_s() == pytest.approx(3.5, abs=0.01)
    assert_follows_player(video)


@pytest.mark.parametrize(("ending", "b_frames"), [("mp4", 0), ("mp4", 3), ("mkv", 0), ("mov", 0)])
def test_a_still_after_a_constant_rate(tmp_path: Path, ending: str, b_frames: int) -> None:
    """A recorder writes nothing while nothing changes: the last picture stays until the file ends."""
    ticks = 90_000
    video = fv.write(
        tmp_path / f"v.{ending}",
        Style(options=mv.X264_FAST | {"bf": str(b_frames)}),
        ticks=[3_000 * i for i in range(40)],
        time_base=Fraction(1, ticks),
        count=40,
        last_duration=3 * ticks,
    )
    facts = probe_chunk(video)
    assert facts.is_cfr
    assert facts.end_s() == pytest.approx(39 / 30 + 3, abs=0.05)
    assert fv.chunk_of(facts).end_s == pytest.approx(facts.end_s())
    assert_follows_player(video)
    assert mv.frame_numbers(tmp_path / "chunks" / video.name / "4.mp4")[-1] == 39


@pytest.mark.parametrize("rate", ["29.97", "23.976", "59.94", "14.985", "24.11", "23.5", "12.07"])
@pytest.mark.parametrize("count", [91, 93])
def test_decimal_rates_and_their_last_frames(tmp_path: Path, rate: str, count: int) -> None:
    assert_follows_player(fv.write(tmp_path / "v.mp4", rate=Fraction(rate), count=count))


def test_a_decimal_rate_long_enough_to_be_told_from_the_ntsc_rate(tmp_path: Path) -> None:
    size = (32, 32)
    path, rate = tmp_path / "v.mp4", Fraction(2997, 100)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"preset": "ultrafast", "crf": "40"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for i in range(2_700):
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), i % 256, np.uint8), "rgb24")
            frame.pts, frame.time_base = i, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    report, _ = cut(path, seconds=30)
    assert (report.made, report.failed) == (4, "")
    assert probe_chunk(path).fps == rate


# --- other


def test_pictures_that_lean_on_an_old_encoder_are_counted(tmp_path: Path) -> None:
    """FFmpeg decodes what old builds of x264 wrote in another way, which it learns from the first packet."""
    options = mv.X264_FAST | {"x264-params": "direct=spatial:bframes=3:weightp=0"}
    video = fv.write(tmp_path / "v.mp4", Style(options=options), count=30)
    data = video.read_bytes()
    at = data.find(b"x264 - core ")
    video.write_bytes(data[: at + 12] + b" 33" + data[at + 15 :])
    facts = probe_chunk(video, index=True)
    assert (facts.is_counted, len(facts.packet_index)) == (True, 0)
    assert fv.disagreements(video) == []
