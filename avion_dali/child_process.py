"""Behavior of child processes towards their parent. Children import this module first, so it imports little."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import resource_tracker
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

    def Process(self, *args: Any, **kwargs: Any) -> SpawnProcess:  # type: ignore[override]  # noqa: N802
        """Make a process, as multiprocessing's contexts do."""
        return SpawnedProcess(*args, **kwargs)
