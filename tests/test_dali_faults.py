"""Clips that cannot be read or decoded cost themselves alone, under `--decoder dali`, too."""

import os
from collections import Counter
from pathlib import Path

import make_videos
import numpy as np
import odd_collectors
import pytest
from dali_clips import (
    VP9,
    FixedPlanner,
    chunk_manifest,
    decoded,
    draw_soft,
    epoch,
    loader_of,
    planner_of,
)

from avion_dali.contracts import ClipBatch, UserError
from avion_dali.data.manifest import Manifest
from avion_dali.data.planner import Planner
from avion_dali.decode.source import gather_packets
from avion_dali.loading.pool import WorkerPool

pytest.importorskip("nvidia.dali")

from test_graph import assert_close

SECONDS = tuple(i / 10 for i in range(8))
CHUNKS = {"a": SECONDS, "b": SECONDS} | dict.fromkeys(
    ("corrupt", "zeros", "truncated", "gone", "stalled"), (0.2,)
)
# What becomes of them after the manifest is made; a process dies at one sample, and DALI refuses two others.
UNREADABLE = {
    16: "corrupt",
    17: "corrupt",
    18: "changed",
    19: "missing",
    20: "timeout",
    odd_collectors.KILLED: "worker-died",
    **dict.fromkeys(odd_collectors.REFUSED, "corrupt"),
}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Chunks that were sound when the manifest was made."""
    folder = tmp_path_factory.mktemp("faults")
    how = {"frames": 52, "size": (96, 80), "draw": draw_soft, **VP9}
    paths = {name: make_videos.write_video(folder / f"{name}.mp4", **how) for name in CHUNKS}
    manifest = chunk_manifest(folder / "m", {paths[name]: seconds for name, seconds in CHUNKS.items()})
    damage(paths, manifest)
    return manifest


def damage(paths: dict[str, Path], manifest: Manifest) -> None:
    data = bytearray(paths["corrupt"].read_bytes())
    keyframe = gather_packets(planner_of(manifest).plan(16, 0).parts[0], decoder="x").runs[0].payloads[0]
    data[data.index(keyframe) + len(keyframe) // 2] ^= 1
    paths["corrupt"].write_bytes(data)
    paths["zeros"].write_bytes(bytes(len(paths["zeros"].read_bytes())))
    os.truncate(paths["truncated"], paths["truncated"].stat().st_size - 1)
    paths["gone"].unlink()
    paths["stalled"].unlink()
    os.mkfifo(paths["stalled"])


def assert_right_frames(batch: ClipBatch, planner: Planner) -> None:
    """Every row shows the sample that the batch says it holds."""
    for row, (sample_id, valid) in enumerate(zip(batch.sample_ids.tolist(), batch.valid, strict=True)):
        if valid:
            right = decoded(planner.plan(sample_id, batch.epoch))[0]
            assert_close(batch.frames_BTHWC[row].numpy(), right, sample_id)
            assert batch.tokens_BL[row, 1] == 2 + sample_id
        else:
            assert not batch.frames_BTHWC[row].any()


def test_an_epoch_of_training_goes_on_past_every_kind_of_fault(manifest: Manifest) -> None:
    planner = planner_of(manifest)
    sizes = {"training": True, "global_batch": 4, "micro_batch": 4, "collect": odd_collectors.collect_oddly}
    sizes["graphs"] = 2
    with WorkerPool(workers=2, timeout_s=3.0) as pool:
        with loader_of(planner, pool, **sizes) as loader:
            batches = epoch(loader)
            stats = loader.stats
        assert len(batches) == 5
        for batch in batches:
            assert batch.valid.all()
            assert_right_frames(batch, planner)
        errors = [error for batch in batches for error in batch.errors]
        found = {error.sample_id: error.kind for error in errors}
        assert found.items() <= UNREADABLE.items()
        assert set(found.values()) == set(UNREADABLE.values())
        assert stats.failures == Counter(error.kind for error in errors)
        assert stats.delivered == 20
        assert stats.replaced == len({error.sample_id for error in errors})
        refused = [error for error in errors if error.sample_id in odd_collectors.REFUSED]
        assert all(error.cause.startswith("DALI cannot decode it: ") for error in refused)
        assert refused
        assert all(Path(error.path).stem == "b" and error.frame_ids for error in refused)
        with loader_of(planner, pool, **sizes) as loader:
            again = epoch(loader, 3, 5)
    for batch, same in zip(batches[3:], again, strict=True):
        np.testing.assert_array_equal(batch.sample_ids, same.sample_ids)
        np.testing.assert_array_equal(batch.frames_BTHWC, same.frames_BTHWC)


def test_evaluation_marks_them_and_keeps_all_others(manifest: Manifest) -> None:
    planner = planner_of(manifest, training=False)
    sizes = {"global_batch": 5, "micro_batch": 5, "collect": odd_collectors.collect_oddly}
    with WorkerPool(workers=2, timeout_s=3.0) as pool, loader_of(planner, pool, **sizes) as loader:
        batches = epoch(loader)
        assert loader.stats.invalid == len(UNREADABLE)
    ids = [i for batch in batches for i in batch.sample_ids.tolist()]
    valid = [v for batch in batches for v in batch.valid]
    assert ids == list(range(manifest.num_samples))
    assert {i for i, v in zip(ids, valid, strict=True) if not v} == UNREADABLE.keys()
    for batch in batches:
        assert_right_frames(batch, planner)


def test_when_dali_refuses_everything(manifest: Manifest) -> None:
    """Batches of invalid rows alone, or an end at once where no failure is tolerated."""
    planner = FixedPlanner([planner_of(manifest).plan(i, 0) for i in range(6)])
    refused = {"collect": odd_collectors.collect_refused}
    with WorkerPool(workers=1, timeout_s=60) as pool:
        with loader_of(planner, pool, global_batch=4, micro_batch=4, **refused) as loader:
            batches = epoch(loader)
            assert loader.stats.invalid == 6
        assert [len(batch) for batch in batches] == [4, 2]
        assert not any(batch.valid.any() or batch.frames_BTHWC.any() for batch in batches)
        with (
            loader_of(planner, pool, bad=0.0, **refused) as loader,
            pytest.raises(UserError, match="1 of 6 samples could not be read.*DALI cannot decode it"),
        ):
            epoch(loader)


@pytest.mark.parametrize("graphs", [1, 3])
def test_leaving_while_dali_has_refused_batches_under_way(manifest: Manifest, graphs: int) -> None:
    """They are given up with the iteration, and the next one finds its own.

    Every second batch is refused, so with three graphs each of them meets refused batches.
    """
    planner = FixedPlanner([planner_of(manifest).plan(i, 0) for i in range(16)])
    sizes = {"global_batch": 2, "micro_batch": 2, "collect": odd_collectors.collect_with_refused_pairs}
    sizes["graphs"] = graphs
    with WorkerPool(workers=1, timeout_s=60) as pool, loader_of(planner, pool, **sizes) as loader:
        for taken in (1, 3, 5):
            for _ in zip(range(taken), loader, strict=False):
                pass
            batches = list(loader)
            ids = [i for batch in batches for i in batch.sample_ids.tolist()]
            valid = [v for batch in batches for v in batch.valid.tolist()]
            assert ids == list(range(16))
            assert valid == [i % 4 < 2 for i in ids]
