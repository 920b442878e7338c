"""The loader: every sample once, frames and texts in step, and failures loud, bounded and repeatable."""

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import chunk_folders
import make_videos
import numpy as np
import odd_decoders
import pytest
import torch
from processes import left_after

from avion_dali.contracts import ChunkRef, ClipBatch, ClipRequest, UserError
from avion_dali.data.manifest import Chunk, Manifest, Sample, write_manifest
from avion_dali.data.order import BatchSchedule
from avion_dali.data.planner import ClipRules, Planner
from avion_dali.data.probe import probe_chunk
from avion_dali.decode import cpu_fused
from avion_dali.loading import ring as ring_module
from avion_dali.loading.clip_group import ClipGroup
from avion_dali.loading.clip_loader import ClipLoader, LoaderSettings
from avion_dali.loading.frames_strategy import FramesStrategy
from avion_dali.loading.pool import WorkerPool
from avion_dali.loading.ring import SharedRing, is_open, open_memory

SAMPLES = 60


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Sixty clips of one chunk that does not exist: these decoders never open it."""
    folder = tmp_path_factory.mktemp("painted")
    ref = ChunkRef(str(folder / "a.mp4" / "0.mp4"), 1, 1800, 64, 48)
    samples = [Sample(0, 1, i, i + 1.0, (f"text {i}",), ((1, 2 + i, 99),)) for i in range(SAMPLES)]
    chunks = [Chunk(ref, "a.mp4", 0.0, Fraction(30), "h264")]
    write_manifest(folder / "m", chunk_root=folder, chunks=chunks, samples=samples)
    return Manifest(folder / "m")


@contextmanager
def loader_of(
    manifest: Manifest,
    pool: WorkerPool,
    decode: Callable = odd_decoders.paint_identity,
    *,
    quarantine: Path | None = None,
    bad: float = 0.5,
    eval_clips: int = 1,
    **schedule: object,
) -> Iterator[ClipLoader]:
    training = bool(schedule.get("training", True))
    rules = ClipRules(num_frames=2, frame_size=16, training=training, eval_clips=eval_clips)
    sizes = {"global_batch": 12, "micro_batch": 6, "seed": 5, "clips_per_sample": rules.clips_per_row}
    plan = BatchSchedule(manifest.num_samples, **sizes | schedule)
    settings = LoaderSettings(
        torch.device("cpu"), context_length=4, max_bad_fraction=bad, quarantine=quarantine
    )
    planner, strategy = Planner(manifest, rules, seed=plan.seed), FramesStrategy(decode)
    with ClipLoader(planner, plan, pool=pool, strategy=strategy, settings=settings) as loader:
        yield loader


def pool_of(*, workers: int = 1, timeout: float = 20.0) -> WorkerPool:
    return WorkerPool(workers=workers, timeout_s=timeout)


def painted_ids(batch: ClipBatch) -> list[int]:
    pixels = batch.frames_BTHWC[:, 0, 0, 0].tolist()
    return [high * 256 + low for high, low, _ in pixels]


@pytest.mark.parametrize(("workers", "world_size", "micro_batch"), [(1, 1, 6), (2, 2, 3)])
def test_every_sample_once_with_its_own_frames_and_text(
    manifest: Manifest, workers: int, world_size: int, micro_batch: int
) -> None:
    seen: dict[int, list[int]] = {0: [], 1: []}
    with pool_of(workers=workers) as pool:
        for rank in range(world_size):
            sizes = {"world_size": world_size, "rank": rank, "micro_batch": micro_batch}
            with loader_of(manifest, pool, **sizes) as loader:
                batches = list(loader.batches(0, 10))
            assert loader.steps_per_epoch == 5
            assert loader.stats.delivered == 120 // world_size
            for epoch in (0, 1):
                seen[epoch] += [i for b in batches if b.epoch == epoch for i in b.sample_ids.tolist()]
            assert all(painted_ids(b) == b.sample_ids.tolist() for b in batches)
            assert all((b.tokens_BL[:, 1] - 2).tolist() == b.sample_ids.tolist() for b in batches)
            assert all(b.valid.all() and not b.errors for b in batches)
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(SAMPLES))
    assert seen[0] != seen[1]


def test_evaluation_drops_nothing_and_keeps_the_order(manifest: Manifest) -> None:
    with (
        pool_of() as pool,
        loader_of(manifest, pool, training=False, global_batch=16, micro_batch=16) as loader,
    ):
        batches = list(loader.batches(0, loader.steps_per_epoch))
    assert [len(b) for b in batches] == [16, 16, 16, 12]
    assert [i for b in batches for i in painted_ids(b)] == list(range(SAMPLES))


def test_resume_in_mid_epoch_gives_the_same_batches(manifest: Manifest) -> None:
    with pool_of() as pool:
        with loader_of(manifest, pool) as loader:
            whole = [b.frames_BTHWC.numpy().copy() for b in loader.batches(0, 8)]
        with loader_of(manifest, pool) as loader:
            rest = [b.frames_BTHWC.numpy().copy() for b in loader.batches(3, 8)]
    np.testing.assert_array_equal(np.stack(whole[3 * 2 :]), np.stack(rest))


def run_faulty_epoch(manifest: Manifest, workers: int, quarantine: Path) -> tuple[list[int], ClipLoader]:
    with (
        pool_of(workers=workers, timeout=1.0) as pool,
        loader_of(manifest, pool, odd_decoders.fail_on_sevens, quarantine=quarantine) as loader,
    ):
        delivered = []
        for batch in loader.batches(0, 5):
            assert painted_ids(batch) == batch.sample_ids.tolist()  # also for substitutes
            delivered.extend(batch.sample_ids.tolist())
        return delivered, loader


def test_a_stalled_read_a_killed_worker_and_bad_files_cost_one_clip_each(
    manifest: Manifest, tmp_path: Path
) -> None:
    delivered, loader = run_faulty_epoch(manifest, 2, tmp_path / "a.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    kinds = {row["sample_id"]: row["kind"] for row in rows}
    assert kinds == {7: "timeout", 17: "worker-died", 27: "corrupt"} | dict.fromkeys((37, 47, 57), "missing")
    assert "a surprise inside the decoder" in next(r["cause"] for r in rows if r["sample_id"] == 27)
    assert all(row["frame_ids"] and row["path"].endswith("0.mp4") for row in rows)
    assert len(delivered) == SAMPLES
    assert loader.stats.replaced == 6
    assert loader.stats.failures.total() == len(rows)
    # Everything that can be read is there; the holes are filled by the substitutes that were announced.
    assert sorted(set(range(SAMPLES)) - set(delivered)) == [7, 17, 27, 37, 47, 57]
    again, _ = run_faulty_epoch(manifest, 1, tmp_path / "b.jsonl")
    assert again == delivered


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_killed_while_it_has_nothing_to_do_costs_no_clip(manifest: Manifest, workers: int) -> None:
    with (
        pool_of(workers=workers) as pool,
        loader_of(manifest, pool) as loader,
    ):
        delivered: list[int] = []
        for count, batch in enumerate(loader.batches(0, 5)):
            delivered += painted_ids(batch)
            if count in (1, 4):
                time.sleep(0.3)  # the ring is full: all workers wait
                multiprocessing.active_children()[0].kill()
                time.sleep(0.3)
    assert sorted(delivered) == list(range(SAMPLES))
    assert loader.stats.replaced == 0


def test_evaluation_marks_unreadable_clips_instead_of_replacing_them(manifest: Manifest) -> None:
    with (
        pool_of(timeout=1.0) as pool,
        loader_of(
            manifest, pool, odd_decoders.fail_on_sevens, training=False, global_batch=30, micro_batch=30
        ) as loader,
    ):
        batches = list(loader.batches(0, 2))
    invalid = [int(i) for b in batches for i in b.sample_ids[~b.valid]]
    assert invalid == [7, 17, 27, 37, 47, 57]
    assert loader.stats.invalid == 6
    assert loader.stats.replaced == 0
    for batch in batches:
        assert not batch.frames_BTHWC[~torch.from_numpy(batch.valid)].any()
        assert all(error.substitute_id is None for error in batch.errors)


def test_bad_samples_are_bounded_by_samples_however_many_clips_each_gives(
    manifest: Manifest, tmp_path: Path
) -> None:
    """60 samples of 5 clips: 20 % are 12 samples, which fail in 60 clips."""
    sizes = {"training": False, "global_batch": 10, "micro_batch": 10, "eval_clips": 5}
    quarantine = tmp_path / "q.jsonl"
    with (
        pool_of() as pool,
        loader_of(manifest, pool, odd_decoders.fail_always, bad=0.2, quarantine=quarantine, **sizes) as loader,
    ):
        assert len(loader) == 30
        with pytest.raises(UserError, match="13 of 60 samples could not be read"):
            list(loader)
    failed = [json.loads(line)["sample_id"] for line in quarantine.read_text().splitlines()]
    assert failed == [i // 5 for i in range(12 * 5 + 1)]


def test_too_many_failures_stop_the_run(manifest: Manifest, tmp_path: Path) -> None:
    with (
        pool_of() as pool,
        loader_of(manifest, pool, odd_decoders.fail_always, bad=0.2, quarantine=tmp_path / "q.jsonl") as loader,
        pytest.raises(UserError, match=r"could not be read.*disk is gone"),
    ):
        list(loader.batches(0, 5))


def test_no_failure_is_tolerated_when_the_limit_is_zero(manifest: Manifest) -> None:
    with (
        pool_of() as pool,
        loader_of(manifest, pool, odd_decoders.fail_always, bad=0.0) as loader,
        pytest.raises(UserError, match="1 of 60 samples could not be read"),
    ):
        list(loader.batches(0, 5))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_are_light(manifest: Manifest) -> None:
    with (
        pool_of() as pool,
        loader_of(
            manifest, pool, odd_decoders.confess, training=False, bad=1.0, global_batch=1, micro_batch=1
        ) as loader,
    ):
        (batch,) = loader.batches(0, 1)
    facts = json.loads(batch.errors[0].cause)
    assert facts["heavy"] == []
    assert facts["resident_mb"] < 150


def test_a_pipe_that_never_answers_is_a_timeout_and_the_next_clip_is_right(tmp_path: Path) -> None:
    chunks, samples = [], []
    for row, name in enumerate(["a", "b"]):
        path = tmp_path / f"{name}.mp4" / "0.mp4"
        path.parent.mkdir()
        make_videos.write_video(path, frames=30)
        facts = probe_chunk(path)
        ref = ChunkRef(str(path), facts.size_bytes, facts.num_frames, facts.width, facts.height)
        chunks.append(Chunk(ref, f"{name}.mp4", 0.0, facts.fps, facts.codec))
        samples.append(Sample(row, 1, 0.2, 0.9, (name,), ((1, 2),)))
    write_manifest(tmp_path / "m", chunk_root=tmp_path, chunks=chunks, samples=samples)
    Path(chunks[0].ref.path).unlink()
    os.mkfifo(chunks[0].ref.path)
    rules = ClipRules(num_frames=2, frame_size=48, training=False)
    planner = Planner(Manifest(tmp_path / "m"), rules, seed=0)
    schedule = BatchSchedule(2, global_batch=2, micro_batch=2, training=False)
    settings, strategy = LoaderSettings(torch.device("cpu"), 4), FramesStrategy(cpu_fused.decode_clip)
    with pool_of(timeout=1.5) as pool:
        loader = ClipLoader(planner, schedule, pool=pool, strategy=strategy, settings=settings)
        start = time.monotonic()
        (batch,) = loader.batches(0, 1)
        loader.close()
    assert time.monotonic() - start < 20  # twice the time limit, and the start of three processes
    assert batch.valid.tolist() == [False, True]
    assert batch.errors[0].kind == "timeout"
    expected = np.zeros((1, 2, 48, 48, 3), np.uint8)
    cpu_fused.decode_clip(planner.plan(1, 0), expected)
    np.testing.assert_array_equal(batch.frames_BTHWC[1].numpy(), expected[0])


def test_a_late_worker_does_not_write_into_the_next_iteration(manifest: Manifest) -> None:
    """Of two workers, one is still busy with clips of an iteration that was left."""
    with pool_of(workers=2) as pool, loader_of(manifest, pool, odd_decoders.paint_late) as loader:
        for taken in (1, 2, 3):
            loader.set_epoch(0)
            for _ in zip(range(taken), loader, strict=False):
                pass
            loader.set_epoch(1)
            batches = iter(loader)
            delivered = [next(batches)]
            time.sleep(1.5)  # the clips worked on ahead are done, and the late ones as well
            delivered += batches
            for batch in delivered:
                assert painted_ids(batch) == batch.sample_ids.tolist()
                assert batch.frames_BTHWC[:, 0, 0, 0, 2].tolist() == [1] * 6


TRAINER = """
import os, sys, time
import odd_decoders
from avion_dali.loading.pool import WorkerPool
from avion_dali.loading.ring import SharedRing
from avion_dali.loading.worker import decode_into
if __name__ == "__main__":
    pool = WorkerPool(workers=2, timeout_s=30)
    ring = SharedRing(2, (4, 1, 2, 16, 16, 3))
    from avion_dali.contracts import *
    parts = (ClipPart(ChunkRef("x", 1, 9, 64, 48), (1,)),)
    request = ClipRequest(1, 0, parts, (0, 0), (CropWindow(0, 0, 8, 8),), (False,), 16)
    pool.schedule(decode_into, odd_decoders.paint_identity, request, ring.place(0, 0)).result()
    print(ring.name, flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's parent-death signal and /proc")
@pytest.mark.parametrize("whole_group", [False, True])
def test_nothing_survives_a_killed_trainer(tmp_path: Path, whole_group: bool) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    tests = Path(__file__).resolve().parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (tests.parent, tests)))}
    trainer = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    assert trainer.stdout is not None
    name = trainer.stdout.readline().strip()
    assert is_open(name)
    # Nameless: whoever is killed, the kernel frees it.
    inode = name.rpartition(":")[2]
    maps = Path(f"/proc/{trainer.pid}/maps").read_text().splitlines()
    assert any(line.split()[4] == inode and line.endswith("(deleted)") for line in maps)
    assert os.stat(name.partition("#")[0]).st_mode & 0o777 == 0o600
    if whole_group:
        os.killpg(trainer.pid, signal.SIGKILL)
    else:
        trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    assert left_after(3, trainer.pid) == []
    assert not is_open(name)


def test_memory_is_found_by_its_owner_alone_and_not_after_it_is_closed() -> None:
    first = SharedRing(2, (4, 1, 2, 16, 16, 3))
    place = first.place(1, 2)
    view = open_memory(place.memory_name)
    view[place.offset] = 7
    assert first.frames(1)[2].ravel()[0] == 7
    kept = first.frames(1)
    first.close()
    first.close()
    second = SharedRing(2, (4, 1, 2, 16, 16, 3))  # takes the number of the closed file
    assert second.name != first.name and not is_open(first.name)
    with pytest.raises(FileNotFoundError):
        open_memory(first.name)
    assert kept.ravel()[2 * first.clip_bytes] == 7 and not second.everything().any()
    second.close()


def test_memory_without_dev_shm_is_a_file_that_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring_module, "_MEMORY_FOLDER", "/no/such/folder")
    ring = SharedRing(1, (4, 1, 2, 16, 16, 3))
    path = Path(ring.name.partition("#")[0])
    assert path.stat().st_mode & 0o777 == 0o600
    open_memory(ring.name)[3] = 9
    assert ring.everything()[3] == 9
    ring.close()
    assert not path.exists()


def requests_of(manifest: Manifest, workers: int, world_size: int, *, seed: int = 5) -> dict[int, ClipRequest]:
    """All requests of one epoch, by sample, as workers plan the groups that reach the pool."""
    sent: dict[int, ClipRequest] = {}
    with pool_of(workers=workers) as pool:
        schedule = pool.schedule

        def noting(work_on: Callable, task: Callable, group: ClipGroup) -> Future:
            planner = pickle.loads(group.planner)
            sent.update((clip, planner.plan(clip, group.epoch)) for clip in group.clips)
            return schedule(work_on, task, group)

        pool.schedule = noting  # type: ignore[method-assign]
        for rank in range(world_size):
            sizes = {"global_batch": 40, "micro_batch": 10, "rank": rank, "world_size": world_size}
            with loader_of(manifest, pool, seed=seed, **sizes) as loader:
                deque(loader.batches(0, loader.steps_per_epoch), maxlen=0)
    return sent


def test_a_thousand_requests_are_the_same_for_any_worker_and_rank_count(tmp_path: Path) -> None:
    manifest = Manifest(chunk_folders.write_random_manifest(tmp_path / "m", num_samples=1000))
    expected = requests_of(manifest, workers=1, world_size=1)
    assert len(expected) == 1000
    assert requests_of(manifest, workers=2, world_size=1) == expected
    assert requests_of(manifest, workers=1, world_size=4) == expected
    assert requests_of(manifest, workers=2, world_size=2) == expected
    other = requests_of(manifest, workers=1, world_size=1, seed=6)
    same = [
        i for i in expected if (other[i].windows, other[i].parts) == (expected[i].windows, expected[i].parts)
    ]
    assert len(same) < 20
