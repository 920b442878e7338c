"""Functions that run in worker processes. This module imports numpy and PyAV, but never torch."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from avion_dali.child_process import die_with_parent
from avion_dali.contracts import ClipRequest, DecodeError
from avion_dali.decode.decoders import DecodeClip
from avion_dali.loading.ring import Place, is_open, open_memory

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_attached: dict[str, np.ndarray] = {}


def start_worker(parent_pid: int, niceness: int = 0) -> None:
    """Prepare a worker: it ends with its parent, leaves signals to it, and returns freed memory to the system.

    Args:
        parent_pid: the parent's process id.
        niceness: by how much its priority is lower than the parent's, 0 to 19; see nice(2).
    """
    die_with_parent(parent_pid)
    os.nice(niceness)
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # By default, glibc raises these limits with each large block that is freed and then keeps the memory: a
        # worker grew from 90 to 240 MB in 15,000 clips. With fixed limits it stays at 90 MB and is no slower.
        libc.mallopt(_M_MMAP_THRESHOLD, 128 * 1024)
        libc.mallopt(_M_TRIM_THRESHOLD, 128 * 1024)


def decode_into(decode_clip: DecodeClip, request: ClipRequest, place: Place) -> float:
    """Decode one clip into shared memory.

    Args:
        decode_clip: the function of a decoder.
        request: the clip.
        place: place of its frames, uint8 of `request.frames_shape`.

    Returns:
        Decoding time in seconds.

    Raises:
        DecodeError: when the clip cannot be read, whatever the cause.
    """
    start = time.perf_counter()
    shape = request.frames_shape
    frames = attached_memory(place)[: int(np.prod(shape))].reshape(shape)
    name = getattr(decode_clip, "name", decode_clip.__module__.rsplit(".", 1)[-1])
    with failures_as_decode_errors(request, decoder=name):
        decode_clip(request, frames)
    return time.perf_counter() - start


@contextmanager
def failures_as_decode_errors(request: ClipRequest, *, decoder: str) -> Iterator[None]:
    """Turn every error that a clip's files cause inside the `with` block into a `DecodeError`.

    Args:
        request: the clip.
        decoder: name of the decoder in errors.

    Raises:
        DecodeError: when any error occurs.
    """
    try:
        yield
    except DecodeError:
        raise
    except Exception as error:  # the process boundary: any error of a file fails one clip, not the run
        part, cause = request.parts[0], f"{type(error).__name__}: {error}"
        raise DecodeError(
            part.chunk.path, part.frame_ids, decoder=decoder, kind="corrupt", cause=cause
        ) from error


def attached_memory(place: Place) -> np.ndarray:
    """Return a place in shared memory as a flat uint8 array; each process attaches the memory once.

    Args:
        place: the place.
    """
    if place.memory_name not in _attached:
        for name in [name for name in _attached if not is_open(name)]:
            del _attached[name]  # of a loader that was closed
        _attached[place.memory_name] = open_memory(place.memory_name)
    return _attached[place.memory_name][place.offset : place.offset + place.num_bytes]
