"""Which samples form which batch: the same for any number of ranks, none lost, none twice."""

import numpy as np
import pytest

from avion_dali.contracts import UserError
from avion_dali.data.order import BatchSchedule, epoch_order

RECORDED = [[0, 7, 8, 6, 9, 5, 1, 3, 2, 4], [0, 1, 8, 9, 4, 5, 3, 7, 6, 2]]
LAYOUTS = [(1, 8), (1, 4), (1, 1), (2, 4), (2, 2), (2, 1), (4, 2), (4, 1), (8, 1)]  # (ranks, micro-batch)


def global_batch(
    step: int, *, world_size: int, micro_batch: int, num_samples: int, training: bool, seed: int = 3
) -> list[list[int]]:
    """Ids of one global batch of 8, one list for every rank and micro-batch, in order."""
    lists = []
    for rank in range(world_size):
        schedule = BatchSchedule(
            num_samples=num_samples,
            global_batch=8,
            micro_batch=micro_batch,
            rank=rank,
            world_size=world_size,
            seed=seed,
            training=training,
        )
        lists += [schedule.micro_batch_ids(step, micro)[1].tolist() for micro in range(schedule.accum_steps)]
    return lists


@pytest.mark.parametrize("num_samples", [1, 2, 37, 1000])
def test_an_epoch_is_a_permutation(num_samples: int) -> None:
    order = epoch_order(num_samples, seed=0, epoch=0)
    assert order.dtype == np.int32
    assert sorted(order.tolist()) == list(range(num_samples))


def test_every_epoch_and_seed_has_another_order() -> None:
    orders = {
        tuple(epoch_order(200, seed=seed, epoch=epoch).tolist()) for seed in range(3) for epoch in range(10)
    }
    assert len(orders) == 30
    assert tuple(range(200)) not in orders


def test_order_is_the_same_after_others_were_asked_for() -> None:
    first = epoch_order(100, seed=1, epoch=0).tolist()
    for epoch in range(1, 6):
        epoch_order(100, seed=1, epoch=epoch)
    assert epoch_order(100, seed=1, epoch=0).tolist() == first


def test_order_is_recorded_so_that_a_run_can_be_repeated_later() -> None:
    assert epoch_order(10, seed=0, epoch=0).tolist() == RECORDED[0]
    assert epoch_order(10, seed=7, epoch=3).tolist() == RECORDED[1]


def test_shuffling_favours_no_position() -> None:
    places = np.zeros((6, 6))
    for epoch in range(3000):
        places[np.arange(6), epoch_order(6, seed=0, epoch=epoch)] += 1
    assert ((places - 500) ** 2 / 500).sum() < 25 + 4 * np.sqrt(50)


def test_order_cannot_be_changed_by_a_caller() -> None:
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(10, seed=0, epoch=0)[0] = 5


def test_evaluation_keeps_the_manifest_order_in_every_epoch() -> None:
    schedule = BatchSchedule(num_samples=9, global_batch=4, micro_batch=4, seed=5, training=False)
    for epoch in (0, 4):
        drawn = [schedule.micro_batch_ids(3 * epoch + step, 0) for step in range(3)]
        assert [number for number, _ in drawn] == [epoch] * 3
        assert [ids.tolist() for _, ids in drawn] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]


@pytest.mark.parametrize("training", [True, False])
def test_ids_are_64_bit_whatever_the_order_is_kept_in(training: bool) -> None:
    schedule = BatchSchedule(num_samples=9, global_batch=4, micro_batch=2, training=training)
    assert schedule.micro_batch_ids(0, 1)[1].dtype == np.int64


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("num_samples", [16, 19, 23])
def test_a_global_batch_is_the_same_for_any_world(num_samples: int, training: bool) -> None:
    one = BatchSchedule(num_samples=num_samples, global_batch=8, micro_batch=8, seed=3, training=training)
    for step in range(3 * one.steps_per_epoch):
        epoch, ids = one.micro_batch_ids(step, 0)
        position = step % one.steps_per_epoch * 8
        whole = epoch_order(num_samples, seed=3, epoch=epoch) if training else np.arange(num_samples)
        assert ids.tolist() == whole[position : position + 8].tolist()
        for world_size, micro_batch in LAYOUTS:
            lists = global_batch(
                step,
                world_size=world_size,
                micro_batch=micro_batch,
                num_samples=num_samples,
                training=training,
            )
            assert sum(lists, []) == ids.tolist()  # in the same order too: gathered rows line up


@pytest.mark.parametrize(("world_size", "micro_batch"), LAYOUTS)
def test_training_micro_batches_are_always_full(world_size: int, micro_batch: int) -> None:
    for step in range(6):
        lists = global_batch(
            step, world_size=world_size, micro_batch=micro_batch, num_samples=19, training=True
        )
        assert {len(ids) for ids in lists} == {micro_batch}


@pytest.mark.parametrize(("world_size", "micro_batch"), LAYOUTS)
@pytest.mark.parametrize("num_samples", [1, 3, 8, 9, 16, 23])
def test_evaluation_loses_and_repeats_nothing(num_samples: int, world_size: int, micro_batch: int) -> None:
    steps = -(-num_samples // 8)
    seen: list[int] = []
    for step in range(steps):
        for ids in global_batch(
            step, world_size=world_size, micro_batch=micro_batch, num_samples=num_samples, training=False
        ):
            seen += ids
    assert seen == list(range(num_samples))


def test_training_drops_the_last_partial_batch() -> None:
    schedule = BatchSchedule(num_samples=21, global_batch=8, micro_batch=4)
    assert (schedule.steps_per_epoch, schedule.accum_steps) == (2, 2)
    left_out = []
    for epoch in range(4):
        steps = range(epoch * 2, epoch * 2 + 2)
        drawn = [schedule.micro_batch_ids(step, micro) for step in steps for micro in range(2)]
        assert {e for e, _ in drawn} == {epoch}
        kept = np.concatenate([ids for _, ids in drawn]).tolist()
        assert len(set(kept)) == len(kept) == 16
        left_out.append(frozenset(range(21)) - frozenset(kept))
    assert len(set(left_out)) == 4  # others each epoch


def test_evaluation_counts_the_partial_batch_and_drops_none() -> None:
    schedule = BatchSchedule(num_samples=21, global_batch=8, micro_batch=4, training=False)
    assert schedule.steps_per_epoch == 3
    whole = BatchSchedule(num_samples=16, global_batch=8, micro_batch=4, training=False)
    assert whole.steps_per_epoch == 2


@pytest.mark.parametrize(("world_size", "micro_batch"), [(3, 2), (1, 3), (2, 8), (16, 1)])
def test_sizes_that_do_not_divide_name_both_keys(world_size: int, micro_batch: int) -> None:
    with pytest.raises(UserError, match=r"`global_batch` = 8 .* `micro_batch`") as caught:
        BatchSchedule(num_samples=100, global_batch=8, micro_batch=micro_batch, world_size=world_size)
    assert f"{micro_batch} x {world_size}" in str(caught.value)


def test_too_few_samples_name_the_key_and_the_count() -> None:
    with pytest.raises(UserError, match=r"7 samples.*`global_batch`"):
        BatchSchedule(num_samples=7, global_batch=8, micro_batch=4)
    with pytest.raises(UserError, match="0 samples"):
        BatchSchedule(num_samples=0, global_batch=8, micro_batch=4, training=False)
    assert BatchSchedule(num_samples=7, global_batch=8, micro_batch=4, training=False).steps_per_epoch == 1


@pytest.mark.parametrize("world_size", [1, 2])
def test_several_clips_per_sample_are_counted_apart_from_samples(world_size: int) -> None:
    schedules = [
        BatchSchedule(3, 8, 8 // world_size, rank, world_size, training=False, clips_per_sample=5)
        for rank in range(world_size)
    ]
    assert {(s.num_samples, s.num_clips, s.steps_per_epoch) for s in schedules} == {(3, 15, 2)}
    drawn = [s.micro_batch_ids(step, 0)[1].tolist() for step in range(2) for s in schedules]
    assert sum(drawn, []) == list(range(15))
    with pytest.raises(ValueError, match="one clip per sample, not 5"):
        BatchSchedule(30, 8, 8, clips_per_sample=5)
