"""Parts of the GPU suite that end badly. Light: a process that runs one must start quickly."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable

from avion_dali.loading.worker import start_worker
from benchmarks.gpu.parts import NotRunError, Suite

Record = Callable[[dict], None]


def good(suite: Suite, record: Record) -> None:
    record({"measured": "odd", "device": suite.device})


def unable(suite: Suite, record: Record) -> None:
    raise NotRunError("no such thing here")


def failing(suite: Suite, record: Record) -> None:
    record({"measured": "odd", "value": 1})
    raise ValueError("went wrong\nin two lines")


def dying(suite: Suite, record: Record) -> None:
    record({"measured": "odd", "value": 2})
    os.kill(os.getpid(), signal.SIGKILL)


def endless(suite: Suite, record: Record) -> None:
    """Never ends, nor does its worker."""
    context = multiprocessing.get_context("spawn")
    worker = context.Process(target=_sleep, args=(os.getpid(),))
    worker.start()
    record({"measured": "odd", "pids": [os.getpid(), worker.pid]})
    time.sleep(3600)


def _sleep(parent_pid: int) -> None:
    start_worker(parent_pid)
    time.sleep(3600)
