"""`for batch in loader`: epoch after epoch, safe to leave anywhere, and resumed at exactly the next batch."""

import gc
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import make_videos
import numpy as np
import pytest
import torch
from dali_clips import VP9, chunk_manifest, decoded, draw_soft, loader_of, planner_of

from avion_dali.contracts import ClipBatch, UserError
from avion_dali.data.manifest import Manifest
from avion_dali.data.order import epoch_order
from avion_dali.loading.clip_loader import ClipLoader
from avion_dali.loading.pool import WorkerPool

ROWS = 22
TRAINING = {"training": True, "global_batch": 4, "micro_batch": 2}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """22 clips of two VP9 chunks."""
    folder = tmp_path_factory.mktemp("iteration")
    how = {"frames": 60, "size": (96, 80), "draw": draw_soft, **VP9}
    paths = [make_videos.write_video(folder / f"{i}.mp4", first_number=60 * i, **how) for i in range(2)]
    return chunk_manifest(folder / "m", dict.fromkeys(paths, tuple(i / 10 for i in range(ROWS // 2))))


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(workers=2, timeout_s=60) as pool:
        yield pool


@pytest.fixture(params=["cpu-fused", "dali"])
def decoder(request: pytest.FixtureRequest) -> str:
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")
    return request.param


@pytest.fixture
def loader(manifest: Manifest, pool: WorkerPool, decoder: str) -> Iterator[ClipLoader]:
    """Five steps per epoch, each of two micro-batches of two clips; two clips are dropped."""
    with loader_of(planner_of(manifest), pool, decoder=decoder, **TRAINING) as loader:
        yield loader


def ids_of(batches: list[ClipBatch]) -> list[list[int]]:
    return [[batch.epoch, *batch.sample_ids.tolist()] for batch in batches]


def expected_ids(loader: ClipLoader, epoch: int) -> list[list[int]]:
    steps, accum = loader.steps_per_epoch, loader.accum_steps
    places = itertools.product(range(epoch * steps, (epoch + 1) * steps), range(accum))
    drawn = [loader.schedule.micro_batch_ids(step, micro) for step, micro in places]
    return [[number, *ids.tolist()] for number, ids in drawn]


def assert_own_frames(batches: list[ClipBatch], manifest: Manifest, *, training: bool = True) -> None:
    """The frames of each row are those of the sample that the batch names; DALI's are close to them."""
    planner = planner_of(manifest, training=training)
    for batch in batches:
        for row, sample_id in enumerate(batch.sample_ids.tolist()):
            right = torch.from_numpy(decoded(planner.plan(sample_id, batch.epoch))[0])
            difference = (batch.frames_BTHWC[row].float() - right.float()).abs().mean()
            assert difference < 2, (sample_id, batch.epoch)


def test_each_pass_is_the_next_epoch(loader: ClipLoader, manifest: Manifest) -> None:
    assert len(loader) == 10
    for epoch in range(3):
        batches = list(loader)
        assert ids_of(batches) == expected_ids(loader, epoch)
        assert_own_frames(batches, manifest)
    loader.set_epoch(1)
    assert ids_of(list(loader)) == expected_ids(loader, 1)
    assert ids_of(list(loader)) == expected_ids(loader, 2)
    assert loader.stats.delivered == 5 * 20
    loader.set_epoch(np.int64(7))
    for epoch in (-1, 1.5, "1", None):
        with pytest.raises(UserError, match="`epoch` = .* a whole number >= 0"):
            loader.set_epoch(epoch)
    assert loader.state_dict()["epoch"] == 7


@pytest.mark.parametrize("taken", [1, 2, 7, 9])
def test_an_epoch_left_by_break_begins_anew(loader: ClipLoader, manifest: Manifest, taken: int) -> None:
    for _ in range(3):
        for number, _batch in enumerate(loader, start=1):
            if number == taken:
                break
    whole = list(loader)
    assert ids_of(whole) == expected_ids(loader, 0)
    assert_own_frames(whole, manifest)


def test_a_break_at_the_last_batch_ends_the_epoch(loader: ClipLoader) -> None:
    for number, _batch in enumerate(loader, start=1):
        if number == len(loader):
            break
    assert ids_of(list(loader)) == expected_ids(loader, 1)


def test_an_error_in_the_loops_body_leaves_the_loader_usable(loader: ClipLoader, manifest: Manifest) -> None:
    with pytest.raises(ZeroDivisionError) as caught:  # its traceback keeps the iteration alive
        for batch in loader:
            assert 1 // batch.epoch
    whole = list(loader)
    assert caught.value
    assert ids_of(whole) == expected_ids(loader, 0)
    assert_own_frames(whole, manifest)


def test_a_new_iteration_ends_the_former_one(loader: ClipLoader, manifest: Manifest) -> None:
    inner: list[ClipBatch] = []
    with pytest.raises(RuntimeError, match="another iteration of the same loader has started"):
        for _batch in loader:
            inner += loader
    assert ids_of(inner) == expected_ids(loader, 0)
    first, second = iter(loader), iter(loader)
    with pytest.raises(RuntimeError, match="another iteration"):
        next(first)
    rest = list(second)
    assert ids_of(rest) == expected_ids(loader, 1)
    assert_own_frames([*inner, *rest], manifest)


def test_a_collected_iteration_does_not_disturb_the_next(loader: ClipLoader, manifest: Manifest) -> None:
    left = iter(loader)
    next(left)
    current = iter(loader)
    batches = [next(current)]
    del left
    gc.collect()
    batches += current
    assert ids_of(batches) == expected_ids(loader, 0)
    assert_own_frames(batches, manifest)


def test_closing_twice_and_no_iteration_after_it(loader: ClipLoader) -> None:
    batches = iter(loader)
    next(batches)
    loader.close()
    loader.close()
    for left in (batches, iter(loader)):
        with pytest.raises(RuntimeError, match="closed"):
            next(left)


def test_evaluation_keeps_the_order_and_drops_nothing(
    manifest: Manifest, pool: WorkerPool, decoder: str
) -> None:
    with loader_of(
        planner_of(manifest, training=False), pool, decoder=decoder, global_batch=5, micro_batch=5
    ) as loader:
        for _ in range(2):
            assert [i for batch in loader for i in batch.sample_ids.tolist()] == list(range(ROWS))
        assert len(loader) == 5
        next(iter(loader))
        again = list(loader)
    assert [len(batch) for batch in again] == [5, 5, 5, 5, 2]
    assert_own_frames(again, manifest, training=False)


def taken_state(loader: ClipLoader, count: int) -> tuple[dict, list[list[int]]]:
    """The state after some batches, through JSON, and the ids of the rest of the epoch."""
    batches = iter(loader)
    for _ in range(count):
        next(batches)
    state = json.loads(json.dumps(loader.state_dict()))
    return state, ids_of(list(batches))


@pytest.mark.parametrize("taken", [0, 1, 4, 9])
def test_a_state_leads_to_exactly_the_next_batch(
    loader: ClipLoader, manifest: Manifest, decoder: str, taken: int
) -> None:
    list(loader)
    state, rest = taken_state(loader, taken)
    assert (state["epoch"], state["clips_consumed"]) == (1, 2 * taken)
    other = "dali" if decoder == "cpu-fused" else "cpu-fused"
    if other == "dali":
        pytest.importorskip("nvidia.dali")
    with (
        WorkerPool(workers=1, timeout_s=60) as pool,
        loader_of(planner_of(manifest), pool, decoder=other, **TRAINING) as resumed,
    ):
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        resumed.set_epoch(1)  # the usual call at an epoch's begin does not lose the place within it
        batches = list(resumed)
        assert ids_of(batches) == rest
        assert_own_frames(batches, manifest)
        assert ids_of(list(resumed)) == expected_ids(resumed, 2)


def test_a_state_after_the_last_batch_is_the_next_epochs_begin(loader: ClipLoader) -> None:
    for _batch in loader:
        state = loader.state_dict()
    assert (state["epoch"], state["clips_consumed"]) == (1, 0)
    loader.set_epoch(5)
    loader.load_state_dict(state)
    assert ids_of(list(loader)) == expected_ids(loader, 1)


def test_a_state_reflects_what_was_handed_out_before_a_break(loader: ClipLoader) -> None:
    for _ in zip(range(3), loader, strict=False):
        pass
    for _ in itertools.islice(loader, 3):
        pass
    state = loader.state_dict()
    assert (state["epoch"], state["clips_consumed"]) == (0, 6)


@pytest.mark.parametrize(("ranks", "size"), [(2, 4), (4, 8), (1, 8), (1, 2)])
def test_a_state_fits_other_ranks_and_batches(
    loader: ClipLoader, manifest: Manifest, pool: WorkerPool, decoder: str, ranks: int, size: int
) -> None:
    """Two steps of four clips: the other twelve follow, whoever delivers them."""
    state, rest = taken_state(loader, 4)
    seen: list[int] = []
    for rank in range(ranks):
        sizes = {
            "training": True,
            "global_batch": size,
            "micro_batch": size // ranks,
            "rank": rank,
            "world_size": ranks,
        }
        with loader_of(planner_of(manifest), pool, decoder=decoder, **sizes) as resumed:
            resumed.load_state_dict(state)
            batches = list(resumed)
            assert {batch.epoch for batch in batches} == {0}
            seen += [i for batch in batches for i in batch.sample_ids.tolist()]
            assert ids_of([next(iter(resumed))]) == expected_ids(resumed, 1)[:1]
    order = epoch_order(ROWS, seed=5, epoch=0).tolist()
    assert [i for _, *ids in rest for i in ids] == order[8:20]
    assert sorted(seen) == sorted(order[8 : ROWS // size * size])


def test_a_state_of_other_clips_names_what_differs(
    loader: ClipLoader, manifest: Manifest, pool: WorkerPool, tmp_path: Path
) -> None:
    state = loader.state_dict()
    with (
        loader_of(planner_of(manifest), pool, decoder="cpu-fused", **TRAINING | {"seed": 6}) as other,
        pytest.raises(UserError, match="seed = 5, but this loader has 6"),
    ):
        other.load_state_dict(state)
    path = make_videos.write_video(tmp_path / "a.mp4", frames=60)
    shorter = chunk_manifest(tmp_path / "m", {path: (0.0, 0.1, 0.2, 0.3)})
    with (
        loader_of(planner_of(shorter), pool, decoder="cpu-fused", **TRAINING) as other,
        pytest.raises(UserError, match="manifest_fingerprint = "),
    ):
        other.load_state_dict(state)
    with pytest.raises(UserError, match="not the state of a clip loader: .* missing"):
        loader.load_state_dict({"step": 3})
