"""Numbers that the host reads from the device without waiting for it; training steps read no others."""

from __future__ import annotations

import torch


class HostCopy:
    """A few numbers of the device, copied to the host in the background.

    Read later, when the device has long passed the copy, they cost no wait; read at once, they cost one. On the
    CPU they are there from the beginning. `tests/test_device_flow.py` checks that steps read nothing else.

    Args:
        numbers: any shape and dtype; later changes of the tensor do not matter.
    """

    def __init__(self, numbers: torch.Tensor) -> None:
        # On a GPU the destination is pinned memory, without which the copy would wait for the device.
        self._numbers = numbers.detach().to("cpu", non_blocking=True, copy=True)
        self._arrived: torch.cuda.Event | None = None
        if numbers.is_cuda:
            self._arrived = torch.cuda.Event(blocking=True)  # a host that waits sleeps
            self._arrived.record()

    @property
    def is_immediate(self) -> bool:
        """Whether the numbers did not have to travel."""
        return self._arrived is None

    def numbers(self) -> torch.Tensor:
        """Return the numbers on the host, of the same shape and dtype; wait if they are on their way."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._numbers
