"""Stops a run between two steps when it receives a signal, on all ranks after the same step.

SIGTERM (cluster managers, `kill`) and SIGUSR1 or SIGUSR2 (SLURM's warning before preemption or the time limit)
are recorded; the loop saves at the end of the next step and stops. A second SIGTERM ends the process
immediately.
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
    """Return the exit status of a run that was saved and then stopped by a signal.

    Args:
        stopped_by: name of the signal; empty if the run reached its end.

    Returns:
        143 for SIGTERM, as for any process that it ends, so that scripts can detect an unfinished run. 0 for
        SIGUSR1 and SIGUSR2, which a scheduler sends to a job that it will start again.
    """
    return 128 + signal.SIGTERM if stopped_by == "SIGTERM" else 0


class StopSignals:
    """Records the first stop signal that arrives inside a `with` block, and then restores the old handlers.

    Python delivers signals only to the main thread; in other threads the block does nothing.
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
            # None means that the handler was not set from Python and cannot be restored.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)


class RankVotes:
    """Lets all ranks act at the same step on a request of any of them.

    Each exchange sends a few numbers while the next step computes, and returns the maxima over ranks of the
    previous exchange. No rank waits, but all ranks act one step later. The cost is one message of a few bytes
    per step between the hosts (gloo; GPUs are not involved).
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._pending: tuple[Any, torch.Tensor] | None = None
        self._group: Any = dist.new_group(backend="gloo") if dist.is_initialized() else None

    def exchange(self, values: Sequence[int]) -> list[int]:
        """Send this rank's values and return the maxima over ranks; every rank must call it equally often.

        Args:
            values: `count` numbers >= 0; 0 means no request.

        Returns:
            The maxima over ranks of the previous call (zeros at first); in a single process, `values`.
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
