"""States of a loader as plain numbers: they fit any sizes that can go on exactly, and name those that do."""

import pytest

from avion_dali.contracts import UserError
from avion_dali.data.order import BatchSchedule
from avion_dali.loading.loader_state import position_of, state_at

FINGERPRINT = 77


def schedule_of(global_batch: int, micro_batch: int, **others: int | bool) -> BatchSchedule:
    sizes = {"num_samples": 100, "global_batch": global_batch, "micro_batch": micro_batch} | others
    return BatchSchedule(**sizes)


def moved(number: int, old: BatchSchedule, new: BatchSchedule) -> int:
    return position_of(state_at(number, old, fingerprint=FINGERPRINT), new, fingerprint=FINGERPRINT)


@pytest.mark.parametrize("accum", [1, 2, 4])
@pytest.mark.parametrize("training", [True, False])
def test_every_position_is_found_again(accum: int, training: bool) -> None:
    schedule = schedule_of(8, 8 // accum, training=training)
    for number in range(3 * schedule.steps_per_epoch * accum):
        assert moved(number, schedule, schedule) == number


def test_a_state_holds_plain_numbers() -> None:
    assert state_at(27, schedule_of(8, 2, world_size=2), fingerprint=FINGERPRINT) == {
        "epoch": 1,
        "clips_consumed": 12,
        "seed": 0,
        "manifest_fingerprint": 77,
        "training": True,
        "num_samples": 100,
        "clips_per_sample": 1,
        "global_batch": 8,
        "micro_batch": 2,
        "world_size": 2,
    }


def test_positions_move_to_other_sizes() -> None:
    old = schedule_of(8, 4)  # 12 steps per epoch, 2 micro-batches each
    assert moved(24 + 6, old, schedule_of(6, 6)) == 16 + 4
    assert moved(24 + 6, old, schedule_of(24, 6, world_size=2)) == 8 + 2
    assert moved(24, old, schedule_of(7, 7)) == 14  # an epoch's begin fits any size
    # 90 of 100 consumed, and one global batch of 45 no more than twice in an epoch: the next epoch begins.
    assert moved(9, schedule_of(10, 10), schedule_of(45, 45)) == 2


def test_a_position_within_a_batch_names_the_sizes_that_fit() -> None:
    old = schedule_of(4, 4)
    with pytest.raises(
        UserError, match="after 12 clips of epoch 0.*global batch, 8; .*1 rank: 1, 2, 3, 4, 6, 12"
    ):
        moved(3, old, schedule_of(8, 8))
    with pytest.raises(UserError, match=r"fit 2 ranks: 2, 4, 6, 12$"):
        moved(3, old, schedule_of(8, 4, world_size=2))
    with pytest.raises(UserError, match="no global batch fits 5 ranks"):
        moved(3, old, schedule_of(10, 2, world_size=5))


def test_a_position_within_a_step_fits_the_same_sizes_only() -> None:
    """Two ranks with two micro-batches each have consumed 0, 1 and 4, 5 of a step: no other order has that."""
    old = schedule_of(8, 2, world_size=2)
    assert moved(5, old, schedule_of(8, 2, world_size=2, rank=1)) == 5
    for new in (schedule_of(4, 4), schedule_of(8, 2), schedule_of(8, 4, world_size=2)):
        with pytest.raises(
            UserError, match="only a loader with global_batch = 8, micro_batch = 2, world_size = 2;"
        ):
            moved(5, old, new)


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", 3), ("num_samples", 99), ("training", False)],
)
def test_other_clips_are_refused(name: str, value: int) -> None:
    with pytest.raises(UserError, match=f"{name} = .*, but this loader has {value}"):
        moved(1, schedule_of(8, 8), schedule_of(8, 8, **{name: value}))
    evaluated = schedule_of(8, 8, training=False, clips_per_sample=2)
    with pytest.raises(UserError, match="clips_per_sample = 2, but this loader has 1"):
        moved(1, evaluated, schedule_of(8, 8, training=False))


def test_another_manifest_and_another_dictionary_are_refused() -> None:
    schedule = schedule_of(8, 8)
    state = state_at(1, schedule, fingerprint=1)
    with pytest.raises(UserError, match="manifest_fingerprint = 1, but this loader has 2"):
        position_of(state, schedule, fingerprint=2)
    with pytest.raises(UserError, match="loader: clips_consumed, clips_per_sample, epoch"):
        position_of({}, schedule, fingerprint=1)


NO_COUNTS = (-1, 1.5, float("nan"), None, "1", True)


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("epoch", "clips_consumed") for value in NO_COUNTS]
    + [("clips_consumed", 100), ("clips_consumed", 10**9), ("global_batch", 0), ("micro_batch", "x")],
)
def test_numbers_that_no_loader_wrote_are_refused(name: str, value: object) -> None:
    schedule = schedule_of(8, 8)
    state = state_at(1, schedule, fingerprint=FINGERPRINT) | {name: value}
    with pytest.raises(UserError, match=f"`{name}` of the state = {value!r} is not allowed"):
        position_of(state, schedule, fingerprint=FINGERPRINT)


@pytest.mark.parametrize("state", [None, [("epoch", 0)], "epoch"])
def test_what_is_no_dictionary_is_refused(state: object) -> None:
    with pytest.raises(UserError, match="`state` = .* must be what `state_dict` returned"):
        position_of(state, schedule_of(8, 8), fingerprint=FINGERPRINT)
