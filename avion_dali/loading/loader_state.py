"""The position of an iteration as plain values, for any number of workers and ranks and any decoder."""

from __future__ import annotations

from collections.abc import Mapping

from avion_dali.config.checks import require, require_integer
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
        UserError: when it is no state, belongs to other clips, or its position is within a batch of this
            schedule.
    """
    require(isinstance(state, Mapping), "`state`", value=state, allowed="what `state_dict` returned")
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
    _require_position(state, schedule)
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


def _require_position(state: Mapping[str, int | bool], schedule: BatchSchedule) -> None:
    """Refuse numbers that no loader of these clips can have written."""
    for name in _sizes(schedule):
        require_integer(state[name], f"`{name}` of the state", least=1)
    require_integer(state["epoch"], "`epoch` of the state", least=0)
    clips, per_step = schedule.num_clips, state["global_batch"]
    # The last step of an evaluation counts as full, although ranks may have nothing left to read in it.
    below = clips if schedule.training else -(-clips // per_step) * per_step
    require_integer(state["clips_consumed"], "`clips_consumed` of the state", least=0, below=below)


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
