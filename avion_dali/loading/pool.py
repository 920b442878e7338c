"""The supervised pool of worker processes, for any task.

All tasks have the same time limit. If a task exceeds it or its process dies, only this task fails: the process
is replaced and the other tasks continue.

Each process has a pipe of its own, so a process that dies leaves no lock behind, and its end is seen at once.
One thread hands out tasks and receives answers. Where processes share a queue, all idle ones wake for each
task: 64 of them delivered next to nothing on two cores.
"""

from __future__ import annotations

import atexit
import os
import pickle
import selectors
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple, TypeVar

from avion_dali.child_process import MISSING_MAIN_GUARD, SafeSpawn, disown, exit_if_importing_main
from avion_dali.contracts import UserError
from avion_dali.cores import available_cores
from avion_dali.loading.worker import start_worker

_POLL_S = 0.2  # between two looks at the time limits
_GRACE_S = 2.0
_IMPORTS_S = 20.0  # more for the first task of a process, which imports the modules of its tasks
_MAX_DEATHS = 20
_MAX_FAILED_STARTS = 3
_START_S = 120.0  # for a process to start and to import the program's main module
_PROGRESS = b""
_NO_MAIN_GUARD = (
    "worker processes import the main module again, and this module starts worker processes whenever it is "
    'imported; put the code that starts them under `if __name__ == "__main__":`'
)
_FAILED_STARTS = (
    "the worker processes end before they are ready, {} in a row with exit status {}: each imports the "
    "program's main module again, and it or one of its imports fails there; the traceback is printed above"
)
_OTHER_PROCESS = (
    "this loader, or its pool of worker processes, belongs to the process that opened it and cannot be used in "
    "a fork of that process; open one in this process"
)
_DEATHS = (
    "the worker processes died {} times in a row; is the machine out of memory? Take fewer processes "
    "(`workers`, --jobs) or a smaller `prefetch_batches`"
)

_LATE_START = (
    "a worker process did not start within {:.0f} s; does the main module of this program, or a module that it "
    "imports, wait for something?"
)

Result = TypeVar("Result")

_pipes: list[Connection] = []  # in a worker process, the one to its pool


def default_workers(ranks_on_machine: int = 1) -> int:
    """Return the number of usable cores divided by the ranks on this machine, at least 1.

    Args:
        ranks_on_machine: training processes on this machine.
    """
    return max(1, available_cores() // ranks_on_machine)


def still_working() -> None:
    """Tell the pool of this worker process that the current task makes progress: its time limit begins anew."""
    for pipe in _pipes:
        pipe.send_bytes(_PROGRESS)


class WorkerDiedError(Exception):
    """The process of a task ended before the task did.

    Args:
        exitcode: exit status of the process; negative for a signal.
    """

    def __init__(self, exitcode: int | None) -> None:
        super().__init__(exitcode)
        self.exitcode = exitcode


class _RemoteError(Exception):
    """The traceback of an error in a worker process, as text."""


class _Job(NamedTuple):
    message: bytes
    future: Future[Any]


class _Worker:
    """A process, its pipe, and the task it works on."""

    def __init__(self, spawn: SafeSpawn, niceness: int) -> None:
        self.pipe, other = spawn.Pipe()
        self.process = spawn.Process(target=_serve, args=(other, os.getpid(), niceness), daemon=True)
        self.process.start()
        other.close()
        self.job: _Job | None = None
        self.started, self.is_ready = time.monotonic(), False  # ready when it has sent anything
        self.deadline = 0.0
        self.more_s = _IMPORTS_S

    def end(self, *, kill: bool) -> int | None:
        """End the process, and return its exit status; None if the system does not let it end yet."""
        if kill:
            self.process.kill()
        self.process.join(_GRACE_S)
        if self.process.is_alive():
            self.process.kill()
        self.pipe.close()
        return self.process.exitcode


class WorkerPool:
    """Worker processes, which all loaders of a rank can share.

    Processes are spawned, not forked, because a forked child of a process with CUDA or threads may hang. A
    spawned child imports the program's main module, so that module needs `if __name__ == "__main__":`.

    Args:
        workers: number of processes.
        timeout_s: seconds after which a task's process is killed and replaced, unless the task calls
            `still_working`.
        niceness: by how much the priority of the processes is lower than that of this process, 0 to 19.
    """

    def __init__(self, *, workers: int, timeout_s: float, niceness: int = 0) -> None:
        exit_if_importing_main()
        self.workers = workers
        self._supervisor = _Supervisor(workers, timeout_s, niceness)
        self._end = weakref.finalize(self, self._supervisor.close)  # also for a pool that nobody closes

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def schedule(self, task: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Queue a task.

        Args:
            task: a function that can be imported by name, or a `functools.partial` of one.
            *arguments: arguments of the function, which must be picklable.

        Returns:
            The future result of the task, or its error: the exception of the task; `futures.TimeoutError` or
            `WorkerDiedError`, which concern this task alone; or a `UserError` when the worker processes cannot
            start, or repeatedly die.

        Raises:
            UserError: when the worker processes could not start, or repeatedly died, or belong to the process
                of which this one is a fork.
            RuntimeError: when the pool is closed.
        """
        self.require_own_process()
        return self._supervisor.schedule(task, arguments)

    def close(self) -> None:
        """Kill what is running and wait for the processes to end; may be called twice. A fork does nothing."""
        self._end()

    def is_foreign(self) -> bool:
        """Tell whether this process is a fork of the one that made the pool; it has none of the threads."""
        return self._supervisor.is_foreign()

    def require_own_process(self) -> None:
        """Raise an error in a fork of the process that made the pool, which would wait for ever.

        Raises:
            UserError: says what to do instead.
        """
        if self.is_foreign():
            raise UserError(_OTHER_PROCESS)


class _Supervisor:
    """The processes of a pool and the thread that serves them; the pool itself may be collected meanwhile.

    The thread starts all processes, because on Linux they end with the thread that started them.
    """

    def __init__(self, workers: int, timeout_s: float, niceness: int) -> None:
        self._count, self._timeout_s, self._niceness = workers, timeout_s, niceness
        self._spawn, self._selector = SafeSpawn(), selectors.DefaultSelector()
        self._workers: set[_Worker] = set()
        self._creator = os.getpid()
        self._deaths = 0  # of processes without a task, since the last answer
        self._failed_starts = 0  # since a process was ready for the last time
        # For the following; reentrant, since garbage collection closes forgotten pools, and may do so anywhere.
        self._lock = threading.RLock()
        self._queue: deque[_Job] = deque()
        self._idle: list[_Worker] = []
        self._problem: Exception | None = None  # why no task is accepted any more
        self._thread = threading.Thread(target=self._run, name="worker pool", daemon=True)
        # At the end of a program before multiprocessing ends the processes, which this thread would replace.
        atexit.register(self.close)
        self._thread.start()

    def schedule(self, task: Callable[..., Any], arguments: tuple[Any, ...]) -> Future[Any]:
        """See `WorkerPool.schedule`."""
        job = _Job(bytes(ForkingPickler.dumps((task, arguments))), Future())
        with self._lock:
            if self._problem is not None:
                raise self._problem
            self._queue.append(job)
            if self._idle:
                self._give(self._idle.pop())
        return job.future

    def close(self) -> None:
        """See `WorkerPool.close`."""
        if self.is_foreign():
            disown(worker.process for worker in self._workers)
            return
        self._stop(RuntimeError("the pool of worker processes is closed"))
        for worker in list(self._workers):
            worker.process.kill()  # the ends of their pipes wake the thread
        if threading.current_thread() is not self._thread:  # in which a pool may be collected, too
            self._thread.join()
        atexit.unregister(self.close)

    def is_foreign(self) -> bool:
        """See `WorkerPool.is_foreign`."""
        return os.getpid() != self._creator

    def _stop(self, problem: Exception) -> None:
        with self._lock:
            self._problem = self._problem or problem

    def _run(self) -> None:
        checked = time.monotonic()
        try:
            for _ in range(self._count):
                self._start_worker()
            while self._problem is None:
                for key, _ in self._selector.select(_POLL_S):
                    self._receive(key.data)
                if time.monotonic() - checked > _POLL_S:
                    checked = time.monotonic()
                    self._end_late_tasks(checked)
        except OSError as error:
            self._stop(UserError(f"worker processes cannot start: {error}"))
        except Exception as error:  # the process boundary: whatever it is, nobody may wait for the tasks
            self._stop(error)
        self._end()

    def _end(self) -> None:
        """End all processes, and fail all tasks."""
        assert self._problem is not None
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.end(kill=True)
        self._selector.close()
        for job in [*(worker.job for worker in self._workers if worker.job), *self._queue]:
            job.future.set_exception(self._problem)
        self._workers.clear()

    def _start_worker(self) -> None:
        if self._problem is None:
            worker = _Worker(self._spawn, self._niceness)
            self._workers.add(worker)
            self._selector.register(worker.pipe, selectors.EVENT_READ, worker)

    def _give(self, worker: _Worker) -> None:
        """Give a worker the next task, if there is one; the caller holds the lock."""
        if not self._queue:
            self._idle.append(worker)
            return
        worker.job, worker.deadline = self._queue.popleft(), time.monotonic() + self._timeout_s + worker.more_s
        try:
            worker.pipe.send_bytes(worker.job.message)
        except OSError:  # it died while it had nothing to do, which the thread is about to see
            self._queue.appendleft(worker.job)
            worker.job = None

    def _receive(self, worker: _Worker) -> None:
        """Receive an answer of a worker, or the end of its pipe; its first answer only says that it runs."""
        try:
            answer = worker.pipe.recv_bytes()
        except (EOFError, OSError):
            self._replace(worker)
            return
        if not worker.is_ready:
            worker.is_ready, self._failed_starts = True, 0
        if worker.job is not None and answer == _PROGRESS:
            worker.deadline, worker.more_s = time.monotonic() + self._timeout_s, 0.0
            return
        with self._lock:
            job, worker.job = worker.job, None
            self._give(worker)
        if job is not None:
            self._deaths = 0
            _deliver(answer, job.future)

    def _end_late_tasks(self, now: float) -> None:
        for worker in [worker for worker in self._workers if worker.job and worker.deadline < now]:
            self._replace(worker, futures.TimeoutError())
        if any(not worker.is_ready and worker.started + _START_S < now for worker in self._workers):
            self._stop(UserError(_LATE_START.format(_START_S)))

    def _replace(self, worker: _Worker, error: futures.TimeoutError | None = None) -> None:
        """Replace a worker that died, or is killed for an error; its task fails."""
        self._selector.unregister(worker.pipe)
        self._workers.remove(worker)
        with self._lock:
            if worker in self._idle:
                self._idle.remove(worker)
        exitcode = worker.end(kill=error is not None)
        if exitcode == MISSING_MAIN_GUARD:
            self._stop(UserError(_NO_MAIN_GUARD))
        if not worker.is_ready and exitcode is not None and exitcode > 0:  # no signal, so it has said why
            self._failed_starts += 1
        if self._failed_starts == _MAX_FAILED_STARTS:
            self._stop(UserError(_FAILED_STARTS.format(self._failed_starts, exitcode)))
        if worker.job is not None:
            worker.job.future.set_exception(error or self._problem or WorkerDiedError(exitcode))
        else:
            self._deaths += 1
        if self._deaths > _MAX_DEATHS:
            self._stop(UserError(_DEATHS.format(self._deaths)))
        self._start_worker()


def _deliver(answer: bytes, future: Future[Any]) -> None:
    try:
        error, value = pickle.loads(answer)
    except Exception as unreadable:  # the process boundary: an error class that cannot be unpickled
        error, value = unreadable, "an answer of a worker process could not be unpickled"
    if error is None:
        future.set_result(value)
    else:
        error.__cause__ = _RemoteError(value)
        future.set_exception(error)


def _serve(pipe: Connection, parent_pid: int, niceness: int) -> None:
    """Work in a process: call the tasks that arrive, and answer with (None, result) or (error, traceback)."""
    start_worker(parent_pid, niceness)
    _pipes.append(pipe)
    pipe.send_bytes(_PROGRESS)
    has_imported = False
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:  # not below: tasks that read files may raise it, too
            return
        try:
            task, arguments = pickle.loads(message)
            if not has_imported:
                pipe.send_bytes(_PROGRESS)
                has_imported = True
            answer = pickle.dumps((None, task(*arguments)))
        except Exception as error:  # the process boundary: every error is the task's answer
            answer = _failed(error)
        pipe.send_bytes(answer)


def _failed(error: Exception) -> bytes:
    text = traceback.format_exc()
    try:
        return pickle.dumps((error, text))
    except Exception:  # the process boundary: some errors cannot be pickled
        return pickle.dumps((RuntimeError(f"{type(error).__name__}: {error}"), text))
