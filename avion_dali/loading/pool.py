"""The one supervised pool of decode processes.

Each clip is a task with its own time limit. A task that overruns it, or whose process dies, costs that
clip: the process is replaced and the others go on.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError

from pebble import ProcessExpired, ProcessPool

from avion_dali.contracts import ClipRequest, DecodeError, FailureKind
from avion_dali.cores import available_cores
from avion_dali.loading.ring import SharedRing
from avion_dali.loading.worker import DecodeClip, decode_into, start_worker


def default_workers(ranks_on_machine: int = 1) -> int:
    """Return this rank's share of the cores this process may use, at least one.

    Args:
        ranks_on_machine: training processes on this machine.
    """
    return max(1, available_cores() // ranks_on_machine)


class DecodePool:
    """Decode processes shared by all loaders of a rank.

    Args:
        decode_clip: a decoder's function, importable by name.
        workers: number of processes.
        clip_timeout_s: seconds after which a clip's process is killed and replaced.
    """

    def __init__(self, decode_clip: DecodeClip, *, workers: int, clip_timeout_s: float) -> None:
        self.workers = workers
        self._decode_clip, self._timeout = decode_clip, clip_timeout_s
        # Spawned, not forked: a forked child of a process that holds CUDA or threads may hang.
        self._pool = ProcessPool(
            max_workers=workers,
            initializer=start_worker,
            initargs=(os.getpid(),),
            context=multiprocessing.get_context("spawn"),
        )

    def submit(self, request: ClipRequest, ring: SharedRing, offset: int) -> Future[float]:
        """Queue a clip; its frames will be at `offset` of the ring's memory.

        Args:
            request: the clip.
            ring: where to write.
            offset: first byte of the clip's place.

        Returns:
            A future of the seconds spent; `failure_of` reads its exceptions.
        """
        return self._pool.schedule(
            decode_into, args=(self._decode_clip, request, ring.name, offset), timeout=self._timeout
        )

    def close(self) -> None:
        """Kill what is running and wait for the processes to end."""
        self._pool.stop()
        self._pool.join()


def failure_of(error: Exception, request: ClipRequest) -> tuple[FailureKind, str, str, tuple[int, ...]]:
    """Describe a failed task.

    Args:
        error: what the task's future raised.
        request: the clip that was asked for.

    Returns:
        (kind, cause, path, frame ids).

    Raises:
        Exception: the error itself, when it is not one of a clip.
    """
    if isinstance(error, DecodeError):
        return error.kind, error.cause, error.path, error.frame_ids
    part = request.parts[0]
    if isinstance(error, FutureTimeoutError):
        return "timeout", "no answer within the clip's time limit", part.chunk.path, part.frame_ids
    if isinstance(error, ProcessExpired):
        return "worker-died", f"its process ended with code {error.exitcode}", part.chunk.path, part.frame_ids
    raise error
