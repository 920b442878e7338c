"""Loading with DALI: every clip once and in order, whether DALI can decode it or not, and clear errors."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import make_videos
import numpy as np
import pytest
import torch
from dali_clips import (
    VP9,
    FixedPlanner,
    chunk_manifest,
    clip_request,
    decoded,
    draw_soft,
    epoch,
    loader_of,
    planner_of,
    strategy_of,
)
from processes import left_after
from test_source import indexed_ref

from avion_dali.contracts import ClipBatch, UserError
from avion_dali.data.manifest import Manifest
from avion_dali.loading.pool import WorkerPool
from avion_dali.loading.ring import is_open

pytest.importorskip("nvidia.dali")

from test_graph import assert_close

from pipelines.graph_runner import GraphRunner

ROOT = Path(__file__).resolve().parent.parent
SECONDS = tuple(i / 10 for i in range(11))
HOW = {"frames": 60, "size": (96, 80), "draw": draw_soft}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """22 clips of two VP9 chunks."""
    folder = tmp_path_factory.mktemp("loader")
    names = [folder / f"{name}.mp4" for name in "ab"]
    paths = [make_videos.write_video(path, first_number=60 * i, **HOW, **VP9) for i, path in enumerate(names)]
    return chunk_manifest(folder / "m", dict.fromkeys(paths, SECONDS))


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(workers=1, timeout_s=60) as pool:
        yield pool


def assert_same(batches: list[ClipBatch], others: list[ClipBatch]) -> None:
    for batch, other in zip(batches, others, strict=True):
        np.testing.assert_array_equal(batch.sample_ids, other.sample_ids)
        assert torch.equal(batch.frames_BTHWC, other.frames_BTHWC)
        assert torch.equal(batch.tokens_BL, other.tokens_BL)
        assert batch.epoch == other.epoch


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 8), (2, 2)])
def test_every_sample_once_an_epoch_with_its_own_frames_and_text(
    manifest: Manifest, pool: WorkerPool, world_size: int, micro_batch: int
) -> None:
    planner, seen = planner_of(manifest), {0: [], 1: []}
    for rank in range(world_size):
        sizes = {"global_batch": 8, "micro_batch": micro_batch, "rank": rank, "world_size": world_size}
        with loader_of(planner, pool, training=True, **sizes) as loader:
            batches = epoch(loader, 0, 4)
            assert (loader.steps_per_epoch, loader.accum_steps) == (2, 8 // micro_batch // world_size)
            assert loader.stats.delivered == 32 // world_size
        for batch in batches:
            seen[batch.epoch] += batch.sample_ids.tolist()
            for row, sample_id in enumerate(batch.sample_ids.tolist()):
                right = decoded(planner.plan(sample_id, batch.epoch))[0]
                assert_close(batch.frames_BTHWC[row].numpy(), right, sample_id)
                assert batch.tokens_BL[row, :2].tolist() == [1, 2 + sample_id]
    assert all(len(set(ids)) == len(ids) == 16 for ids in seen.values())
    assert seen[0] != seen[1]


def test_resume_at_any_step_gives_the_same_batches(manifest: Manifest, pool: WorkerPool) -> None:
    sizes = {"training": True, "global_batch": 6, "micro_batch": 3}
    with loader_of(planner_of(manifest), pool, **sizes) as loader:
        whole = epoch(loader, 0, 7)
    for first in range(1, 7):
        with loader_of(planner_of(manifest), pool, **sizes) as loader:
            assert_same(whole[2 * first :], epoch(loader, first, 7))


@pytest.mark.parametrize("graphs", [2, 3])
def test_several_graphs_in_turn_give_the_batches_of_one(
    manifest: Manifest, pool: WorkerPool, graphs: int
) -> None:
    """Also after a loop that was left, when the next batch goes to another graph than in the first loop."""
    planner, sizes = planner_of(manifest, training=False), {"global_batch": 3, "micro_batch": 3}
    with loader_of(planner, pool, **sizes) as loader:
        one = epoch(loader)
    assert [len(batch) for batch in one] == [3] * 7 + [1]
    with loader_of(planner, pool, graphs=graphs, **sizes) as loader:
        for taken in (8, 1, 4, 8):
            batches = [batch for _, batch in zip(range(taken), loader.batches(0, 8), strict=False)]
            assert_same(one[:taken], batches)
        assert_same(one[5:], epoch(loader, 5))


def test_evaluation_drops_nothing_and_repeats_itself(manifest: Manifest, pool: WorkerPool) -> None:
    """With two ranks the last batch leaves one of them two clips and the other none."""
    planner = planner_of(manifest, training=False)
    ids = []
    for rank, sizes in enumerate([[5, 5, 2], [5, 5, 0]]):
        with loader_of(planner, pool, global_batch=10, micro_batch=5, world_size=2, rank=rank) as loader:
            batches = epoch(loader)
            assert [len(batch) for batch in batches] == sizes
            assert batches[-1].frames_BTHWC.shape == (sizes[-1], 2, 48, 48, 3)
            assert_same(batches, epoch(loader))
        ids += [i for batch in batches for i in batch.sample_ids.tolist()]
    assert sorted(ids) == list(range(22))


def test_two_loaders_in_turn_share_a_pool(manifest: Manifest, pool: WorkerPool) -> None:
    evaluating, training = planner_of(manifest, training=False), planner_of(manifest, size=32)
    with (
        loader_of(evaluating, pool) as first,
        loader_of(training, pool, training=True, global_batch=4, micro_batch=4) as second,
    ):
        alone = epoch(first)
        steps = second.batches(0, 5)
        taken = [next(steps), next(steps)]
        assert_same(alone, epoch(first))
        taken += list(steps)
        assert_same(taken, epoch(second, 0, 5))


def test_a_batch_stays_as_it_was_delivered(manifest: Manifest, pool: WorkerPool) -> None:
    with loader_of(planner_of(manifest), pool, training=True, global_batch=2, micro_batch=2) as loader:
        batches = loader.batches(0, 11)
        first = next(batches)
        copy = first.frames_BTHWC.clone()
        list(batches)
    assert torch.equal(first.frames_BTHWC, copy)


def test_clips_of_no_use_to_dali_are_decoded_in_workers_and_counted(
    pool: WorkerPool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """H.264 among VP9, parts of two sizes, and two batches in a row with nothing for the graph."""
    write = make_videos.write_video
    vp9 = indexed_ref(write(tmp_path / "vp9.mp4", **HOW, **VP9), tmp_path)
    larger = indexed_ref(write(tmp_path / "larger.mp4", **HOW | {"size": (112, 80)}, **VP9), tmp_path)
    h264 = indexed_ref(write(tmp_path / "h264.mp4", **HOW), tmp_path)
    clips = {
        "fit": [(vp9, (3, 30))],
        "h264": [(h264, (3, 30))],
        "two sizes": [(vp9, (7,)), (larger, (8,))],
    }
    order = ["fit", "h264", "two sizes", "fit", *["h264"] * 8, "fit", "two sizes", "fit"]
    requests = [clip_request(i, clips[kind], [(0, 0, 96, 80)]) for i, kind in enumerate(order)]
    with loader_of(FixedPlanner(requests), pool, global_batch=4, micro_batch=4) as loader:
        batches = epoch(loader)
        assert loader.stats.decoded_on_cpu == sum(kind != "fit" for kind in order)
        assert (loader.stats.delivered, loader.stats.failures.total()) == (15, 0)
    for row, (request, kind) in enumerate(zip(requests, order, strict=True)):
        got = batches[row // 4].frames_BTHWC[row % 4].numpy()
        right = decoded(request)[0]
        assert_close(got, right, kind)
        assert np.array_equal(got, right) == (kind != "fit")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "DALI does not decode h264 without a GPU" in said[0]
    assert "chunks differ" in said[1]


def test_mini_clips_larger_than_their_place_come_along(pool: WorkerPool, tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    path = make_videos.write_video(
        tmp_path / "noise.mp4",
        frames=20,
        size=(192, 160),
        draw=lambda _, size: noise.integers(0, 255, (size[1], size[0], 3), np.uint8),
        **VP9,
    )
    request = clip_request(0, [(indexed_ref(path, tmp_path), (3, 9))], [(0, 0, 96, 80)], size=16)
    with loader_of(FixedPlanner([request] * 3), pool) as loader:
        clip = pool.schedule(loader._strategy.task, request, loader._ring.place(0, 0)).result()
        assert len(clip.mini_clip.data) > loader._ring.clip_bytes
        (batch,) = epoch(loader)
        assert loader.stats.decoded_on_cpu == 0
    for row in range(3):
        assert_close(batch.frames_BTHWC[row].numpy(), decoded(request)[0], row)


def test_colours_of_another_matrix_are_put_right(pool: WorkerPool, tmp_path: Path) -> None:
    refs = []
    for colorspace in (6, 1):
        path = tmp_path / f"{colorspace}.mp4"
        refs.append(
            indexed_ref(make_videos.write_video(path, **HOW, **VP9 | {"colorspace": colorspace}), tmp_path)
        )
    requests = [clip_request(i, [(refs[i % 2], (3, 30))]) for i in range(4)]
    with loader_of(FixedPlanner(requests), pool) as loader:
        (batch,) = epoch(loader)
    for row, request in enumerate(requests):
        assert_close(batch.frames_BTHWC[row].numpy(), decoded(request)[0], row)


def test_too_little_shared_memory_is_a_clear_error(
    manifest: Manifest, pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(UserError, match="--shm-size"), loader_of(planner_of(manifest), pool):
        pass


def test_the_graph_goes_on_at_full_depth_after_a_pause_and_after_failures() -> None:
    """DALI alone would carry on with one batch at a time, or end."""
    from pipelines.graph import GraphSettings

    runner = GraphRunner(GraphSettings("cpu", 0, 4, 1, 16, num_threads=1))
    with pytest.raises(RuntimeError, match="no batch is queued"):
        runner.take()
    for _ in range(2):
        for number in range(6):
            runner.put(nothing_to_decode(number))
        for left in (4, 4, 2, 2, 0, 0):  # queued beyond those under way
            with pytest.raises(RuntimeError, match="decoder"):
                runner.take()
            assert len(runner._queue.ready) == left


def nothing_to_decode(number: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """A batch of one clip whose mini clip is empty, with one frame and one view."""
    numbers = np.array([[1, 1, 0, 0, 8, 8, 0, 0, 0]], np.int32)
    return [np.zeros(100, np.uint8)], numbers, np.array([number], np.int64)


SCRIPT = """
import sys
from pathlib import Path
import dali_clips
from avion_dali.data.manifest import Manifest
from avion_dali.loading.pool import WorkerPool

if __name__ == "__main__":
    rank, planner = int(sys.argv[2]), dali_clips.planner_of(Manifest(sys.argv[1]), training=False)
    schedule = {"rank": rank, "world_size": 2, "global_batch": 8, "micro_batch": 4}
    with WorkerPool(workers=1, timeout_s=60) as pool, dali_clips.loader_of(planner, pool, **schedule) as loader:
        print(loader._ring.name, *(int(i) for b in dali_clips.epoch(loader) for i in b.sample_ids), flush=True)
        batches = loader.batches(0, 3)
        next(batches)
        sys.stdin.read()
"""


def test_two_processes_share_an_epoch_and_nothing_survives_their_death(
    manifest: Manifest, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    trainers = [
        subprocess.Popen(
            [sys.executable, str(script), str(manifest.folder), str(rank)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"PYTHONPATH": paths},
            start_new_session=True,
        )
        for rank in range(2)
    ]
    said = [trainer.stdout.readline().split() for trainer in trainers]
    assert sorted(int(i) for _, *ids in said for i in ids) == list(range(22))
    memories = [name for name, *_ in said]
    assert all(map(is_open, memories))
    for trainer in trainers:
        trainer.send_signal(signal.SIGKILL)
    for trainer in trainers:
        with closing(trainer.stdin), closing(trainer.stdout):
            trainer.wait()
    assert left_after(3, *(trainer.pid for trainer in trainers)) == []
    assert not any(map(is_open, memories))


def test_workers_import_neither_dali_nor_torch() -> None:
    heavy = "{'torch', 'nvidia', 'pyarrow', 'open_clip'}"
    code = f"import sys, pipelines.mini_clip_worker; print(*{heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.gpu
def test_on_a_gpu_batches_stay_there(manifest: Manifest, pool: WorkerPool) -> None:
    from avion_dali.data.order import BatchSchedule
    from avion_dali.loading.clip_loader import ClipLoader, LoaderSettings

    planner = planner_of(manifest, training=False)
    settings = LoaderSettings(torch.device("cuda", 0), context_length=4)
    schedule = BatchSchedule(22, global_batch=8, micro_batch=8, training=False)
    strategy = strategy_of("dali")
    with ClipLoader(planner, schedule, pool=pool, strategy=strategy, settings=settings) as loader:
        batches = epoch(loader)
    for batch in batches:
        assert batch.frames_BTHWC.device == batch.tokens_BL.device == settings.device
        for row, sample_id in enumerate(batch.sample_ids.tolist()):
            right = decoded(planner.plan(sample_id, 0))[0]
            assert_close(batch.frames_BTHWC[row].cpu().numpy(), right, sample_id)
