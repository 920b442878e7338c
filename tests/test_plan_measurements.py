"""Measurements of a machine: that they measure what they say; how long anything takes is never asserted."""

import os
import time

import make_videos
import numpy as np
import pytest
import torch

from avion_dali.contracts import DecodeError, UserError
from avion_dali.data.planner import ClipRules, Planner
from avion_dali.decode.cpu_fused import decode_clip
from avion_dali.inspection import plan_measurements, plan_samples

RULES = ClipRules(2, 32, training=True)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def chunks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    (folder / "v").mkdir()
    make_videos.write_video(folder / "v" / "0.mp4", gop=30)
    return folder


def planner_over(chunks, folder):
    return Planner(plan_samples.write_sample_manifest(chunks, folder, clip_seconds=1.0), RULES, seed=0)


def test_a_clip_brings_its_own_decoding_time(chunks, tmp_path, monkeypatch):
    request = planner_over(chunks, tmp_path).plan(0, 0)
    clocks = iter((5.0, 5.0125))
    monkeypatch.setattr(time, "thread_time", lambda: next(clocks))
    noted, plain = np.zeros((2, *request.frames_shape), np.uint8)
    plan_measurements.decode_and_note_time(request, noted)
    decode_clip(request, plain)
    assert noted.reshape(-1)[:2].view(np.float16)[0] == pytest.approx(12.5, rel=1e-3)
    assert np.array_equal(noted.reshape(-1)[2:], plain.reshape(-1)[2:])


def test_costs_come_from_the_real_loader(chunks, tmp_path):
    planner = planner_over(chunks, tmp_path)
    start, cores = time.perf_counter(), time.process_time()
    cost = plan_measurements.measure_loader(planner, device=CPU, workers=2, seconds=0.1)
    elapsed_ms, own_ms = 1e3 * (time.perf_counter() - start), 1e3 * (time.process_time() - cores)
    assert 0 < cost.worker_ms < elapsed_ms
    assert 0 < cost.trainer_ms < own_ms
    needs = [plan_samples.clip_needs(request)[0] for request in plan_samples.sample_requests(planner)]
    assert min(needs) <= cost.decoded <= max(needs)
    assert (cost.waiting_ms, cost.disk_ms) == (0, 0)


def test_a_lost_chunk_is_named_at_once(chunks, tmp_path):
    folder = tmp_path / "chunks" / "v"
    folder.mkdir(parents=True)
    (folder / "0.mp4").write_bytes((chunks / "v" / "0.mp4").read_bytes())
    planner = planner_over(tmp_path / "chunks", tmp_path / "manifest")
    (folder / "0.mp4").unlink()
    with pytest.raises(DecodeError, match=r"0\.mp4: missing"):
        plan_measurements.measure_loader(planner, device=CPU, workers=1, seconds=0.1)


def test_a_chunk_that_fails_while_loading_is_named(chunks, tmp_path):
    folder = tmp_path / "chunks"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        (folder / name / "0.mp4").write_bytes((chunks / "v" / "0.mp4").read_bytes())
    planner = planner_over(folder, tmp_path / "manifest")
    first = planner.plan(0, 0).parts[0].chunk.path
    (other,) = (path for path in folder.rglob("*.mp4") if str(path) != first)
    other.write_bytes(b"cut")
    with pytest.raises(DecodeError, match=rf"{other}: changed"):
        plan_measurements.measure_loader(planner, device=CPU, workers=1, seconds=1.0)


@pytest.fixture
def data_file(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(os.urandom(3_000_000))
    return path


needs_fadvise = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the page cache cannot be dropped")


@needs_fadvise
def test_clips_are_read_at_random_without_the_page_cache(data_file, monkeypatch):
    calls = []
    pread, advise = os.pread, os.posix_fadvise
    monkeypatch.setattr(os, "pread", lambda *a: calls.append(("read", *a)) or pread(*a))
    monkeypatch.setattr(os, "posix_fadvise", lambda *a: calls.append(("drop", *a)) or advise(*a))
    clip = (1_000, 64 * 1024)
    with plan_measurements.disk_test_files(data_file, []) as files:
        ms, mb_per_s = plan_measurements.read_clips(files, [clip], readers=1, seconds=0.02)
    assert mb_per_s == pytest.approx(sum(clip) / 1e3 / ms)
    reads = [number for number, call in enumerate(calls) if call[0] == "read"]
    assert {calls[number][2] for number in reads} == set(clip)
    assert len({calls[number][3] for number in reads}) > 3
    for number in reads:
        (_, _, size, offset), (dropped, _, start, length, advice) = calls[number], calls[number - 1]
        assert (dropped, advice) == ("drop", os.POSIX_FADV_DONTNEED)
        assert start <= offset
        assert offset + size <= start + length
        assert offset % 4096 == 0
        assert offset + size <= 3_000_000


@needs_fadvise
def test_small_files_are_read_whole(tmp_path):
    paths = [tmp_path / str(number) for number in range(3)]
    for path in paths:
        path.write_bytes(bytes(5_000))
    with plan_measurements.disk_test_files(tmp_path, paths) as files:
        ms, mb_per_s = plan_measurements.read_clips(files, [[1 << 20]], readers=2, seconds=0.01)
    assert len(files) == 3
    assert mb_per_s * ms == pytest.approx(5.0)  # kB


def test_without_a_way_to_drop_the_page_cache_nothing_is_claimed(data_file, monkeypatch):
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    with plan_measurements.disk_test_files(data_file, []) as files:
        assert not files


@needs_fadvise
def test_a_folder_is_tested_with_a_file_that_goes_away(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_measurements, "_TEST_FILE_BYTES", 16 * 1024 * 1024)
    with plan_measurements.disk_test_files(tmp_path, []) as (file,):
        (path,) = tmp_path.iterdir()
        assert os.fstat(file).st_ino == path.stat().st_ino
        assert path.stat().st_size == 16 * 1024 * 1024
    assert not list(tmp_path.iterdir())


@needs_fadvise
def test_a_file_is_tested_as_it_is(data_file):
    with plan_measurements.disk_test_files(data_file, []) as (file,):
        assert os.fstat(file).st_ino == data_file.stat().st_ino
    assert data_file.exists()


@needs_fadvise
def test_a_folder_that_is_not_there_is_named(tmp_path):
    absent = plan_measurements.disk_test_files(tmp_path / "absent", [])
    with pytest.raises(UserError, match=r"--disk .*absent"), absent:
        pass
