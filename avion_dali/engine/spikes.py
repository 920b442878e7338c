"""Notices steps whose loss jumps far above what it was lately."""

from __future__ import annotations

import torch
import torch.distributed as dist

WINDOW = 100
"""Losses that the running median is taken over."""
WARM_UP = 20
"""Losses needed before any step is judged."""


class SpikeWatch:
    """Compares each loss with the median of the last `WINDOW` ones, on the device, without waiting for it.

    Spikes enter the window like all losses: a median hardly moves for a few, and when the loss has risen for
    good, it follows within `WINDOW` / 2 steps.

    Args:
        factor: a loss above this multiple of the median is a spike.
        device: where losses are.
    """

    def __init__(self, factor: float, device: torch.device) -> None:
        self.factor = factor
        self._losses = torch.full((WINDOW,), torch.nan, device=device)
        self._seen = 0

    def excess(self, loss: torch.Tensor) -> torch.Tensor:
        """Judge a step and remember its loss.

        Args:
            loss: loss of this rank, ().

        Returns:
            Loss averaged over ranks divided by the limit, float32 (), the same number on every rank: above 1 is
            a spike. 0 while too few losses are known.
        """
        mean = loss.detach().float().clone()
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        # The known losses stand first; a median over all that leaves NaN out would wait for the device.
        limit = self.factor * self._losses[: min(self._seen, WINDOW)].median() if self._seen else mean
        self._losses[self._seen % WINDOW] = mean
        self._seen += 1
        if self._seen <= WARM_UP:
            return torch.zeros_like(mean)
        # A loss that has reached zero has no multiple.
        return torch.where(limit > 0, mean / limit, torch.zeros_like(mean))

    def state_dict(self) -> dict[str, torch.Tensor | int]:
        """What a resumed run needs to judge as this one would have."""
        return {"losses": self._losses.clone(), "seen": self._seen}

    def load_state_dict(self, state: dict[str, torch.Tensor | int]) -> None:
        """Continue from `state_dict`.

        Args:
            state: of a run with any factor, or empty.
        """
        if state:
            self._losses.copy_(torch.as_tensor(state["losses"]))
            self._seen = int(state["seen"])
