"""Decoding on CPU cores: workers write frames into shared memory, whole slots are copied to the device."""

from __future__ import annotations

from functools import partial

import torch

from avion_dali.loading.faults import LoaderStats
from avion_dali.loading.ring import SharedRing
from avion_dali.loading.strategy import PendingBatch
from avion_dali.loading.transfer import DeviceCopier
from avion_dali.loading.worker import DecodeClip, decode_into


class FramesStrategy:
    """A `LoaderStrategy` whose tasks decode clips and return the seconds spent.

    Args:
        decode_clip: a decoder's function, which workers import by name.
    """

    depth = 0

    def __init__(self, decode_clip: DecodeClip) -> None:
        self.task = partial(decode_into, decode_clip)

    def open(self, ring: SharedRing, device: torch.device, stats: LoaderStats) -> None:
        """Get ready to copy slots.

        Args:
            ring: where tasks write.
            device: where frames are delivered.
            stats: where the time of decoding is counted.
        """
        self._ring, self._copier, self._stats = ring, DeviceCopier(ring, device), stats

    def wait_until_free(self, slot: int) -> None:
        """Return when a slot's copy to the device has finished.

        Args:
            slot: which slot of the ring.
        """
        self._copier.wait_until_free(slot)

    def start(self, batch: PendingBatch[float]) -> None:
        """Do nothing: the frames are in the ring already.

        Args:
            batch: the batch.
        """

    def frames(self, batch: PendingBatch[float]) -> torch.Tensor:
        """Copy a batch to the device.

        Args:
            batch: the batch.

        Returns:
            uint8 (B*V, T, H, W, C) on the device; zeros for invalid rows.
        """
        rows = len(batch.requests)
        self._stats.decode_s += sum(seconds for seconds in batch.results if seconds)
        self._ring.frames(batch.slot)[:rows][~batch.valid] = 0
        return self._copier.copy(batch.slot, rows)

    def discard(self) -> None:
        """Do nothing: no batch is kept here."""

    def close(self) -> None:
        """Finish all copies."""
        self._copier.close()
