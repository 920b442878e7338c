"""Stops or reports a run whose loss or gradient is not finite, or whose loss jumps."""

from __future__ import annotations

import json
import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from avion_dali.contracts import UserError
from avion_dali.engine.host_copy import HostCopy
from avion_dali.files import atomic_write_text
from avion_dali.wording import few

WINDOW = 100
"""Number of losses in the running median."""
WARM_UP = 20
"""Number of losses before any step can count as a spike."""


class NonFiniteLossError(UserError):
    """The loss or the gradient is infinite or NaN; the training stopped before saving the weights."""


class LossSpikeError(UserError):
    """The loss jumped, and `run.on_spike` is `stop`."""


class SpikeWatch:
    """Compares each loss with the median of the last `WINDOW` losses, on the device and without waiting for it.

    Spikes enter the window like all losses: a few of them hardly change the median, and if the loss stays high,
    the median follows within `WINDOW` / 2 steps.

    Args:
        factor: a loss above this multiple of the median is a spike.
        device: device of the losses.
    """

    def __init__(self, factor: float, device: torch.device) -> None:
        self.factor = factor
        self._losses = torch.full((WINDOW,), torch.nan, device=device)
        self._seen = 0

    def excess(self, loss: torch.Tensor) -> torch.Tensor:
        """Compare the loss of a step with the limit, and add it to the window.

        Args:
            loss: loss of this rank, ().

        Returns:
            The loss averaged over ranks divided by the limit, float32 (), equal on every rank; a value above 1
            is a spike. 0 while too few losses are known.
        """
        mean = loss.detach().float().clone()
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        # Only known losses, which come first in the window, because a median that skips NaN waits for the
        # device.
        limit = self.factor * self._losses[: min(self._seen, WINDOW)].median() if self._seen else mean
        self._losses[self._seen % WINDOW] = mean
        self._seen += 1
        if self._seen <= WARM_UP:
            return torch.zeros_like(mean)
        # If the median is zero, no loss can be compared with it.
        return torch.where(limit > 0, mean / limit, torch.zeros_like(mean))

    def state_dict(self) -> dict[str, torch.Tensor | int]:
        """Return the state that a resumed run needs to give the same results."""
        return {"losses": self._losses.clone(), "seen": self._seen}

    def load_state_dict(self, state: dict[str, torch.Tensor | int]) -> None:
        """Continue from saved state.

        Args:
            state: output of `state_dict`, for any factor; or empty.
        """
        if state:
            self._losses.copy_(torch.as_tensor(state["losses"]))
            self._seen = int(state["seen"])


@dataclass(frozen=True)
class LossSpike:
    """A step whose loss jumped.

    Args:
        step: number of the step, counted from 0.
        loss: loss of this rank.
        excess: loss averaged over ranks divided by the limit.
        sample_ids: manifest rows of the step's batch on this rank.
    """

    step: int
    loss: float
    excess: float
    sample_ids: list[int]


@dataclass(frozen=True)
class _Watched:
    """The numbers of one step, which may still be on their way to the host."""

    step: int
    values: HostCopy  # (3,) float32: loss, gradient norm, excess over the spike limit
    sample_ids: np.ndarray


class FiniteGuard:
    """Stops the run at the first loss or gradient norm that is not finite, without a device sync per step.

    On a GPU, the numbers of a step are copied in the background and checked one step later. All outstanding
    steps are checked before anything is saved or evaluated. On the CPU, a step is checked before it changes the
    weights.

    Loss spikes are found in the same way and collected until `take_spikes`.

    Args:
        output_dir: folder of `nonfinite.json`.
        rank: rank of this process; ranks other than 0 write `nonfinite.rank<N>.json`.
        stops_at_spikes: whether a loss spike stops the run as well.
    """

    def __init__(self, output_dir: Path, *, rank: int, stops_at_spikes: bool = False) -> None:
        self.stops_at_spikes = stops_at_spikes
        self._spikes: list[LossSpike] = []
        self.path = output_dir / ("nonfinite.json" if rank == 0 else f"nonfinite.rank{rank}.json")
        self._outstanding: deque[_Watched] = deque()

    def watch(
        self,
        step: int,
        *,
        loss: torch.Tensor,
        grad_norm: torch.Tensor,
        sample_ids: np.ndarray,
        excess: torch.Tensor | None = None,
    ) -> None:
        """Add the numbers of a step, and check those that have arrived.

        Args:
            step: number of the step, counted from 0.
            loss: () tensor.
            grad_norm: () tensor.
            sample_ids: manifest rows of the step's batch on this rank.
            excess: () tensor of `SpikeWatch.excess`, or None.

        Raises:
            NonFiniteLossError: see `check`.
            LossSpikeError: see `check`.
        """
        excess = torch.zeros_like(loss) if excess is None else excess
        values = HostCopy(torch.stack([value.detach().float() for value in (loss, grad_norm, excess)]))
        self._outstanding.append(_Watched(step, values, sample_ids))
        self.check(keep=0 if values.is_immediate else 1)

    def check(self, *, keep: int = 0) -> None:
        """Check the outstanding steps except the newest `keep`.

        Args:
            keep: number of the newest steps that may stay unchecked.

        Raises:
            NonFiniteLossError: a loss or gradient norm is not finite; the message names the step, and the
                samples of its batch are written to `path`.
            LossSpikeError: the loss jumped and `stops_at_spikes` is set.
        """
        while len(self._outstanding) > keep:
            watched = self._outstanding.popleft()
            loss, grad_norm, excess = watched.values.numbers().tolist()
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                self._stop(watched, loss=loss, grad_norm=grad_norm)
            if excess > 1:
                self._note_spike(watched, loss=loss, excess=excess)

    def take_spikes(self) -> list[LossSpike]:
        """Return the spikes that were found since the last call."""
        found, self._spikes = self._spikes, []
        return found

    def _note_spike(self, watched: _Watched, *, loss: float, excess: float) -> None:
        spike = LossSpike(watched.step, loss, excess, [int(row) for row in watched.sample_ids])
        if self.stops_at_spikes:
            raise LossSpikeError(
                f"step {watched.step}: the loss is {loss:.4g}, {excess:.3g} times the limit of "
                "run.spike_factor; the run stopped without saving this step. The batch contained samples "
                f"{few(spike.sample_ids, 8)}. Lower optim.learning_rate or set run.on_spike = skip, then "
                "resume from the last checkpoint"
            )
        self._spikes.append(spike)

    def _stop(self, watched: _Watched, *, loss: float, grad_norm: float) -> None:
        ids = [int(sample_id) for sample_id in watched.sample_ids]
        # Numbers are stored as strings, because JSON cannot represent infinity.
        record = {
            "step": watched.step,
            "loss": str(loss),
            "grad_norm": str(grad_norm),
            "sample_ids": ids,
        }
        atomic_write_text(self.path, json.dumps(record, indent=1))
        what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {grad_norm}"
        raise NonFiniteLossError(
            f"step {watched.step}: the {what}; the run stopped without saving this step. The batch contained "
            f"samples {few(ids, 8)} (all are listed in {self.path}). Lower optim.learning_rate, set "
            "optim.clip_grad_norm, or set run.precision = fp32, then resume from the last checkpoint"
        )
