"""Ends this process when another rank has died, even while this process is blocked in a call.

If a rank was killed or stopped, or its machine lost power, the other ranks wait for it, often in a call that no
exception can interrupt. Therefore a thread on every rank increments a counter in the store of the process group
and reads the counters of the others. A counter that does not change means that its rank no longer runs. A rank
that is busy (saving, evaluating, compiling) continues to count, so the limit can be short. If such a rank never
arrives at a collective, the time-out of the collective ends the run.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from types import TracebackType

import torch.distributed as dist

LIMIT_S = 25.0
"""Seconds after which an unchanged counter means a dead rank. After the first rank ends, torchrun gives the
others 30 s; together that is less than a minute."""
INTERVAL_S = 2.0
_STORE_TIMEOUT_S = 5.0
_DONE = "done"


def end_process(message: str) -> None:
    """Print the cause and end the process without clean-up, because other threads may be blocked forever.

    Args:
        message: the cause.
    """
    with suppress(OSError):
        sys.stderr.write(f"error: {message}\n")
        sys.stderr.flush()
    os._exit(1)


class Heartbeat:
    """Watches the other ranks inside a `with` block.

    Args:
        rank: rank of this process.
        world_size: number of processes.
        limit_s: seconds without a change of its counter after which a rank is considered dead.
        interval_s: seconds between two readings.
        on_loss: called with the cause, in the watching thread.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        *,
        limit_s: float = LIMIT_S,
        interval_s: float = INTERVAL_S,
        on_loss: Callable[[str], None] = end_process,
    ) -> None:
        self.rank, self.limit_s, self.interval_s, self.on_loss = rank, limit_s, interval_s, on_loss
        # A restart by torchrun uses the same store, so the old counters must be ignored.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._keys = [f"avion_dali/heartbeat/{attempt}/{other}" for other in range(world_size)]
        self._place = f"{socket.gethostname()}, process {os.getpid()}"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        # A separate connection, because that of the process group would block this thread while it waits.
        self._store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=_STORE_TIMEOUT_S),
        )
        self._say("0")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(timeout=2 * _STORE_TIMEOUT_S)
        if kind is None:
            with suppress(RuntimeError):  # the rank that hosts the store may have left already
                self._say(_DONE)

    def _say(self, count: str) -> None:
        self._store.set(self._keys[self.rank], f"{count} {self._place}")

    def _watch(self) -> None:
        count, answered = 0, time.monotonic()
        known: dict[int, tuple[str, float]] = {}
        while not self._ended.wait(self.interval_s):
            count += 1
            try:
                self._say(str(count))
                values = [value.decode() for value in self._store.multi_get(self._keys)]
            except RuntimeError:  # a rank has not started yet, or the store is gone
                if time.monotonic() - answered > self.limit_s:
                    self.on_loss(
                        "the first machine of the run no longer answers; its console may show the reason. "
                        "Start again to continue from the last checkpoint"
                    )
                continue
            answered = time.monotonic()
            for other, value in enumerate(values):
                if other not in known or known[other][0] != value:
                    known[other] = value, answered
            self._judge(known, answered)

    def _judge(self, known: dict[int, tuple[str, float]], now: float) -> None:
        for other, (value, since) in known.items():
            count, _, place = value.partition(" ")
            if count != _DONE and now - since > self.limit_s:
                if self.rank == 0:  # it may host the store, so the other ranks must detect the loss first
                    time.sleep(2 * self.interval_s)
                self.on_loss(
                    f"rank {other} ({place}) has not responded for {now - since:.0f} s: its process was killed "
                    "or stopped, or its machine is unreachable. Start again to continue from the last "
                    "checkpoint"
                )
