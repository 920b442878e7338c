"""Ends a run between two steps when the system asks for it, on all ranks after the same step.

SIGTERM (cluster managers, `kill`) and SIGUSR1 or SIGUSR2 (SLURM's warning before preemption or the time limit)
are recorded; the loop saves at the end of the next step and stops. A second SIGTERM ends the process at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)


def exit_status(stopped_by: str) -> int:
    """Return the exit status of a run that was saved and then ended by a signal.

    Args:
        stopped_by: the signal's name; empty when the run reached its end.

    Returns:
        143 for SIGTERM, as for any process that it ends, so that a script does not take an unfinished run for a
        finished one. 0 for SIGUSR1 and SIGUSR2, which a scheduler sends to a job that it will start again.
    """
    return 128 + signal.SIGTERM if stopped_by == "SIGTERM" else 0


class StopSignals:
    """Records the first stop signal that arrives inside a `with` block; outside, nothing is changed.

    Python delivers signals to the main thread only; in another thread the block does nothing.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # None: a handler that was not set from Python; it cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)


class RankVotes:
    """Lets all ranks act at the same step on a request of any of them.

    Each exchange sends a few numbers while the next step computes, and returns the largest of each over ranks
    as of the exchange before: no rank waits, but all act one step later. It costs one message of some bytes per
    step between the hosts (gloo; the GPUs are not involved).
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._pending: tuple[Any, torch.Tensor] | None = None
        self._group: Any = dist.new_group(backend="gloo") if dist.is_initialized() else None

    def exchange(self, values: Sequence[int]) -> list[int]:
        """Send this rank's values and return those of all ranks; every rank must call it equally often.

        Args:
            values: `count` numbers >= 0; 0 for no request.

        Returns:
            The largest over ranks: of this call in a single process, else of the call before (zeros at first).
        """
        if self._group is None:
            return list(values)
        agreed = self._arrived()
        sent = torch.tensor(list(values), dtype=torch.int64)
        self._pending = dist.all_reduce(sent, dist.ReduceOp.MAX, group=self._group, async_op=True), sent
        return agreed

    def close(self) -> None:
        """Wait for the last message; every rank must have sent it."""
        self._arrived()

    def _arrived(self) -> list[int]:
        if self._pending is None:
            return [0] * self._count
        work, received = self._pending
        self._pending = None
        work.wait()
        return [int(value) for value in received]
