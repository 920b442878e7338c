"""Shared memory that workers write clips into and the trainer copies batches from.

On Linux it is a file of /dev/shm without a name, which its owner alone may read: workers of the same user reach
it through the owner's entry in /proc, and the kernel frees it with the last process that has it, however those
processes end.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import weakref
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from avion_dali.contracts import UserError

_MEMORY_FOLDER = "/dev/shm"


class Place(NamedTuple):
    """The place of one clip in shared memory; a tuple, which is pickled faster than a dataclass.

    Args:
        memory_name: reference to the shared memory, for `open_memory`.
        offset: first byte.
        num_bytes: length in bytes, exactly that of the clip's decoded frames.
    """

    memory_name: str
    offset: int
    num_bytes: int


class SharedRing:
    """Equal slots of shared memory, one micro-batch each.

    Args:
        slots: number of micro-batches.
        slot_shape: shape of one micro-batch, (B, V, T, H, W, C), uint8.

    Raises:
        UserError: when the machine's shared memory is too small.
    """

    def __init__(self, slots: int, slot_shape: tuple[int, ...]) -> None:
        self.slots, self.slot_shape = slots, slot_shape
        self.slot_bytes = int(np.prod(slot_shape))
        self.clip_bytes = self.slot_bytes // slot_shape[0]
        descriptor, path = _new_file()
        # Also for a ring that nobody closes: when it is collected, or at the end of the program.
        self._release = weakref.finalize(self, _release, descriptor, path)
        try:
            _allocate(descriptor, slots * self.slot_bytes)
        except BaseException:
            self._release()
            raise
        self.name = _reference(descriptor, path)
        self._bytes = _mapped(descriptor)

    def place(self, slot: int, row: int) -> Place:
        """Return the place of one clip.

        Args:
            slot: number of the micro-batch's slot.
            row: row of the clip in the micro-batch.
        """
        return Place(self.name, slot * self.slot_bytes + row * self.clip_bytes, self.clip_bytes)

    def frames(self, slot: int) -> np.ndarray:
        """Return one micro-batch as a uint8 view of `slot_shape`; valid until `close`.

        Args:
            slot: number of the micro-batch's slot.
        """
        start = slot * self.slot_bytes
        return self._bytes[start : start + self.slot_bytes].reshape(self.slot_shape)

    def everything(self) -> np.ndarray:
        """Return the whole memory as a flat uint8 view."""
        return self._bytes

    def close(self) -> None:
        """Release the memory; may be called twice."""
        self._bytes = np.empty(0, np.uint8)
        self._release()


def open_memory(name: str) -> np.ndarray:
    """Map the shared memory of another process.

    Args:
        name: from a `Place`.

    Returns:
        All its bytes, uint8; writing to them writes to the memory.

    Raises:
        FileNotFoundError: when its owner has closed it.
    """
    path, _, identity = name.partition("#")
    descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        # The owner's file numbers are used again: after a close this may be another file.
        if _identity(descriptor) != identity:
            raise FileNotFoundError(f"the shared memory {name} is closed")
        return _mapped(descriptor)
    finally:
        os.close(descriptor)


def is_open(name: str) -> bool:
    """Tell whether the owner of shared memory still has it.

    Args:
        name: from a `Place`.
    """
    path, _, identity = name.partition("#")
    try:
        found = os.stat(path)
    except OSError:
        return False
    return f"{found.st_dev}:{found.st_ino}" == identity


def _new_file() -> tuple[int, str]:
    """Return an empty file in memory and the path that other processes open it by."""
    if not os.path.isdir(_MEMORY_FOLDER):  # not Linux
        return tempfile.mkstemp(prefix="avion_dali_ring_")
    descriptor, path = tempfile.mkstemp(dir=_MEMORY_FOLDER)
    os.unlink(path)
    return descriptor, f"/proc/{os.getpid()}/fd/{descriptor}"


def _identity(descriptor: int) -> str:
    found = os.fstat(descriptor)
    return f"{found.st_dev}:{found.st_ino}"


def _reference(descriptor: int, path: str) -> str:
    return f"{path}#{_identity(descriptor)}"


def _mapped(descriptor: int) -> np.ndarray:
    """Return a file's bytes, uint8; the mapping lasts as long as the array and its views."""
    return np.frombuffer(mmap.mmap(descriptor, 0), np.uint8)


def _release(descriptor: int, path: str) -> None:
    # A view may still be alive; the mapping is then released together with it.
    os.close(descriptor)
    if not path.startswith("/proc/"):
        with suppress(FileNotFoundError):
            os.unlink(path)


def _allocate(descriptor: int, size: int) -> None:
    try:
        os.ftruncate(descriptor, size)
        if hasattr(os, "posix_fallocate"):
            # Without this the file is sparse, and a full /dev/shm kills a worker with SIGBUS much later.
            os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
            raise _too_small(size) from error
        raise


def _too_small(size: int) -> UserError:
    return UserError(
        f"shared memory (/dev/shm) has no room for {size / 2**20:.0f} MiB of decoded clips; "
        "enlarge it (docker: --shm-size) or lower `batch_size` or `prefetch_batches`"
    )
