"""Shared memory to which workers write clips, and from which batches are copied."""

from __future__ import annotations

import errno
import os
import weakref
from multiprocessing.shared_memory import SharedMemory
from typing import NamedTuple

import numpy as np

from avion_dali.contracts import UserError


class Place(NamedTuple):
    """The place of one clip in shared memory; a tuple, which is pickled faster than a dataclass.

    Args:
        memory_name: name of the shared memory.
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
        self._memory = _allocate(slots * self.slot_bytes)
        self.name = self._memory.name
        self._bytes = np.frombuffer(memoryview(self._memory.buf or b""), np.uint8)
        # Releases a ring that is not closed when it is garbage-collected, or at the end of the program.
        self._release = weakref.finalize(self, _release, self._memory)

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


def _release(memory: SharedMemory) -> None:
    memory.unlink()
    try:
        memory.close()
    except BufferError:
        # A view still exists; the mapping ends with it. Otherwise the destructor would raise the same error.
        memory.close = _do_nothing  # type: ignore[method-assign]


def _do_nothing() -> None:
    """Replace `close` of a memory that is still in use at the end."""


def _allocate(size: int) -> SharedMemory:
    try:
        memory = SharedMemory(create=True, size=size)
    except OSError as error:
        raise _too_small(size) from error
    if hasattr(os, "posix_fallocate"):
        # Without this, the file is sparse, and a full /dev/shm kills a worker with SIGBUS much later.
        try:
            with open(f"/dev/shm/{memory.name}", "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        except FileNotFoundError:
            pass  # not Linux: shared memory is not a file there
        except OSError as error:
            memory.close()
            memory.unlink()
            if error.errno == errno.ENOSPC:
                raise _too_small(size) from error
            raise
    return memory


def _too_small(size: int) -> UserError:
    return UserError(
        f"shared memory (/dev/shm) has no room for {size / 2**20:.0f} MiB of decoded clips; "
        "enlarge it (docker: --shm-size) or lower optim.micro_batch or data.prefetch_batches"
    )
