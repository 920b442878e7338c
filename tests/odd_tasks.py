"""Tasks for processes of their own; those import this file, so it stays light."""

import os
import signal
import time
from pathlib import Path

from avion_dali.loading.pool import still_working


def sleep_and_tell(path: str) -> None:
    """Task that leaves its process id in a file, then hangs."""
    Path(path).write_text(str(os.getpid()))
    time.sleep(60)


def die(number: int) -> None:
    """Task that ends by a signal."""
    os.kill(os.getpid(), number)


def be_killed(*_: object) -> None:
    """Worker process that a signal ends before it is ready."""
    die(signal.SIGKILL)


def fail(words: str) -> None:
    """Task that raises."""
    raise ValueError(words)


def read_past_the_end() -> None:
    """Task that raises what some file readers do at the end of a file."""
    raise EOFError("end of file")


def leave(status: int) -> None:
    """Task that ends without a word."""
    os._exit(status)


def chatter(answer: str) -> str:
    """Task whose libraries print, to stdout even."""
    os.write(1, b"noise on stdout\n")
    os.write(2, b"[/opt/lib/decoder.cc:12] The hardware is on strike.\nnoise\n")
    return answer


def joined(first: str, second: int) -> str:
    """Task that returns what it got."""
    return f"{first!r} {second!r}"


def go_on(parts: int) -> int:
    """Task that takes long and makes progress."""
    for _ in range(parts):
        time.sleep(0.3)
        still_working()
    return parts


def unpicklable() -> object:
    """Task whose result cannot be sent."""
    return lambda: None
