"""The one supervised pool of worker processes, for any task.

Each task has the pool's time limit. A task that exceeds it, or whose process dies, fails alone: its process is
replaced and the other tasks go on.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing.context import SpawnProcess
from typing import Any, Generic, TypeVar

from pebble import ProcessPool

from avion_dali.child_process import MISSING_MAIN_GUARD, SafeSpawn, exit_if_importing_main
from avion_dali.contracts import UserError
from avion_dali.cores import available_cores
from avion_dali.loading.worker import start_worker

_POLL_S = 0.5
_GRACE_S = 5.0
_MAX_RESTARTS = 20

Result = TypeVar("Result")


def default_workers(ranks_on_machine: int = 1) -> int:
    """Return this rank's share of the cores that this process may use, at least one.

    Args:
        ranks_on_machine: training processes on this machine.
    """
    return max(1, available_cores() // ranks_on_machine)


class PoolBrokenError(Exception):
    """The pool lost its processes before a task ended; the task itself did not cause this."""


@dataclass(frozen=True, slots=True)
class Ticket(Generic[Result]):
    """A task that was handed to a pool.

    Args:
        future: what the task returns, or how it failed.
        generation: which set of processes it was handed to.
    """

    future: Future[Result]
    generation: int


class _RecordingSpawn(SafeSpawn):
    """Starts processes, and keeps those that run or lack a main guard; pebble does not tell exit statuses."""

    def __init__(self) -> None:
        super().__init__()
        self.processes: list[SpawnProcess] = []

    def Process(self, *args: Any, **kwargs: Any) -> SpawnProcess:  # type: ignore[override]  # noqa: N802
        """Make a process, as multiprocessing's contexts do."""
        process = super().Process(*args, **kwargs)
        kept = [p for p in self.processes if p.exitcode in (None, MISSING_MAIN_GUARD)]
        self.processes = [*kept, process]
        return process

    def kill_all(self) -> None:
        """Kill all processes that run."""
        for process in self.processes:
            if process.is_alive():
                process.kill()


class WorkerPool:
    """Worker processes, which all loaders of a rank can share.

    Processes are spawned, not forked: a forked child of a process that holds CUDA or threads may hang. A
    spawned child imports the program's main module, so that module needs `if __name__ == "__main__":`.

    Args:
        workers: number of processes.
        timeout_s: seconds after which a task's process is killed and replaced.
    """

    def __init__(self, *, workers: int, timeout_s: float) -> None:
        exit_if_importing_main()
        self.workers, self._timeout_s = workers, timeout_s
        self._generation, self._restarts = 0, 0
        self._last_done = time.monotonic()
        self._spawn = _RecordingSpawn()
        self._pool = self._start()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def schedule(self, task: Callable[..., Result], *arguments: Any) -> Ticket[Result]:
        """Queue a task.

        Args:
            task: a function that can be imported by name, or a `functools.partial` of one.
            *arguments: what it is called with; they are pickled.

        Returns:
            What to wait for with `wait`.

        Raises:
            UserError: when the worker processes cannot start, or die one after another.
        """
        if not self._pool.active:
            self._restart()
        future = self._pool.schedule(task, args=arguments, timeout=self._timeout_s)
        future.add_done_callback(partial(_note_done, weakref.ref(self)))
        return Ticket(future, self._generation)

    def wait(self, ticket: Ticket[Result]) -> Result:
        """Wait for a task.

        Args:
            ticket: from `schedule`.

        Returns:
            What the task returned.

        Raises:
            PoolBrokenError: the processes were lost; schedule the task again.
            UserError: when the worker processes cannot start, or die one after another.
            Exception: what the task raised, `concurrent.futures.TimeoutError`, or `pebble.ProcessExpired`.
        """
        began = time.monotonic()
        while not ticket.future.done():
            futures.wait([ticket.future], timeout=_POLL_S)
            # A task that a dying process had just taken is never reported: when no task at all has ended for
            # longer than one may take, something was lost.
            silent_s = time.monotonic() - max(began, self._last_done)
            lost = ticket.generation != self._generation or not self._pool.active
            if not ticket.future.done() and (lost or silent_s > self._timeout_s + _GRACE_S):
                if not lost:
                    self._restart()
                raise self._loss()
        try:
            result = ticket.future.result()
        except BrokenProcessPool:
            raise self._loss() from None
        self._restarts = 0
        return result

    def wait_until_over(self, ticket: Ticket[Any]) -> None:
        """Return when a task no longer runs, whatever became of it.

        Args:
            ticket: from `schedule`.

        Raises:
            UserError: when worker processes die one after another.
        """
        if ticket.future.done():
            return
        try:
            self.wait(ticket)
        except UserError:
            raise
        except Exception:  # the process boundary: nobody wants this task's result, nor how it failed
            return

    def close(self) -> None:
        """Kill what is running and wait for the processes to end; may be called twice."""
        self._end()

    def _start(self) -> ProcessPool:
        pool = ProcessPool(
            max_workers=self.workers, initializer=start_worker, initargs=(os.getpid(),), context=self._spawn
        )
        # Also for a pool that nobody closes: when it is collected, or at the end of the program.
        self._end = weakref.finalize(self, _end, pool, self._spawn)
        return pool

    def _restart(self) -> None:
        """Replace all processes after an idle one died, which breaks pebble's pool.

        Raises:
            UserError: when that does not help.
        """
        self.close()
        self._generation += 1
        self._restarts += 1
        if isinstance(loss := self._loss(), UserError):
            raise loss
        if self._restarts > _MAX_RESTARTS:
            raise UserError(
                f"the worker processes died {self._restarts} times in a row; is the machine out of memory? "
                "Take fewer processes (`workers`, --jobs) or a smaller `prefetch_batches`"
            )
        self._pool = self._start()

    def _loss(self) -> Exception:
        """Return the error that says why the processes were lost."""
        if all(process.exitcode != MISSING_MAIN_GUARD for process in self._spawn.processes):
            return PoolBrokenError()
        return UserError(
            "worker processes import the main module again, and this one starts worker processes whenever it "
            'is imported; put the code that does so under `if __name__ == "__main__":`'
        )


def _end(pool: ProcessPool, spawn: _RecordingSpawn) -> None:
    pool.stop()
    # All at once: pebble ends them one after another, and one that is still starting would meet an error.
    spawn.kill_all()
    pool.join()


def _note_done(pool: weakref.ref[WorkerPool], _: Future[Any]) -> None:
    """Note the time at which a task ended; a task does not keep its pool alive."""
    if (alive := pool()) is not None:
        alive._last_done = time.monotonic()
