"""Where an iteration stands, as plain values that fit any number of workers and ranks, and any decoder."""

from __future__ import annotations

from collections.abc import Mapping

from avion_dali.contracts import UserError
from avion_dali.data.order import BatchSchedule

State = dict[str, int | bool]

_MOST_SIZES_NAMED = 8


def state_at(number: int, schedule: BatchSchedule, *, fingerprint: int) -> State:
    """Describe the position before a micro-batch.

    Args:
        number: which micro-batch of a rank comes next, counted over all epochs.
        schedule: what forms batches.
        fingerprint: of the manifest.

    Returns:
        The epoch, the clips of it that all ranks together have consumed, what must agree when the state is used
        again, and the sizes of batches, which matter only within an optimizer step.
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
    """Return which micro-batch of this rank comes next, counted over all epochs.

    Args:
        state: from `state_at`, of a schedule that may have other sizes and ranks.
        schedule: what forms batches now.
        fingerprint: of the manifest.

    Raises:
        UserError: when the state belongs to other clips, or its position lies within a batch of this schedule.
    """
    facts, sizes = _facts(schedule, fingerprint), _sizes(schedule)
    missing = sorted({"epoch", "clips_consumed", *facts, *sizes} - state.keys())
    if missing:
        raise UserError(f"this is not the state of a clip loader: it lacks {', '.join(missing)}")
    for name, value in facts.items():
        if state[name] != value:
            raise UserError(
                f"the state was taken from a loader with {name} = {state[name]}, and this one has {value}: it "
                "would deliver other clips; open it with the same manifest and settings"
            )
    consumed, per_micro = state["clips_consumed"], schedule.micro_batch * schedule.world_size
    first_step = state["epoch"] * schedule.steps_per_epoch
    if consumed % state["global_batch"]:
        # The ranks' shares are contiguous: what was consumed within a step is no prefix of the epoch's order.
        if sizes != {name: state[name] for name in sizes}:
            was = ", ".join(f"{name} = {state[name]}" for name in sizes)
            raise UserError(
                f"the state was taken between the micro-batches of one step and fits a loader with {was} only; "
                "use that, or a state taken between two steps"
            )
    elif consumed % schedule.global_batch:
        raise UserError(
            f"the state was taken after {consumed} clips of epoch {state['epoch']}, which is no multiple of "
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
        return f"no global batch fits {ranks} ranks, take another number of them"
    nearest = sorted(fitting, key=lambda size: abs(size - schedule.global_batch))[:_MOST_SIZES_NAMED]
    return f"global batches that fit {ranks} rank{'s' * (ranks > 1)}: {', '.join(map(str, sorted(nearest)))}"
