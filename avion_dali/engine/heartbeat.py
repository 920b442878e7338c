"""Ends this process when another rank has died, wherever this one is waiting.

A rank that was killed, a machine that lost power and a process that was stopped look the same to the others:
they wait, often inside a call that no exception can interrupt. So a thread on every rank increments a number in
the store of the process group, and reads those of the others. A number that stands still means that nothing
runs there any more. A rank that is alive and busy (saving, evaluating, compiling) keeps counting, so the limit
can be short; if it never arrives at a collective, the time-out of the collective ends the run.
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
"""How long a number may stand still. torchrun, told by the first rank that ends, gives the others 30 s more:
together that is less than a minute."""
INTERVAL_S = 2.0
_STORE_TIMEOUT_S = 5.0
_DONE = "done"


def end_process(message: str) -> None:
    """Print the cause and end without clean-up: other threads may be blocked for ever.

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
        rank: this process.
        world_size: how many processes there are.
        limit_s: seconds without a sign of life after which a rank counts as dead.
        interval_s: seconds between two readings.
        on_loss: called with the cause, from the thread.
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
        # A restart by torchrun uses the same store: the old numbers must not count.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._keys = [f"avion_dali/heartbeat/{attempt}/{other}" for other in range(world_size)]
        self._place = f"{socket.gethostname()}, process {os.getpid()}"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        # A separate connection: that of the process group blocks while it waits, and would block this thread.
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
            with suppress(RuntimeError):  # the store's keeper may have left already
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
            except RuntimeError:  # some rank has not begun yet, or the store is gone
                if time.monotonic() - answered > self.limit_s:
                    self.on_loss(
                        "the first machine of the run does not answer any more; see its console for why. "
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
                if self.rank == 0:  # it may keep the store: let the others see for themselves first
                    time.sleep(2 * self.interval_s)
                self.on_loss(
                    f"rank {other} ({place}) has not given a sign of life for {now - since:.0f} s: its process "
                    "was killed or stopped, or its machine is out of reach. Start again to continue from the "
                    "last checkpoint"
                )
