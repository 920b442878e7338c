import json
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import replace
from fractions import Fraction

import av
import make_videos as mv
import numpy as np
import pytest

from avion_dali.contracts import UserError
from avion_dali.data import joined
from avion_dali.data.chunking import (
    ChunkPlan,
    ChunkSettings,
    chunk_folders,
    chunk_video,
    chunk_videos,
    plan_chunks,
)
from avion_dali.data.probe import probe_chunk

SETTINGS = ChunkSettings(profile="compat", chunk_seconds=1, short_side=96)


def cut(video, folder, settings=SETTINGS):
    """Chunk a video and return the frame numbers of each chunk by start second."""
    report = chunk_video(video, folder, settings)
    assert report.failed == ""
    chunks = {int(path.stem): mv.frame_numbers(path) for path in folder.glob("*.mp4")}
    assert report.made == len(chunks)
    return dict(sorted(chunks.items()))


def flat(chunks):
    return [number for numbers in chunks.values() for number in numbers]


# --- borders


@pytest.mark.parametrize("fps", [Fraction(30), Fraction(30_000, 1001), Fraction(25, 2), Fraction(60_000, 1001)])
def test_chunks_partition_the_frames_without_drift(fps):
    plan = ChunkPlan(fps, 20_000, 15)
    assert plan.borders[0] == 0
    assert plan.borders[-1] == sum(plan.frames.values()) == 20_000
    for k, border in enumerate(plan.borders[:-1]):
        assert abs(border / fps - 15 * k) <= 0.5 / fps
    assert list(plan.frames) == [15 * k for k in range(len(plan.frames))]


def test_frames_of_ntsc_chunks_differ_by_one():
    assert list(ChunkPlan(Fraction(30_000, 1001), 1349, 15).frames.values()) == [450, 449, 450]


@pytest.mark.parametrize("total", [1, 29, 30, 31, 60])
def test_last_chunk_is_what_is_left(total):
    frames = list(ChunkPlan(Fraction(30), total, 1).frames.values())
    assert sum(frames) == total
    assert all(frames)
    assert set(frames[:-1]) <= {30}


# --- what is in the chunks


def test_frames_are_routed_to_their_chunk(tmp_path):
    chunks = cut(mv.write_video(tmp_path / "v.mp4", frames=75), tmp_path / "out")
    assert chunks == {0: list(range(30)), 1: list(range(30, 60)), 2: list(range(60, 75))}


@pytest.mark.parametrize("profile", ["balanced", "vp9"])
def test_other_profiles(tmp_path, profile):
    settings = replace(SETTINGS, profile=profile)
    chunks = cut(mv.write_video(tmp_path / "v.mp4", frames=45), tmp_path / "out", settings)
    assert chunks == {0: list(range(30)), 1: list(range(30, 45))}


SOURCES = {
    "ntsc": lambda folder: mv.write_video(folder / "v.mp4", frames=50, fps=Fraction(30_000, 1001)),
    "ntsc-mkv": lambda folder: mv.write_video(folder / "v.mkv", frames=50, fps=Fraction(30_000, 1001)),
    "late-start": lambda folder: mv.write_video(folder / "v.mkv", frames=50, start=1.51666),
    "edit-list": lambda folder: mv.edit_list_video(folder / "v.mp4", frames=50, hidden=7),
    "odd-size": lambda folder: mv.write_video(
        folder / "v.webm", frames=50, size=(213, 119), codec="libvpx-vp9", options=mv.VP9_FAST
    ),
    "portrait": lambda folder: mv.write_video(folder / "v.mp4", frames=50, size=(96, 128)),
    "ten-bit": lambda folder: mv.write_video(folder / "v.mp4", frames=50, pix_fmt="yuv420p10le"),
    "full-chroma": lambda folder: mv.write_video(folder / "v.mp4", frames=50, pix_fmt="yuv444p"),
    "sound": lambda folder: mv.write_video(folder / "v.mp4", frames=50, audio_seconds=3),
    "two-streams": lambda folder: mv.write_video(folder / "v.mkv", frames=50, extra_video=True),
    "avi-with-b-frames": lambda folder: mv.write_video(folder / "v.avi", frames=50),
    "transport-stream": lambda folder: mv.write_video(folder / "v.ts", frames=50),
    "mjpeg": lambda folder: mv.write_video(
        folder / "v.mov", frames=50, codec="mjpeg", options={"q": "3"}, pix_fmt="yuvj420p"
    ),
}


@pytest.mark.parametrize("name", SOURCES)
def test_unusual_sources(tmp_path, name):
    video = SOURCES[name](tmp_path)
    first = 7 if name == "edit-list" else 0
    assert flat(cut(video, tmp_path / "out")) == list(range(first, 50))
    facts = probe_chunk(tmp_path / "out" / "0.mp4")
    source = probe_chunk(video)
    assert (facts.fps, facts.num_frames, facts.is_cfr) == (source.fps, 30, True)
    assert (facts.pix_fmt, facts.colorspace, facts.color_range) == ("yuv420p", "smpte170m", "limited")
    assert facts.width % 16 == facts.height % 16 == 0
    assert (facts.width > facts.height) == (source.width > source.height)
    with av.open(str(tmp_path / "out" / "0.mp4")) as container:
        assert [stream.type for stream in container.streams] == ["video"]


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_variable_rate_frames_stand_where_their_time_says(tmp_path, ending):
    steps = np.random.default_rng(3).uniform(0.015, 0.055, 79)
    times = np.concatenate([[0.0], np.cumsum(steps)])
    times[50:] += 0.4  # a long still
    video = mv.write_video(tmp_path / f"v.{ending}", frames=80, times=list(times))
    numbers = flat(cut(video, tmp_path / "out"))
    fps = probe_chunk(tmp_path / "out" / "0.mp4").fps
    assert 79 / (times[-1] - 0.4) < fps < 1.3 * 79 / (times[-1] - 0.4), (
        "as dense as where it does not stand still"
    )
    assert len(numbers) == pytest.approx(times[-1] * fps, abs=2.5)
    for slot, number in enumerate(numbers):
        # The newest frame that begins before the middle of the slot's successor; clocks round by 1 ms.
        begins = times[number] * fps
        assert begins <= slot + 0.5 + 0.04
        assert number == 79 or times[number + 1] * fps >= slot + 0.5 - 0.04


# --- running again


def test_second_run_decodes_nothing(tmp_path, monkeypatch):
    video = mv.write_video(tmp_path / "v.mp4", frames=45)
    cut(video, tmp_path / "out")

    def refuse(*_, **__):
        raise AssertionError("read again")

    monkeypatch.setattr(joined, "probe_chunk", refuse)
    monkeypatch.setattr(joined, "open_video", refuse)
    report = chunk_video(video, tmp_path / "out", SETTINGS)
    assert (report.made, report.kept, report.failed) == (0, 2, "")


def test_only_missing_chunks_are_made_and_leftovers_removed(tmp_path):
    video, out = mv.write_video(tmp_path / "v.mp4", frames=100), tmp_path / "out"
    before = cut(video, out)
    stamps = {path.name: path.stat().st_mtime_ns for path in out.glob("*.mp4")}
    (out / "1.mp4").unlink()
    (out / ".2.mp4.partial").write_bytes(b"half")
    report = chunk_video(video, out, SETTINGS)
    assert (report.made, report.kept, report.failed) == (1, 3, "")
    assert mv.frame_numbers(out / "1.mp4") == before[1]
    assert sorted(path.name for path in out.iterdir()) == ["0.mp4", "1.mp4", "2.mp4", "3.mp4", "chunks.json"]
    for name in ("0.mp4", "2.mp4", "3.mp4"):
        assert (out / name).stat().st_mtime_ns == stamps[name]


def test_chunks_of_another_plan_are_not_continued(tmp_path):
    """An earlier version may have chosen another rate: chunks of two rates do not belong together."""
    video, out = mv.write_video(tmp_path / "v.mp4", frames=70), tmp_path / "out"
    cut(video, out)
    sidecar = json.loads((out / "chunks.json").read_text())
    sidecar |= {"fps": "10", "chunks": {"0": 10, "1": 10, "2": 4}}
    (out / "chunks.json").write_text(json.dumps(sidecar))
    assert chunk_video(video, out, SETTINGS).kept == 3, "whole as it was planned"
    (out / "2.mp4").unlink()
    report = chunk_video(video, out, SETTINGS)
    assert "10 frames per second, but they would now have 30; delete it" in report.failed
    assert (out / "0.mp4").exists()


def test_killed_run_is_continued(tmp_path):
    video, out = mv.write_video(tmp_path / "v.mp4", frames=600), tmp_path / "out"
    worker = multiprocessing.get_context("spawn").Process(target=chunk_video, args=(video, out, SETTINGS))
    worker.start()
    deadline = time.monotonic() + 20
    while not (out / "1.mp4").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    worker.kill()
    worker.join()
    finished = {path.name: path.stat().st_mtime_ns for path in out.glob("*.mp4")}
    assert 2 <= len(finished) < 20, "the worker was to be killed in the middle"
    report = chunk_video(video, out, SETTINGS)
    assert (report.kept, report.made) == (len(finished), 20 - len(finished))
    assert all((out / name).stat().st_mtime_ns == stamp for name, stamp in finished.items())
    assert flat({k: mv.frame_numbers(out / f"{k}.mp4") for k in range(20)}) == list(range(600))
    assert not list(out.glob(".*.partial"))


@pytest.mark.parametrize("change", [{"profile": "vp9"}, {"chunk_seconds": 2}, {"short_side": 64}])
def test_other_settings_are_refused(tmp_path, change):
    video = mv.write_video(tmp_path / "v.mp4", frames=30)
    cut(video, tmp_path / "out")
    with pytest.raises(UserError, match="delete it or choose another"):
        chunk_video(video, tmp_path / "out", replace(SETTINGS, **change))


def test_changed_encoder_changed_source_and_strangers_are_refused(tmp_path):
    video, out = mv.write_video(tmp_path / "v.mp4", frames=30), tmp_path / "out"
    cut(video, out)
    sidecar = json.loads((out / "chunks.json").read_text())
    sidecar["settings"]["encoder"]["gop"] = 12
    (out / "chunks.json").write_text(json.dumps(sidecar))
    with pytest.raises(UserError, match="was made with"):
        chunk_video(video, out, SETTINGS)
    (out / "chunks.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        chunk_video(video, out, SETTINGS)
    (out / "chunks.json").unlink()
    with pytest.raises(UserError, match="not made by this command"):
        chunk_video(video, out, SETTINGS)
    (out / "0.mp4").unlink()
    cut(video, out)
    mv.write_video(video, frames=31)
    with pytest.raises(UserError, match="was made from a file of"):
        chunk_video(video, out, SETTINGS)


# --- failing


def test_damaged_middle_fails_the_video_and_keeps_all_undamaged_chunks(tmp_path):
    video = mv.write_video(tmp_path / "v.mov", frames=90, codec="mjpeg", options={"q": "3"}, pix_fmt="yuvj420p")
    with av.open(str(video)) as container:
        entry = container.streams.video[0].index_entries[50]
        position, size = entry.pos, entry.size
    with open(video, "r+b") as file:
        file.seek(position)
        file.write(bytes(size))
    report = chunk_video(video, tmp_path / "out", SETTINGS)
    assert report.made == 2
    assert "damaged at 1.67-1.70 s; chunks not made: 1" in report.failed
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.mp4", "2.mp4", "chunks.json"]


def test_early_end_of_decoding_fails(tmp_path, monkeypatch):
    video = mv.write_video(tmp_path / "v.mp4", frames=60)
    facts = probe_chunk(video)
    monkeypatch.setattr(joined, "probe_chunk", lambda _, tolerant: replace(facts, num_frames=100))
    report = chunk_video(video, tmp_path / "out", SETTINGS)
    assert "decoding ends 1.3 s before the expected 3.3 s" in report.failed
    assert report.made == 2, "the chunks that the missing end would fill are not made"
    monkeypatch.setattr(joined, "probe_chunk", lambda _, tolerant: replace(facts, num_frames=70))
    (tmp_path / "out" / "chunks.json").unlink()
    (tmp_path / "out" / "0.mp4").unlink()
    (tmp_path / "out" / "1.mp4").unlink()
    assert flat(cut(video, tmp_path / "out")) == [*range(60), *[59] * 10]


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_truncated_source_fails(tmp_path, share):
    video = mv.write_video(tmp_path / "v.mp4", frames=60, container_options={"movflags": "faststart"})
    video.write_bytes(video.read_bytes()[: int(video.stat().st_size * share)])
    report = chunk_video(video, tmp_path / "out", SETTINGS)
    assert "truncated" in report.failed
    assert report.made == 0


def test_sources_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    assert "regular file" in chunk_video(tmp_path / "pipe.mp4", tmp_path / "a", SETTINGS).failed
    assert "regular file" in chunk_video(tmp_path, tmp_path / "b", SETTINGS).failed
    assert "No such file" in chunk_video(tmp_path / "none.mp4", tmp_path / "c", SETTINGS).failed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"profile": "best"}, "balanced"),
        ({"chunk_seconds": 0}, "at least 1"),
        ({"short_side": 100}, "multiple of 16"),
    ],
)
def test_settings_are_checked(change, message):
    with pytest.raises(UserError, match=message):
        replace(SETTINGS, **change)


# --- many videos


def test_folders_keep_the_ending_and_refuse_collisions(tmp_path):
    one, two = tmp_path / "P01" / "P01_01.MP4", tmp_path / "P02" / "P01_01.MP4"
    out = tmp_path / "out"
    assert chunk_folders([one], out) == [out / "P01_01.MP4"]
    assert chunk_folders([one, two], out, root=tmp_path) == [out / "P01/P01_01.MP4", out / "P02/P01_01.MP4"]
    with pytest.raises(UserError, match="--root"):
        chunk_folders([one, two], out)
    with pytest.raises(UserError, match="not inside"):
        chunk_folders([one], out, root=tmp_path / "P02")


def test_many_videos_one_of_them_bad(tmp_path):
    good = mv.write_video(tmp_path / "a.mp4", frames=40)
    bad = tmp_path / "b.mp4"
    bad.write_bytes(good.read_bytes()[:200])
    other = mv.write_video(tmp_path / "c.mkv", frames=40, first_number=200)
    report = chunk_videos([good, bad, other], tmp_path / "out", settings=SETTINGS, jobs=2, progress=False)
    assert [video.made for video in report.videos] == [2, 0, 2]
    assert (report.made, report.kept) == (4, 0)
    assert [video.video for video in report.failed] == [str(bad)]
    assert "corrupt" in report.failed[0].failed
    assert mv.frame_numbers(tmp_path / "out" / "c.mkv" / "1.mp4") == list(range(230, 240))
    with pytest.raises(UserError, match="was made with"):
        chunk_videos([good], tmp_path / "out", settings=replace(SETTINGS, chunk_seconds=5), progress=False)


def test_workers_stay_light():
    code = "import sys, avion_dali.data.chunking; print([m for m in sys.modules if '.' not in m])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for heavy in ("torch", "pebble", "tqdm", "pyarrow", "open_clip", "PIL"):
        assert f"'{heavy}'" not in loaded


def test_plan_of_a_variable_rate_video_uses_its_densest_rate(tmp_path):
    times = [0.0, 0.03, 0.07, 0.10, 0.15, 0.40]
    facts = probe_chunk(mv.write_video(tmp_path / "v.mp4", frames=6, times=times))
    plan = plan_chunks(facts, chunk_seconds=1)
    assert plan.fps == 33  # the most frequent interval is 0.03 s
    assert plan.total == 14
    assert plan_chunks(facts, chunk_seconds=1, max_fps=20).fps == 20


def test_a_picture_that_begins_after_the_sound_keeps_its_time(tmp_path):
    """Narrations are timed on the player's clock, where this video's first frame comes at two seconds."""
    source = tmp_path / "late.mp4"
    mv.write_video(source, frames=60, start=2.0, audio_seconds=4.0)
    report = chunk_video(source, tmp_path / "chunks", ChunkSettings(chunk_seconds=15))
    assert not report.failed
    numbers = mv.frame_numbers(tmp_path / "chunks" / "0.mp4")
    assert len(numbers) == 120
    assert numbers[75] == 15
    assert set(numbers[:60]) == {0}
