"""Copies a ring slot to the device; a slot is free again only when its copy has finished."""

from __future__ import annotations

import torch

from avion_dali.loading.ring import SharedRing


class DeviceCopier:
    """Moves micro-batches from the ring to the training device.

    On CUDA the ring is registered as pinned memory and copies have a stream of their own, so they run beside
    the model's kernels; an event per slot tells when the slot may be written again. On CPU a copy is a plain
    memory copy.

    Args:
        ring: where workers write.
        device: where batches go.
    """

    def __init__(self, ring: SharedRing, device: torch.device) -> None:
        self._ring, self._device = ring, device
        self._slots = [torch.from_numpy(ring.frames(slot)) for slot in range(ring.slots)]
        self._copied: list[torch.cuda.Event | None] = [None] * ring.slots
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if device.type == "cuda":
            memory = torch.from_numpy(ring.everything())
            check = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
            if int(check):
                raise RuntimeError(f"cudaHostRegister failed with code {int(check)}")

    def wait_until_free(self, slot: int) -> None:
        """Return when the slot's last copy has finished.

        Args:
            slot: which micro-batch.
        """
        event = self._copied[slot]
        if event is not None:
            event.synchronize()

    def copy(self, slot: int, rows: int) -> torch.Tensor:
        """Return the first rows of a slot on the device.

        Args:
            slot: which micro-batch.
            rows: clips in it.

        Returns:
            uint8 (rows * V, T, H, W, C), the caller's to keep.
        """
        frames = self._slots[slot][:rows].flatten(0, 1)
        if self._stream is None:
            return frames.clone()
        event, model_stream = torch.cuda.Event(), torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            on_device = frames.to(self._device, non_blocking=True)
            event.record()
        model_stream.wait_event(event)
        # The memory was allocated on the copy stream: it may be reused only after the model's kernels.
        on_device.record_stream(model_stream)
        self._copied[slot] = event
        return on_device

    def close(self) -> None:
        """Finish all copies and unpin the memory; may be called twice."""
        for slot in range(self._ring.slots):
            self.wait_until_free(slot)
        if self._device.type == "cuda" and self._slots:
            torch.cuda.cudart().cudaHostUnregister(self._slots[0].data_ptr())
        self._slots = []
