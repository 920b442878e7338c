"""The supervised pool of worker processes, for any task.

All tasks have the same time limit. If a task exceeds it or its process dies, only this task fails: the process
is replaced and the other tasks continue.
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
    """Return the number of usable cores divided by the ranks on this machine, at least 1.

    Args:
        ranks_on_machine: training processes on this machine.
    """
    return max(1, available_cores() // ranks_on_machine)


class PoolBrokenError(Exception):
    """The pool lost its processes before a task ended, and the task did not cause this."""


@dataclass(frozen=True, slots=True)
class Ticket(Generic[Result]):
    """A task that was scheduled in a pool.

    Args:
        future: the result of the task, or its error.
        generation: number of restarts of the pool when the task was scheduled.
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
        """Kill all running processes."""
        for process in self.processes:
            if process.is_alive():
                process.kill()


class WorkerPool:
    """Worker processes, which all loaders of a rank can share.

    Processes are spawned, not forked, because a forked child of a process with CUDA or threads may hang. A
    spawned child imports the program's main module, so that module needs `if __name__ == "__main__":`.

    Args:
        workers: number of processes.
        timeout_s: seconds after which a task's process is killed and replaced.
        niceness: by how much the priority of the processes is lower than that of this process, 0 to 19.
    """

    def __init__(self, *, workers: int, timeout_s: float, niceness: int = 0) -> None:
        exit_if_importing_main()
        self.workers, self._timeout_s, self._niceness = workers, timeout_s, niceness
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
            *arguments: arguments of the function, which must be picklable.

        Returns:
            A ticket for `wait`.

        Raises:
            UserError: when the worker processes cannot start, or repeatedly die.
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
            The return value of the task.

        Raises:
            PoolBrokenError: when the processes were lost; the task must be scheduled again.
            UserError: when the worker processes cannot start, or repeatedly die.
            Exception: the exception of the task, `concurrent.futures.TimeoutError` or `pebble.ProcessExpired`.
        """
        began = time.monotonic()
        while not ticket.future.done():
            futures.wait([ticket.future], timeout=_POLL_S)
            # A task that a process had just received when it died is never reported. If no task has ended for
            # longer than the time limit of a task, such a task is assumed.
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
        """Wait until a task no longer runs, and ignore its result or error.

        Args:
            ticket: from `schedule`.

        Raises:
            UserError: when the worker processes cannot start, or repeatedly die.
        """
        if ticket.future.done():
            return
        try:
            self.wait(ticket)
        except UserError:
            raise
        except Exception:  # the process boundary: neither the result nor the error of this task is needed
            return

    def close(self) -> None:
        """Kill what is running and wait for the processes to end; may be called twice."""
        self._end()

    def _start(self) -> ProcessPool:
        pool = ProcessPool(
            max_workers=self.workers,
            initializer=start_worker,
            initargs=(os.getpid(), self._niceness),
            context=self._spawn,
        )
        # Also for a pool that nobody closes: when it is collected, or at the end of the program.
        self._end = weakref.finalize(self, _end, pool, self._spawn)
        return pool

    def _restart(self) -> None:
        """Replace all processes after an idle process died, which breaks pebble's pool.

        Raises:
            UserError: when the processes cannot start, or repeatedly die.
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
        """Return the error with the reason for which the processes were lost."""
        if all(process.exitcode != MISSING_MAIN_GUARD for process in self._spawn.processes):
            return PoolBrokenError()
        return UserError(
            "worker processes import the main module again, and this module starts worker processes whenever "
            'it is imported; put the code that starts them under `if __name__ == "__main__":`'
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
