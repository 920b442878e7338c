"""Calls a function in a new interpreter with a time limit, for code that may crash or hang, such as drivers.

Unlike the processes of a pool, this interpreter does not import the program's main module. The output of
libraries in it is not shown, except for the reason of a failure.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress

from avion_dali.child_process import die_with_parent, safe_environment

TIMEOUT_S = 120.0  # the first use of a driver, or of packages on a cold shared disk, may take a minute
_KILL_S = 5.0

# The empty entry of the path is the working directory, where a user's modules may have the same names as ours.
_CHILD = (
    "import sys; sys.path[:] = filter(None, sys.path); "
    f"from {__name__} import answer_parent; answer_parent(sys.argv[1])"
)


def call_in_subprocess(
    task: Callable[..., str | None], *arguments: str | int, timeout_s: float = TIMEOUT_S
) -> str | None:
    """Call a function in a new interpreter.

    Args:
        task: a module-level function; returns a description of the problem, or None.
        *arguments: arguments of the function.
        timeout_s: seconds after which the process is killed.

    Returns:
        The task's return value, or one line that says how its process failed.
    """
    call = json.dumps([task.__module__, task.__name__, os.getpid(), arguments])
    process = subprocess.Popen(
        [sys.executable, "-c", _CHILD, call],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=safe_environment(),
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        with suppress(subprocess.TimeoutExpired):  # a process that is stuck in a driver cannot be killed
            process.communicate(timeout=_KILL_S)
        return f"no answer within {timeout_s:.0f} s"
    said = [line.strip() for line in stderr.decode(errors="replace").splitlines() if line.strip()]
    if process.returncode < 0:
        return f"its process was killed by {signal.Signals(-process.returncode).name}"
    if process.returncode:
        return said[-1] if said else f"its process ended with status {process.returncode}"
    answer: str | None = json.loads(stdout)
    # DALI writes the cause of some failures only to stderr, as `[file:line] cause`.
    remarks = [match[1] for line in said if (match := re.match(r"\[/[^\]]+:\d+\] (.+)", line))]
    return f"{answer} ({remarks[-1]})" if answer and remarks else answer


def answer_parent(call: str) -> None:
    """Run the task of `call_in_subprocess` in the process that it has started.

    Args:
        call: JSON list of module, function, the parent's process id and the arguments.
    """
    module, function, parent_pid, arguments = json.loads(call)
    die_with_parent(parent_pid)
    # Libraries may print to stdout, so only the answer goes to the parent's pipe.
    answers = os.dup(1)
    os.dup2(2, 1)
    answer = getattr(importlib.import_module(module), function)(*arguments)
    os.write(answers, json.dumps(answer).encode())
    os._exit(0)  # skip the clean-up of libraries, which takes time and may crash


def import_modules(*names: str) -> None:
    """Import modules, as a task for `call_in_subprocess`.

    Args:
        *names: full module names.
    """
    for name in names:
        importlib.import_module(name)
