"""Behavior of child processes towards their parent. Children import this module first, so it imports little."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import reduction, resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import Any

# Exit status of a child that was asked to start processes while it imported its parent's main module.
MISSING_MAIN_GUARD = 78
_PR_SET_PDEATHSIG = 1
_PACKAGE_ROOT = str(Path(__file__).resolve().parents[1])
_environment = threading.RLock()


def die_with_parent(parent_pid: int) -> None:
    """End this process when its parent ends, and let the parent alone handle Ctrl-C and scheduler signals.

    Args:
        parent_pid: the parent's process id.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # SLURM sends these to every process of a job shortly before its time limit.
    for name in ("SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:  # the parent ended before the call above
            os._exit(1)


def exit_if_importing_main() -> None:
    """End this process silently if it is a spawned child that is still importing its parent's main module.

    Such a child reaches code that starts processes only if the main module lacks
    `if __name__ == "__main__":`. The parent sees the exit status `MISSING_MAIN_GUARD` and reports it once.
    """
    # `multiprocessing.spawn` sets this while it imports the main module; there is no public attribute for it.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        os._exit(MISSING_MAIN_GUARD)


def disown(processes: Iterable[SpawnProcess]) -> None:
    """Have `multiprocessing` in a fork leave its parent's processes alone; it terminates them when it ends.

    Args:
        processes: processes that the parent started.
    """
    # `multiprocessing` does so itself in the processes that it forks; there is no public function for others.
    getattr(multiprocessing.process, "_children", set()).difference_update(processes)


def safe_environment(variables: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables for an interpreter that finds this package and imports nothing from where it starts.

    Python before 3.11 does not know `PYTHONSAFEPATH`; see `safe_start`.

    Args:
        variables: what the interpreter gets besides.
    """
    paths = [*variables.get("PYTHONPATH", "").split(os.pathsep), *sys.path, _PACKAGE_ROOT]
    found = os.pathsep.join(dict.fromkeys(path for path in paths if path))
    return {**variables, "PYTHONSAFEPATH": "1", "PYTHONPATH": found}


@contextmanager
def safe_start() -> Iterator[None]:
    """Have processes that start in the block import nothing from the working directory.

    An interpreter that is started for `multiprocessing` searches the working directory before the standard
    library, until its parent has told it the search path.

    Yields:
        Nothing.

    Raises:
        UserError: Python is older than 3.11, which cannot be told so, and the working directory holds a file
            with the name of a standard module.
    """
    if sys.version_info < (3, 11):
        _refuse_shadows(os.getcwd())
    with _environment:
        before = os.environ.get("PYTHONSAFEPATH")
        os.environ["PYTHONSAFEPATH"] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ["PYTHONSAFEPATH"]
            else:
                os.environ["PYTHONSAFEPATH"] = before


def _refuse_shadows(folder: str) -> None:
    """Refuse to start processes in a folder whose files they would import in place of standard modules."""
    from avion_dali.contracts import UserError  # brings numpy, which few of the processes need

    for entry in os.scandir(folder):
        name = entry.name.partition(".")[0]
        if name in sys.stdlib_module_names and (entry.is_dir() or entry.name.endswith((".py", ".pyc", ".so"))):
            raise UserError(
                f"{entry.path} has the name of a module of Python, and Python before 3.11 would import it "
                "here; start the command in another folder"
            )


class SpawnedProcess(SpawnProcess):
    """A spawned process that imports nothing from the working directory."""

    def start(self) -> None:
        """Start the process."""
        with safe_start(), _importable_main():
            super().start()


class PipeLock:
    """A recursive lock between processes that leaves nothing behind, however they end.

    The locks of `multiprocessing` have names in /dev/shm, which stay there if all processes are killed at once.
    This one is a pipe that contains one byte: whoever reads it holds the lock, and returns it on release. Child
    processes receive the lock as an argument.
    """

    def __init__(self) -> None:
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        os.write(writer, b"-")
        self._own(reader, writer)

    def _own(self, reader: int, writer: int) -> None:
        self._reader, self._writer = reader, writer
        self._holder: int | None = None  # the thread of this process that holds it
        self._count = 0
        weakref.finalize(
            self, _close, reader, writer
        ).atexit = False  # pools end later than this would be called

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """Take the lock, and return whether this succeeded; a thread may take it repeatedly.

        Args:
            block: whether to wait until it is free.
            timeout: seconds to wait; None waits without a limit.
        """
        if self._holder != threading.get_ident():
            if not self._take(0.0 if not block else timeout):
                return False
            self._holder = threading.get_ident()
        self._count += 1
        return True

    def _take(self, timeout: float | None) -> bool:
        until = None if timeout is None else time.monotonic() + timeout
        free = select.poll()
        free.register(self._reader, select.POLLIN)
        while True:
            try:
                return bool(os.read(self._reader, 1))
            except BlockingIOError:
                left_s = None if until is None else until - time.monotonic()
                if left_s is not None and left_s <= 0:
                    return False
                free.poll(None if left_s is None else left_s * 1000)

    def release(self) -> None:
        """Return the lock once."""
        if self._holder != threading.get_ident():
            raise RuntimeError("a lock is released by a thread that does not hold it")
        self._count -= 1
        if not self._count:
            self._holder = None
            os.write(self._writer, b"-")

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def __getstate__(self) -> tuple[Any, ...]:
        return tuple(reduction.DupFd(end) for end in (self._reader, self._writer))

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        reader, writer = (end.detach() for end in state)
        self._own(reader, writer)


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


@contextmanager
def _importable_main() -> Iterator[None]:
    """Hide a main module that no child can import: a program from standard input names a file `<stdin>`."""
    main, name = sys.modules["__main__"], "__file__"
    with _environment:
        path = vars(main).get(name)
        is_missing = path is not None and not os.path.exists(path)
        if is_missing:
            delattr(main, name)
        try:
            yield
        finally:
            if is_missing:
                setattr(main, name, path)


class SafeSpawn(SpawnContext):
    """The context for every pool of processes: `multiprocessing.get_context("spawn")`, with a safe start."""

    def __init__(self) -> None:
        super().__init__()
        with safe_start():  # Python starts this helper process with the first lock or process
            resource_tracker.ensure_running()

    def RLock(self) -> Any:  # noqa: N802
        """Make a lock for a pool of processes."""
        return PipeLock()

    def Process(self, *args: Any, **kwargs: Any) -> SpawnProcess:  # type: ignore[override]  # noqa: N802
        """Make a process, as multiprocessing's contexts do."""
        return SpawnedProcess(*args, **kwargs)
