import os
import pickle
from fractions import Fraction

import av
import make_videos as mv
import numpy as np
import pytest

from avion_dali.contracts import DecodeError
from avion_dali.data.probe import open_video, probe_chunk


def test_every_gop_style_is_read_and_agrees_with_decoding(gop_videos):
    codecs = {"vp9": "vp9", "vp9-mp4": "vp9", "mjpeg": "mjpeg", "hevc": "hevc"}
    for style, path in gop_videos.items():
        facts = probe_chunk(path)
        assert mv.frame_numbers(path) == list(range(facts.num_frames)), style
        assert (facts.num_frames, facts.fps, facts.is_cfr, facts.frame_times) == (90, 30, True, None), style
        assert (facts.width, facts.height, facts.rotation) == (128, 96, 0), style
        assert facts.codec == codecs.get(style, "h264"), style
        assert facts.size_bytes == path.stat().st_size
        assert facts.path == str(path)


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_variable_rate_keeps_every_time(tmp_path, ending):
    steps = np.random.default_rng(0).uniform(0.02, 0.06, 39)
    times = np.concatenate([[0.0], np.cumsum(steps)])
    facts = probe_chunk(mv.write_video(tmp_path / f"v.{ending}", frames=40, times=list(times), start=0.5))
    assert not facts.is_cfr
    assert np.abs(facts.frame_times - times).max() < 1.1e-3  # Matroska counts in milliseconds
    assert float(facts.fps) == pytest.approx(39 / times[-1], rel=1e-3)


def test_one_dropped_frame_is_not_constant_rate(tmp_path):
    times = [i / 30 for i in range(41) if i != 20]
    facts = probe_chunk(mv.write_video(tmp_path / "v.mp4", frames=40, times=times))
    assert not facts.is_cfr
    assert np.allclose(facts.frame_times, times, atol=1e-4)


@pytest.mark.parametrize("ending", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("fps", [Fraction(30_000, 1001), Fraction(60_000, 1001), Fraction(25)])
def test_constant_rate_survives_the_clock_of_the_container(tmp_path, ending, fps):
    facts = probe_chunk(mv.write_video(tmp_path / f"v.{ending}", frames=40, fps=fps))
    assert (facts.fps, facts.is_cfr, facts.num_frames) == (fps, True, 40)


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_start_offset_is_not_a_missing_part(tmp_path, ending):
    facts = probe_chunk(mv.write_video(tmp_path / f"v.{ending}", frames=30, start=1.5))
    assert (facts.num_frames, facts.is_cfr, facts.fps) == (30, True, 30)


def test_edit_list_frames_are_not_counted(tmp_path):
    path = mv.edit_list_video(tmp_path / "v.mp4", frames=50, hidden=7)
    assert mv.frame_numbers(path) == list(range(7, 50))
    assert probe_chunk(path).num_frames == 43


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_pictures_that_lean_on_a_missing_group_are_not_counted(tmp_path, codec):
    params = "open-gop=1:bframes=3:b-adapt=0:scenecut=0:keyint=15"
    options = {"libx264": {"x264-params": params}, "libx265": {"x265-params": params + ":log-level=none"}}
    source = mv.write_video(tmp_path / "v.mp4", frames=60, codec=codec, options=options[codec])
    cut = mv.remux(source, tmp_path / "cut.mp4", from_packet=5)
    facts = probe_chunk(cut)
    assert facts.num_frames == len(mv.decode_all(cut)) < 55


@pytest.mark.parametrize(("degrees", "expected"), [(90, 90), (-90, 270), (180, 180)])
def test_rotation(tmp_path, degrees, expected):
    facts = probe_chunk(mv.write_video(tmp_path / "v.mp4", frames=5, rotation=degrees))
    assert (facts.rotation, facts.width, facts.height) == (expected, 128, 96)


def test_odd_portrait_ten_bit_sound_and_second_stream(tmp_path):
    odd = probe_chunk(mv.write_video(tmp_path / "o.mp4", frames=5, size=(213, 119), pix_fmt="yuv444p"))
    assert (odd.width, odd.height, odd.pix_fmt) == (213, 119, "yuv444p")
    deep = mv.write_video(tmp_path / "d.mp4", frames=5, size=(96, 128), pix_fmt="yuv420p10le")
    assert (probe_chunk(deep).width, probe_chunk(deep).pix_fmt) == (96, "yuv420p10le")
    both = mv.write_video(tmp_path / "b.mkv", frames=20, audio_seconds=4, extra_video=True)
    assert (probe_chunk(both).num_frames, probe_chunk(both).width) == (20, 128)


def test_colour_tags(tmp_path):
    tagged = probe_chunk(mv.write_video(tmp_path / "t.mp4", frames=3, colorspace=1, color_range=2))
    assert (tagged.colorspace, tagged.color_range) == ("bt709", "full")
    plain = probe_chunk(mv.write_video(tmp_path / "p.mp4", frames=3))
    assert (plain.colorspace, plain.color_range) == ("unspecified", "unspecified")


def test_one_frame(tmp_path):
    facts = probe_chunk(mv.write_video(tmp_path / "v.mp4", frames=1))
    assert (facts.num_frames, facts.fps, facts.is_cfr) == (1, 30, True)


def _cut(path, share):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def _silent_film(path):
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=16_000, layout="mono")
        container.mux(list(mv.silence(sound, 0.5)))
    return path


@pytest.mark.parametrize(
    ("name", "make", "cause"),
    [
        ("empty.mp4", lambda p: p.write_bytes(b""), "Invalid data"),
        ("text.mp4", lambda p: p.write_text("not a video " * 50), "Invalid data"),
        ("folder.mp4", lambda p: p.mkdir(), "directory"),
        ("sound.mp4", _silent_film, "no video"),
        ("no-moov.mp4", lambda p: _cut(mv.write_video(p), 0.5), "Invalid data"),
        (
            "cut-faststart.mp4",
            lambda p: _cut(mv.write_video(p, container_options={"movflags": "faststart"}), 0.5),
            "truncated",
        ),
        ("cut.mkv", lambda p: _cut(mv.write_video(p, frames=120), 0.4), "ends after"),
        (
            "cut.webm",
            lambda p: _cut(mv.write_video(p, codec="libvpx-vp9", options=mv.VP9_FAST), 0.4),
            "ends after",
        ),
    ],
)
def test_unreadable_files_are_corrupt(tmp_path, name, make, cause):
    make(tmp_path / name)
    with pytest.raises(DecodeError, match=cause) as error:
        probe_chunk(tmp_path / name)
    assert (error.value.kind, error.value.decoder, error.value.frame_ids) == ("corrupt", "probe", ())
    assert str(tmp_path / name) in str(error.value)


def test_missing_file_and_closed_door(tmp_path):
    with pytest.raises(DecodeError) as error:
        probe_chunk(tmp_path / "nowhere.mp4")
    assert error.value.kind == "missing"
    (tmp_path / "file").write_text("")
    with pytest.raises(DecodeError) as error:
        probe_chunk(tmp_path / "file" / "v.mp4")
    assert error.value.kind == "missing"


def test_open_video_names_the_caller_and_translates_late_errors(tmp_path):
    path = mv.write_video(tmp_path / "v.mp4", frames=5)
    with pytest.raises(DecodeError) as error, open_video(path, decoder="mine", frame_ids=(3,)) as (_, stream):
        assert stream.thread_count == 1
        raise av.error.InvalidDataError(1, "bad bytes")
    assert (error.value.decoder, error.value.frame_ids, error.value.kind) == ("mine", (3,), "corrupt")
    assert "bad bytes" in error.value.cause


def test_open_video_leaves_other_errors_alone(tmp_path):
    path = mv.write_video(tmp_path / "v.mp4", frames=5)
    with pytest.raises(PermissionError), open_video(path):
        raise PermissionError("some other file")


def test_open_video_closes_the_file(tmp_path):
    path = mv.write_video(tmp_path / "v.mp4", frames=5)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(20):
        probe_chunk(path)
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert after <= before + 2


def test_facts_cross_processes(tmp_path):
    facts = probe_chunk(mv.write_video(tmp_path / "v.mp4", frames=5))
    assert pickle.loads(pickle.dumps(facts)) == facts


def test_frame_numbers_survive_resizing_and_refuse_other_pictures():
    for number in (0, 1, 341, 682, 1023):
        frame = av.VideoFrame.from_ndarray(mv.draw_frame(number, (213, 119)), format="rgb24")
        small = frame.reformat(width=224, height=224).to_ndarray(format="rgb24")
        assert mv.read_frame_number(small) == number
    with pytest.raises(ValueError, match="unclear"):
        mv.read_frame_number(np.full((96, 128, 3), 128, np.uint8))


def test_the_balanced_fixture_has_seven_unreferenced_frames_of_eight(gop_videos):
    with av.open(str(gop_videos["balanced"])) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    assert [i for i, p in enumerate(packets) if p.is_keyframe] == [0, 32, 64]
    shown = sorted(packets[:32], key=lambda p: p.pts)
    assert [i for i, p in enumerate(shown) if mv.is_reference(p)] == [0, 8, 16, 24, 31]


def test_the_open_gop_fixture_has_pictures_before_its_keyframes(gop_videos):
    with av.open(str(gop_videos["open-gop"])) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    keys = [i for i, p in enumerate(packets) if p.is_keyframe]
    assert len(keys) > 3
    assert any(packets[i + 1].pts < packets[i].pts for i in keys[1:-1])
