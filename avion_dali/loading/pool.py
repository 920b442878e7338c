"""The one supervised pool of decode processes.

Each clip is a task with its own time limit. A task that overruns it, or whose process dies, costs that
clip: the process is replaced and the others go on.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from pebble import ProcessExpired, ProcessPool

from avion_dali.contracts import ClipRequest, DecodeError, FailureKind, UserError
from avion_dali.cores import available_cores
from avion_dali.loading.ring import SharedRing
from avion_dali.loading.worker import DecodeClip, decode_into, start_worker

_POLL_S = 0.5
_GRACE_S = 5.0
_MAX_RESTARTS = 20


def default_workers(ranks_on_machine: int = 1) -> int:
    """Return this rank's share of the cores this process may use, at least one.

    Args:
        ranks_on_machine: training processes on this machine.
    """
    return max(1, available_cores() // ranks_on_machine)


class PoolBrokenError(Exception):
    """The pool lost its processes while a clip waited; the clip itself is not to blame."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """A clip handed to the pool.

    Args:
        future: what its task returns, or the failure.
        generation: which set of processes it was handed to.
    """

    future: Future[Any]
    generation: int


class DecodePool:
    """Decode processes shared by all loaders of a rank.

    Args:
        decode_clip: a decoder's function, importable by name.
        workers: number of processes.
        clip_timeout_s: seconds after which a clip's process is killed and replaced.
    """

    def __init__(self, decode_clip: DecodeClip, *, workers: int, clip_timeout_s: float) -> None:
        self.workers = workers
        self._decode_clip, self._timeout = decode_clip, clip_timeout_s
        self._generation, self._restarts = 0, 0
        self._last_done = time.monotonic()
        self._pool = self._start()

    def submit(self, request: ClipRequest, ring: SharedRing, offset: int) -> Ticket:
        """Queue a clip; its frames will be at `offset` of the ring's memory.

        Args:
            request: the clip.
            ring: where to write.
            offset: first byte of the clip's place.

        Returns:
            What to wait for with `wait`.

        Raises:
            UserError: when processes die one after another without decoding anything.
        """
        return self.schedule(decode_into, self._decode_clip, request, ring.name, offset)

    def schedule(self, task: Callable[..., Any], *arguments: Any) -> Ticket:
        """Queue any work on one clip.

        Args:
            task: a function importable by name.
            *arguments: what it is called with; they travel to the process.

        Returns:
            What to wait for with `wait`.

        Raises:
            UserError: when processes die one after another without decoding anything.
        """
        if not self._pool.active:
            self._restart()
        future = self._pool.schedule(task, args=arguments, timeout=self._timeout)
        future.add_done_callback(self._note_done)
        return Ticket(future, self._generation)

    def wait(self, ticket: Ticket) -> Any:
        """Wait for a clip.

        Args:
            ticket: from `submit` or `schedule`.

        Returns:
            What its task returned; for `submit` the seconds its process spent.

        Raises:
            PoolBrokenError: the processes were lost; submit the clip again.
            Exception: the clip failed; `failure_of` says how.
        """
        began = time.monotonic()
        while not ticket.future.done():
            futures.wait([ticket.future], timeout=_POLL_S)
            # A clip that a dying process took along without a word is never reported: when nothing at all
            # has finished for longer than a clip may take, something was lost.
            silent_s = time.monotonic() - max(began, self._last_done)
            lost = ticket.generation != self._generation or not self._pool.active
            if not ticket.future.done() and (lost or silent_s > self._timeout + _GRACE_S):
                if not lost:
                    self._restart()
                raise PoolBrokenError
        try:
            result = ticket.future.result()
        except BrokenProcessPool:
            raise PoolBrokenError from None
        self._restarts = 0
        return result

    def close(self) -> None:
        """Kill what is running and wait for the processes to end."""
        self._pool.stop()
        self._pool.join()

    def _start(self) -> ProcessPool:
        # Spawned, not forked: a forked child of a process that holds CUDA or threads may hang.
        return ProcessPool(
            max_workers=self.workers,
            initializer=start_worker,
            initargs=(os.getpid(),),
            context=multiprocessing.get_context("spawn"),
        )

    def _restart(self) -> None:
        """Replace all processes, after an idle one died: the pool library gives up then."""
        self.close()
        self._generation += 1
        self._restarts += 1
        if self._restarts > _MAX_RESTARTS:
            raise UserError(
                f"the decode processes died {self._restarts} times in a row; is the machine out of memory? "
                "Take fewer processes (data.workers, --jobs) or a smaller data.prefetch_batches"
            )
        self._pool = self._start()

    def _note_done(self, _: Future[Any]) -> None:
        self._last_done = time.monotonic()


def failure_of(error: Exception, request: ClipRequest) -> tuple[FailureKind, str, str, tuple[int, ...]]:
    """Describe a failed task.

    Args:
        error: what the task's future raised.
        request: the clip that was asked for.

    Returns:
        (kind, cause, path, frame ids).

    Raises:
        Exception: the error itself, when it is not one of a clip.
    """
    if isinstance(error, DecodeError):
        return error.kind, error.cause, error.path, error.frame_ids
    part = request.parts[0]
    if isinstance(error, futures.TimeoutError):
        return "timeout", "no answer within the clip's time limit", part.chunk.path, part.frame_ids
    if isinstance(error, ProcessExpired):
        return "worker-died", f"its process ended with code {error.exitcode}", part.chunk.path, part.frame_ids
    raise error
