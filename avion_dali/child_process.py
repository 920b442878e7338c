"""Behavior of child processes towards their parent. Children import this module first, so it imports little."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys

# Exit status of a child that was asked to start processes while it imported its parent's main module.
MISSING_MAIN_GUARD = 78
_PR_SET_PDEATHSIG = 1


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
