"""What runs inside a decode process. Imports stay light: numpy and PyAV, never torch."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.shared_memory import SharedMemory

import numpy as np

from avion_dali.contracts import ClipRequest, DecodeError

DecodeClip = Callable[[ClipRequest, np.ndarray], None]

_PR_SET_PDEATHSIG = 1
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_attached: dict[str, tuple[SharedMemory, np.ndarray]] = {}


def start_worker(parent_pid: int) -> None:
    """Prepare a worker: die with the trainer, and leave Ctrl-C and a scheduler's warnings to it.

    Args:
        parent_pid: the trainer's process id.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # SLURM sends them to every process of a job before its time is up.
    for name in ("SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if hasattr(libc, "mallopt"):
            # Left alone, glibc raises these limits with each large block freed and then keeps the holes: a
            # worker grew from 90 to 240 MB in 15,000 clips. Fixed, it stays at 90 MB and is no slower.
            libc.mallopt(_M_MMAP_THRESHOLD, 128 * 1024)
            libc.mallopt(_M_TRIM_THRESHOLD, 128 * 1024)
        if os.getppid() != parent_pid:  # the trainer died before the call above
            os._exit(1)


def decode_into(decode_clip: DecodeClip, request: ClipRequest, memory_name: str, offset: int) -> float:
    """Decode one clip into shared memory.

    Args:
        decode_clip: a decoder's function.
        request: the clip.
        memory_name: name of the shared memory.
        offset: first byte of the clip's place in it.

    Returns:
        Seconds spent.

    Raises:
        DecodeError: when the clip cannot be read, whatever the cause.
    """
    start = time.perf_counter()
    shape = request.frames_shape
    frames = attached_memory(memory_name)[offset : offset + int(np.prod(shape))]
    with failures_as_decode_errors(request, decoder=decode_clip.__module__.rsplit(".", 1)[-1]):
        decode_clip(request, frames.reshape(shape))
    return time.perf_counter() - start


@contextmanager
def failures_as_decode_errors(request: ClipRequest, *, decoder: str) -> Iterator[None]:
    """Turn whatever a clip's files provoke inside the `with` block into a `DecodeError`.

    Args:
        request: the clip.
        decoder: name that errors carry.

    Raises:
        DecodeError: when anything fails.
    """
    try:
        yield
    except DecodeError:
        raise
    except Exception as error:  # the process boundary: whatever a file provokes costs one clip, not the run
        part, cause = request.parts[0], f"{type(error).__name__}: {error}"
        raise DecodeError(
            part.chunk.path, part.frame_ids, decoder=decoder, kind="corrupt", cause=cause
        ) from error


def attached_memory(name: str) -> np.ndarray:
    """Return shared memory as flat uint8, attached once per process.

    Args:
        name: of the memory.
    """
    if name not in _attached:
        memory = SharedMemory(name)
        _attached[name] = memory, np.frombuffer(memoryview(memory.buf or b""), np.uint8)
    return _attached[name][1]
