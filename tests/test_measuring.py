"""Measurements of a machine: that they measure what they say; how long anything takes is never asserted."""

import math
import os

import make_videos
import numpy as np
import pytest
import torch

from avion_dali.contracts import DecodeError, UserError
from avion_dali.cores import available_cores
from avion_dali.inspection import measuring, sampling
from avion_dali.inspection.capacity import TrainerCost


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    (folder / "chunks" / "v").mkdir(parents=True)
    make_videos.write_video(folder / "chunks" / "v" / "0.mp4", gop=30)
    return sampling.write_sample_manifest(folder / "chunks", folder / "manifest", clip_seconds=1.0)


@pytest.fixture(scope="module")
def requests(manifest):
    return sampling.sample_requests(manifest, num_frames=2, frame_size=32, count=5)


def test_all_processes_time_the_same_clips(requests):
    ms = measuring.time_decoding(requests, processes=2, seconds=0.05)
    assert ms.shape == (2, 5)
    assert np.isfinite(ms).all()
    assert (ms > 0).all()


def test_clips_whose_turn_never_came_are_not_numbers(requests):
    ms = measuring.time_decoding(requests, processes=1, seconds=0.0)
    assert np.isfinite(ms).tolist() == [[True, False, False, False, False]]


def test_unreadable_clips_are_errors_and_no_hang(tmp_path):
    (tmp_path / "chunks" / "v").mkdir(parents=True)
    path = make_videos.write_video(tmp_path / "chunks" / "v" / "0.mp4", frames=30)
    gone = sampling.write_sample_manifest(tmp_path / "chunks", tmp_path / "manifest", clip_seconds=1.0)
    clips = sampling.sample_requests(gone, num_frames=2, frame_size=32, count=2)
    path.unlink()
    with pytest.raises(DecodeError, match="missing"):
        measuring.time_decoding(clips, processes=1, seconds=0.0)


def test_costs_of_decoding(manifest):
    cost = measuring.measure_decode_cost(manifest, frame_counts=(1, 4), frame_size=32, seconds=0.1)
    needs = sampling.clip_needs(sampling.sample_requests(manifest, num_frames=8, frame_size=32)[0])
    assert 0 < cost.ms(needs) < math.inf


def test_slowdown_is_the_median_ratio(monkeypatch):
    alone, together = [[10.0, 20.0, 30.0, np.nan]], [[12.0, 24.0, 90.0, 1.0], [13.0, 24.0, np.nan, np.nan]]
    monkeypatch.setattr(measuring, "available_cores", lambda: 2)
    monkeypatch.setattr(
        measuring,
        "time_decoding",
        lambda _, *, processes, seconds: np.array(alone if processes == 1 else together),
    )
    assert measuring.measure_slowdown([], seconds=1.0) == pytest.approx(1.2)
    monkeypatch.setattr(measuring, "available_cores", lambda: 1)
    assert measuring.measure_slowdown([], seconds=1.0) == 1.0


def test_cores_are_counted_once():
    assert 1 <= measuring.physical_cores() <= available_cores()


def test_the_trainers_share_is_split_by_frames(monkeypatch, manifest):
    def milliseconds(planner, device, decode_clip, *, batch, clips):
        slow = decode_clip is measuring.deliver_one_by_one
        return 0.2 + 0.05 * planner.rules.num_frames + 0.1 * slow

    monkeypatch.setattr(measuring, "_trainer_ms", milliseconds)
    cost = measuring.measure_trainer(
        manifest, device=torch.device("cpu"), frame_size=32, frame_counts=(1, 8), clips=8
    )
    assert (cost.base, cost.per_frame, cost.waking) == pytest.approx((0.2, 0.05, 0.1))
    assert cost.ms(4) == pytest.approx(0.4)


def test_the_trainers_share_comes_from_the_real_loader(monkeypatch, manifest):
    monkeypatch.setattr(measuring, "_TRAINER_BATCH_BYTES", 100_000)
    cost = measuring.measure_trainer(
        manifest, device=torch.device("cpu"), frame_size=32, frame_counts=(1, 2), clips=32
    )
    assert isinstance(cost, TrainerCost)
    assert cost.ms(2) > 0


@pytest.fixture
def data_file(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(os.urandom(3_000_000))
    return path


needs_fadvise = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the page cache cannot be dropped")


@needs_fadvise
def test_a_disk_is_read_at_random_without_its_page_cache(data_file, monkeypatch):
    calls = []
    pread, advise = os.pread, os.posix_fadvise
    monkeypatch.setattr(os, "pread", lambda *a: calls.append(("read", *a)) or pread(*a))
    monkeypatch.setattr(os, "posix_fadvise", lambda *a: calls.append(("drop", *a)) or advise(*a))
    speed = measuring.measure_disk([data_file], readers=1, seconds=0.02)
    assert speed.readers == 1
    assert min(speed.sequential_mb_s, speed.random_reads_per_s, speed.alone.mb_per_s) > 0
    small = [number for number, call in enumerate(calls) if call[0] == "read" and call[2] == 64 * 1024]
    assert len({calls[number][3] for number in small}) > 3
    for number in small:
        (_, _, size, offset), (dropped, _, start, length, advice) = calls[number], calls[number - 1]
        assert (dropped, advice) == ("drop", os.POSIX_FADV_DONTNEED)
        assert start <= offset
        assert offset + size <= start + length
        assert offset % 4096 == 0
        assert offset + size <= 3_000_000


@needs_fadvise
def test_small_files_are_read_whole(tmp_path):
    files = [tmp_path / str(number) for number in range(3)]
    for path in files:
        path.write_bytes(bytes(5_000))
    size, ms = measuring._read_at_random(
        [os.open(p, os.O_RDONLY) for p in files], 1 << 20, threads=2, seconds=0.01
    )
    assert size == 5_000
    assert ms > 0


def test_without_a_way_to_drop_the_page_cache_nothing_is_claimed(data_file, monkeypatch):
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    assert measuring.measure_disk([data_file], readers=1) is None


def test_a_folder_is_tested_with_a_file_that_goes_away(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "_TEST_FILE_BYTES", 16 * 1024 * 1024)
    with measuring.disk_test_files(tmp_path) as (path,):
        assert path.parent == tmp_path
        assert path.stat().st_size == 16 * 1024 * 1024
    assert not list(tmp_path.iterdir())


def test_a_file_is_tested_as_it_is(data_file):
    with measuring.disk_test_files(data_file) as files:
        assert files == [data_file]
    assert data_file.exists()


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"--disk .*absent"), measuring.disk_test_files(tmp_path / "absent"):
        pass
