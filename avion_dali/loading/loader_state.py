"""The position of an iteration as plain values, for any number of workers and ranks and any decoder."""

from __future__ import annotations

from collections.abc import Mapping

from avion_dali.contracts import UserError
from avion_dali.data.order import BatchSchedule

State = dict[str, int | bool]

_MOST_SIZES_NAMED = 8


def state_at(number: int, schedule: BatchSchedule, *, fingerprint: int) -> State:
    """Describe the position before a micro-batch.

    Args:
        number: number of a rank's next micro-batch, counted over all epochs.
        schedule: assigns clips to batches.
        fingerprint: fingerprint of the manifest.

    Returns:
        The epoch, the number of its clips that all ranks together have consumed, the facts that must agree when
        the state is loaded, and the sizes of batches, which matter only within an optimizer step.
    """
    step, micro = divmod(number, schedule.accum_steps)
    epoch, step_of_epoch = divmod(step, schedule.steps_per_epoch)
    per_micro = schedule.micro_batch * schedule.world_size
    return {
        "epoch": epoch,
        "clips_consumed": step_of_epoch * schedule.global_batch + micro * per_micro,
        **_facts(schedule, fingerprint),
        **_sizes(schedule),
    }


def position_of(state: Mapping[str, int | bool], schedule: BatchSchedule, *, fingerprint: int) -> int:
    """Return the number of this rank's next micro-batch, counted over all epochs.

    Args:
        state: from `state_at`, with a schedule that may have other sizes and ranks.
        schedule: assigns clips to batches from now on.
        fingerprint: fingerprint of the manifest.

    Raises:
        UserError: when the state belongs to other clips, or its position is within a batch of this schedule.
    """
    facts, sizes = _facts(schedule, fingerprint), _sizes(schedule)
    missing = sorted({"epoch", "clips_consumed", *facts, *sizes} - state.keys())
    if missing:
        raise UserError(f"this is not the state of a clip loader: {', '.join(missing)} missing")
    for name, value in facts.items():
        if state[name] != value:
            raise UserError(
                f"the state belongs to a loader with {name} = {state[name]}, but this loader has {value} and "
                "would deliver other clips; open it with the same manifest and settings"
            )
    consumed, per_micro = state["clips_consumed"], schedule.micro_batch * schedule.world_size
    first_step = state["epoch"] * schedule.steps_per_epoch
    if consumed % state["global_batch"]:
        # Ranks take contiguous parts of a step: clips consumed within one are no prefix of the epoch's order.
        if sizes != {name: state[name] for name in sizes}:
            was = ", ".join(f"{name} = {state[name]}" for name in sizes)
            raise UserError(
                f"the state was saved between the micro-batches of one step and fits only a loader with {was}; "
                "use these sizes, or a state saved between two steps"
            )
    elif consumed % schedule.global_batch:
        raise UserError(
            f"the state was saved after {consumed} clips of epoch {state['epoch']}, which is not a multiple of "
            f"this loader's global batch, {schedule.global_batch}; {_sizes_that_fit(consumed, schedule)}"
        )
    step, rest = divmod(consumed, schedule.global_batch)
    return (first_step + step) * schedule.accum_steps + rest // per_micro


def _facts(schedule: BatchSchedule, fingerprint: int) -> State:
    return {
        "seed": schedule.seed,
        "manifest_fingerprint": fingerprint,
        "training": schedule.training,
        "num_samples": schedule.num_samples,
        "clips_per_sample": schedule.clips_per_sample,
    }


def _sizes(schedule: BatchSchedule) -> State:
    return {
        "global_batch": schedule.global_batch,
        "micro_batch": schedule.micro_batch,
        "world_size": schedule.world_size,
    }


def _sizes_that_fit(consumed: int, schedule: BatchSchedule) -> str:
    ranks = schedule.world_size
    fitting = [size for size in range(ranks, consumed + 1, ranks) if consumed % size == 0]
    if not fitting:
        return f"no global batch fits {ranks} ranks; use another number of ranks"
    nearest = sorted(fitting, key=lambda size: abs(size - schedule.global_batch))[:_MOST_SIZES_NAMED]
    return f"global batches that fit {ranks} rank{'s' * (ranks > 1)}: {', '.join(map(str, sorted(nearest)))}"
