"""Does a task for many files in processes that end with their parent, and says what became of one that died."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

from avion_dali.child_process import SafeSpawn, die_with_parent
from avion_dali.contracts import UserError

TIMEOUT_S = 1800.0  # a whole video of hours on a slow disk may take minutes
_AHEAD = 16  # files in line for each process, so that none is idle while the oldest one takes long

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_processes(
    task: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    jobs: int,
    lost: Callable[[Item, str], Result],
    timeout_s: float = TIMEOUT_S,
) -> Iterator[Result]:
    """Do a task for each item.

    Args:
        task: a function that can be imported by name, or a `functools.partial` of one.
        items: what to call it with, taken as needed.
        jobs: processes.
        lost: makes the result of an item that crashed its process or took too long, from the item and a reason.
        timeout_s: seconds after which an item's process is killed.

    Returns:
        The results, in the order of the items.

    Raises:
        UserError: when a process was killed from outside.
    """
    # For the parent only: the processes import the modules of their tasks, which import this one.
    from pebble import ProcessPool

    remaining = iter(items)
    with ProcessPool(
        max_workers=jobs, initializer=die_with_parent, initargs=(os.getpid(),), context=SafeSpawn()
    ) as pool:

        def scheduled(count: int) -> Iterator[tuple[Item, futures.Future[Result]]]:
            for item in islice(remaining, count):
                yield item, pool.schedule(task, args=(item,), timeout=timeout_s)

        try:
            waiting = deque(scheduled(_AHEAD * jobs))
            while waiting:
                item, future = waiting.popleft()
                yield _outcome(item, future, lost=lost, timeout_s=timeout_s)
                waiting.extend(scheduled(1))
        except BaseException:
            pool.stop()
            raise


def _outcome(
    item: Item, future: futures.Future[Result], *, lost: Callable[[Item, str], Result], timeout_s: float
) -> Result:
    from pebble import ProcessExpired

    try:
        return future.result()
    except futures.TimeoutError:
        return lost(item, f"no answer within {timeout_s:g} s")
    except ProcessExpired as error:
        if error.exitcode != -signal.SIGKILL:
            return lost(item, f"crashed the process that read it ({_ending(error.exitcode)})")
    except BrokenProcessPool:
        pass
    raise UserError(
        "a probing process was killed from outside; is the machine out of memory? Take fewer processes (--jobs)"
    )


def _ending(exitcode: int) -> str:
    return signal.Signals(-exitcode).name if exitcode < 0 else f"exit status {exitcode}"
