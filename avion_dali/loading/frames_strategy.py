"""Decoding on CPU cores: workers write frames into shared memory, from which slots are copied to the device."""

from __future__ import annotations

import logging
from contextlib import suppress
from functools import partial

import torch

from avion_dali.decode.decoders import DecodeClip
from avion_dali.loading.faults import LoaderStats
from avion_dali.loading.ring import SharedRing
from avion_dali.loading.strategy import PendingBatch
from avion_dali.loading.worker import decode_into

_log = logging.getLogger(__name__)


class FramesStrategy:
    """A `LoaderStrategy` whose tasks decode clips and return the decoding time in seconds.

    On CUDA, the ring is registered as pinned memory and copies use a separate stream, so they run in parallel
    with the model's kernels; an event per slot marks when the slot may be written again. On the CPU, a copy is
    a plain memory copy.

    Args:
        decode_clip: the function of a decoder, which workers import by name.
    """

    depth = 0

    def __init__(self, decode_clip: DecodeClip) -> None:
        self.task = partial(decode_into, decode_clip)

    def open(self, ring: SharedRing, device: torch.device, stats: LoaderStats) -> None:
        """Prepare for copying slots.

        Args:
            ring: shared memory to which tasks write.
            device: device to which frames are delivered.
            stats: counts to which decoding time is added.
        """
        self._device, self._stats = device, stats
        self._slots = [torch.from_numpy(ring.frames(slot)) for slot in range(ring.slots)]
        self._copied: list[torch.cuda.Event | None] = [None] * ring.slots
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._is_pinned = device.type == "cuda" and _pin(torch.from_numpy(ring.everything()), device)

    def wait_until_free(self, slot: int) -> None:
        """Wait until a slot's last copy to the device has finished.

        Args:
            slot: number of the slot.
        """
        if (event := self._copied[slot]) is not None:
            event.synchronize()

    def start(self, batch: PendingBatch[float]) -> None:
        """Do nothing, since the frames are already in the ring.

        Args:
            batch: the batch.
        """

    def frames(self, batch: PendingBatch[float]) -> torch.Tensor:
        """Copy a batch to the device.

        Args:
            batch: the batch.

        Returns:
            uint8 (B*V, T, H, W, C) on the device, not overwritten later; zeros for invalid rows.
        """
        self._stats.decode_s += sum(seconds for seconds in batch.results if seconds)
        in_ring_BVTHWC = self._slots[batch.slot][: len(batch.clips)]
        in_ring_BVTHWC[torch.from_numpy(~batch.valid)] = 0
        frames_BTHWC = in_ring_BVTHWC.flatten(0, 1)
        if self._stream is None:
            return frames_BTHWC.clone()
        event, model_stream = torch.cuda.Event(), torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            on_device_BTHWC = frames_BTHWC.to(self._device, non_blocking=True)
            event.record()
        model_stream.wait_event(event)
        # The memory was allocated on the copy stream; it may be reused only after the model's kernels.
        on_device_BTHWC.record_stream(model_stream)
        self._copied[batch.slot] = event
        return on_device_BTHWC

    def discard(self) -> None:
        """Do nothing, since this strategy keeps no batches."""

    def close(self) -> None:
        """Finish all copies and unpin the memory; may be called twice."""
        for slot in range(len(self._slots)):
            self.wait_until_free(slot)
        if self._is_pinned and self._slots:
            torch.cuda.cudart().cudaHostUnregister(self._slots[0].data_ptr())
        self._slots = []


def _pin(memory: torch.Tensor, device: torch.device) -> bool:
    """Register memory as pinned; return whether the system allows it. If not, copies make the host wait."""
    code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
    if code:
        _log.warning("shared memory cannot be pinned (cudaHostRegister: code %d): copies to the GPU wait", code)
        with suppress(RuntimeError):  # CUDA reports the error again, with the next kernel
            torch.zeros(1, device=device)
    return not code
