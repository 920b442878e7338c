"""A limit on the processor time of reading a file, which holds inside compiled code too.

A few hundred bytes of a pickle can keep the unpickler busy for years (a dictionary key of tuples in tuples,
each used twice), where no exception and no signal handler of Python gets a turn. So another process watches.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BASE_S, S_PER_MIB = 60.0, 1.0
# Counts the watched process's processor time, so that a slow disk is no reason; ends with its standard input.
_WATCH = """
import os, select, signal, sys
pid, limit_s, message = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
def used_s():
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
first = used_s()
while not select.select([0], [], [], min(1, limit_s / 4))[0]:
    if used_s() - first > limit_s:
        print(message, file=sys.stderr, flush=True)
        os.kill(pid, signal.SIGKILL)
        break
"""


@contextmanager
def bounded_time(path: Path) -> Iterator[None]:
    """End this process with a message when the block takes longer than any sound file of this size, on Linux.

    Args:
        path: the file that the block reads; a minute and a second per MiB are allowed.

    Yields:
        Nothing.
    """
    if sys.platform != "linux":
        yield
        return
    limit_s = BASE_S + S_PER_MIB * path.stat().st_size / 2**20
    message = f"error: {path} takes too long to read: it is damaged, or not to be trusted"
    command = [sys.executable, "-I", "-S", "-c", _WATCH, str(os.getpid()), str(limit_s), message]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as watcher:
        try:
            yield
        finally:
            watcher.kill()
