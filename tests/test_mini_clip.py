"""A mini clip must give the chunk's own frames, bit for bit, and be a file that DALI cannot misread."""

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

import av
import make_videos
import numpy as np
import pytest
from av.bitstream import BitStreamFilterContext
from test_reading import chunk_ref, frame_sets, raw_frames

from avion_dali.contracts import ClipPart
from avion_dali.decode.source import PartPackets, RunPackets, gather_packets
from pipelines.mini_clip import MAX_REORDER_FRAMES, UnfitForMiniClipError, build_mini_clip

CLOSED_HEVC = make_videos.HEVC_FAST | {
    "x265-params": make_videos.HEVC_FAST["x265-params"] + ":open-gop=0:bframes=4:b-adapt=0"
}
STYLES = [
    "x264-default",
    "x264-gop30",
    "balanced",
    "no-b",
    "intra",
    "mkv",
    "mov",
    "hevc-closed",
    "vp8",
    "vp9",
    "vp9-mp4",
    "mjpeg",
]


@pytest.fixture(scope="module")
def videos(gop_videos: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The usual videos, and those of codecs and kinds that only mini clips tell apart."""
    folder = tmp_path_factory.mktemp("more_styles")
    hevc = make_videos.write_video(folder / "closed.mp4", codec="libx265", options=CLOSED_HEVC)
    vp8 = {"deadline": "realtime", "cpu-used": "8", "g": "30", "b": "1M"}
    more = {
        "hevc-closed": hevc,
        "vp8": make_videos.write_video(folder / "vp8.webm", codec="libvpx", options=vp8),
    }
    return gop_videos | more


def packets_of(path: Path, frame_ids: Sequence[int]) -> PartPackets:
    return gather_packets(ClipPart(chunk_ref(path), tuple(frame_ids)), decoder="dali")


def decoded(data: bytes) -> list[np.ndarray]:
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray() for frame in container.decode(video=0)]


@pytest.mark.parametrize("style", STYLES)
def test_frames_are_those_of_the_chunk(videos: dict[str, Path], style: str) -> None:
    path = videos[style]
    expected = raw_frames(path)
    for frame_ids in frame_sets(len(expected), seed=STYLES.index(style))[:14]:
        part = packets_of(path, frame_ids)
        mini = build_mini_clip([part])
        frames = decoded(mini.data)
        assert len(frames) == sum(len(run.payloads) for run in part.runs)
        assert len(mini.frame_ids) == len(frame_ids)
        for local, frame_id in zip(mini.frame_ids, frame_ids, strict=True):
            np.testing.assert_array_equal(frames[local], expected[frame_id], err_msg=f"{style} {frame_ids}")


@pytest.mark.parametrize("style", ["balanced", "x264-default", "hevc-closed", "vp9", "mjpeg"])
def test_packets_times_and_keyframes_of_two_parts(videos: dict[str, Path], style: str) -> None:
    """Read back by FFmpeg: the packets as they were, shown in order without a gap, decoded before shown."""
    parts = [packets_of(videos[style], ids) for ids in [(20, 31, 70), (0, 5)]]
    runs = [run for part in parts for run in part.runs]
    mini = build_mini_clip(parts)
    with av.open(io.BytesIO(mini.data)) as container:
        (stream,) = container.streams
        context = stream.codec_context
        packets = [packet for packet in container.demux(stream) if packet.size]
        assert (stream.frames, context.width, context.height) == (len(packets), 128, 96)
        assert bytes(context.extradata or b"") == parts[0].stream.extradata
    assert [bytes(packet) for packet in packets] == [payload for run in runs for payload in run.payloads]
    shown = sorted(packet.pts for packet in packets)
    assert shown == list(range(shown[0], shown[0] + len(packets)))
    assert 0 <= shown[0] <= MAX_REORDER_FRAMES
    times = [packet.dts for packet in packets]
    assert times == sorted(set(times))
    assert all(packet.dts <= packet.pts for packet in packets)
    keyframes = [i for i, packet in enumerate(packets) if packet.is_keyframe]
    assert keyframes == np.cumsum([0, *(len(run.payloads) for run in runs[:-1])]).tolist()
    expected, frames = raw_frames(videos[style]), decoded(mini.data)
    for local, frame_id in zip(mini.frame_ids, (20, 31, 70, 0, 5), strict=True):
        np.testing.assert_array_equal(frames[local], expected[frame_id])


def test_frames_of_two_chunks(videos: dict[str, Path], tmp_path: Path) -> None:
    options = {"preset": "veryfast", "threads": "1", "x264-params": make_videos.BALANCED}
    second = make_videos.write_video(tmp_path / "second.mp4", frames=40, options=options, first_number=500)
    mini = build_mini_clip([packets_of(videos["balanced"], (60, 88)), packets_of(second, (3, 17))])
    with av.open(io.BytesIO(mini.data)) as container:
        numbers = [
            make_videos.read_frame_number(frame.to_ndarray(format="rgb24"))
            for frame in container.decode(video=0)
        ]
    assert [numbers[i] for i in mini.frame_ids] == [60, 88, 503, 517]


@pytest.mark.parametrize(("style", "frame_ids"), [("intra", (0, 2, 4, 6)), ("balanced", (3, 40, 70))])
def test_start_codes_part_the_pictures(videos: dict[str, Path], style: str, frame_ids: tuple[int, ...]) -> None:
    """NVDEC gets the packets through this filter as one stream of bytes and finds the pictures by itself.

    Every second picture of an all-intra chunk has the same idr_pic_id, so that only the parameter sets in
    between tell two of them apart (ITU-T H.264, section 7.4.1.2.3).
    """
    mini = build_mini_clip([packets_of(videos[style], frame_ids)] * 2)
    with av.open(io.BytesIO(mini.data)) as container:
        stream = container.streams.video[0]
        to_start_codes = BitStreamFilterContext("h264_mp4toannexb", stream)
        raw = b"".join(bytes(p) for packet in container.demux(stream) for p in to_start_codes.filter(packet))
    with av.open(io.BytesIO(raw), format="h264") as container:
        frames = [frame.to_ndarray() for frame in container.decode(video=0)]
    expected = raw_frames(videos[style])
    for local, frame_id in zip(mini.frame_ids, frame_ids * 2, strict=True):
        np.testing.assert_array_equal(frames[local], expected[frame_id])


@pytest.mark.parametrize("style", ["open-gop", "hevc"])
def test_keyframes_of_open_gops_are_refused(videos: dict[str, Path], style: str) -> None:
    with pytest.raises(UnfitForMiniClipError, match="open GOP"):
        build_mini_clip([packets_of(videos[style], (0, 40, 70))])
    expected, mini = raw_frames(videos[style]), build_mini_clip([packets_of(videos[style], (0, 4))])
    np.testing.assert_array_equal(decoded(mini.data)[mini.frame_ids[1]], expected[4])


def test_parameter_sets_inside_the_stream_are_refused_where_they_would_spread(
    videos: dict[str, Path], tmp_path: Path
) -> None:
    """A keyframe's own parameter sets outlive its run; one run alone may have them."""
    small = make_videos.write_video(tmp_path / "a.mp4", frames=30, gop=15, size=(128, 96))
    other = make_videos.write_video(tmp_path / "b.mp4", frames=30, gop=15, options={"preset": "ultrafast"})
    joined = make_videos.join_videos(tmp_path / "c.mp4", small, other, repeat=True)
    with pytest.raises(UnfitForMiniClipError, match="their own parameter sets"):
        build_mini_clip([packets_of(joined, (5, 40))])
    build_mini_clip([packets_of(joined, (40,))])


def test_parts_that_differ_are_refused(videos: dict[str, Path]) -> None:
    parts = [packets_of(videos[style], (0, 5)) for style in ("balanced", "vp9", "x264-default")]
    for other in parts[1:]:
        with pytest.raises(UnfitForMiniClipError, match="differ"):
            build_mini_clip([parts[0], other])
    larger = dataclasses.replace(parts[1], stream=dataclasses.replace(parts[1].stream, width=256))
    with pytest.raises(UnfitForMiniClipError, match="differ"):
        build_mini_clip([parts[1], larger])


@pytest.mark.parametrize(
    ("changes", "message"), [({"codec": "mpeg4"}, "mpeg4"), ({"extradata": b"\0\0\0\1\x67"}, "parameter sets")]
)
def test_streams_that_need_another_container_are_refused(
    videos: dict[str, Path], changes: dict[str, object], message: str
) -> None:
    part = packets_of(videos["balanced"], (0, 5))
    part = dataclasses.replace(part, stream=dataclasses.replace(part.stream, **changes))
    with pytest.raises(UnfitForMiniClipError, match=message):
        build_mini_clip([part])


@pytest.mark.parametrize("late", [MAX_REORDER_FRAMES, MAX_REORDER_FRAMES + 1])
def test_pictures_decoded_too_late_to_sort_are_refused(videos: dict[str, Path], late: int) -> None:
    """The second picture shown is decoded `late` places after its turn."""
    stream = packets_of(videos["balanced"], (0,)).stream
    pts = (0, *range(2, late + 2), 1)
    run = RunPackets(tuple(b"%d" % p for p in pts), pts, wanted=(1,), clean=True)
    part = PartPackets(stream, (run,))
    if late > MAX_REORDER_FRAMES:
        with pytest.raises(UnfitForMiniClipError, match=f"{late} places late"):
            build_mini_clip([part])
    else:
        assert build_mini_clip([part]).frame_ids == (1,)
