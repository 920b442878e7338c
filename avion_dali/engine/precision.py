"""Which number format a device computes in, and the guard that stops a run whose numbers broke."""

from __future__ import annotations

import json
import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from avion_dali.contracts import UserError
from avion_dali.files import atomic_write_text
from avion_dali.wording import few

Precision = Literal["fp32", "bf16", "fp16"]
AUTOCAST_DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


MAX_OVERFLOWS = 50
"""Overflowing steps in a row that end an fp16 run: each halves the loss scale, which is 1 after 16 of them."""


class NonFiniteLossError(UserError):
    """The loss or the gradient became infinite or not a number; training stopped before saving the weights."""


class LossSpikeError(UserError):
    """The loss jumped, and the run was told to stop then."""


def resolve_precision(name: Literal["auto", "fp32", "bf16", "fp16"], device: torch.device) -> Precision:
    """Pick the precision of a run.

    Args:
        name: what the user asked for; `auto` takes bf16 on GPUs with native bf16, fp16 on older ones and
            fp32 on the CPU.
        device: where the model computes.

    Returns:
        The precision to use.

    Raises:
        UserError: fp16 asked for on the CPU, which has no gradient scaler worth using.
    """
    if name == "fp16" and device.type != "cuda":
        raise UserError(f"run.precision = 'fp16' needs a GPU, this run computes on {device}; use fp32 or bf16")
    if name != "auto":
        return name
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """A fresh autocast context: its cache of cast weights must not outlive one forward pass."""
    return torch.autocast(
        device.type, dtype=AUTOCAST_DTYPES[precision], enabled=precision != "fp32", cache_enabled=True
    )


def gradient_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler:
    """A loss scaler for fp16; for the other precisions one that does nothing."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


class OverflowCount:
    """Lets fp16 gradients overflow now and then, but not for ever; the count stays on the device."""

    def __init__(self) -> None:
        self._in_a_row: torch.Tensor | None = None

    def watched_norm(self, grad_norm: torch.Tensor) -> torch.Tensor:
        """What `FiniteGuard` is to see of a gradient norm: 0 as long as overflows are few in a row.

        Args:
            grad_norm: (), before the scaler decides on the step.
        """
        is_broken = ~torch.isfinite(grad_norm)
        before = torch.zeros_like(grad_norm) if self._in_a_row is None else self._in_a_row
        self._in_a_row = (before + 1) * is_broken
        return torch.where(self._in_a_row >= MAX_OVERFLOWS, grad_norm, torch.zeros_like(grad_norm))


@dataclass(frozen=True)
class LossSpike:
    """A step whose loss jumped.

    Args:
        step: number of the step, counted from 0.
        loss: of this rank.
        excess: loss over all ranks divided by the limit.
        sample_ids: manifest rows of the step's batch on this rank.
    """

    step: int
    loss: float
    excess: float
    sample_ids: list[int]


@dataclass(frozen=True)
class _Watched:
    """One step's numbers on their way to the host."""

    step: int
    values: torch.Tensor  # (3,) float32 on the host: loss, gradient norm, excess over the spike limit
    arrived: torch.cuda.Event | None
    sample_ids: np.ndarray


class FiniteGuard:
    """Stops the run at the first loss or gradient norm that is not finite, without a device sync per step.

    On a GPU the numbers of a step are copied in the background and looked at one step later; before anything
    is saved, scored or logged, everything outstanding is looked at. On the CPU there is nothing to wait for,
    so a step is checked before it changes the weights.

    Loss spikes arrive the same way and collect in `spikes`, for the log to take away.

    Args:
        output_dir: folder that `nonfinite.json` is written to.
        rank: this process; ranks other than 0 write `nonfinite.rank<N>.json`.
        stops_at_spikes: end the run at a loss spike, too.
    """

    def __init__(self, output_dir: Path, *, rank: int, stops_at_spikes: bool = False) -> None:
        self.stops_at_spikes = stops_at_spikes
        self.spikes: list[LossSpike] = []
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
        """Remember a step's numbers and look at those that must have arrived.

        Args:
            step: number of the step, counted from 0.
            loss: () tensor.
            grad_norm: () tensor.
            sample_ids: manifest rows of the step's batch on this rank.
            excess: () tensor of `SpikeWatch`, if there is one.

        Raises:
            NonFiniteLossError: see `check`.
            LossSpikeError: see `check`.
        """
        excess = torch.zeros_like(loss) if excess is None else excess
        values = torch.stack([value.detach().float() for value in (loss, grad_norm, excess)])
        arrived = None
        if values.is_cuda:
            values = values.to("cpu", non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._outstanding.append(_Watched(step, values, arrived, sample_ids))
        self.check(keep=1 if arrived else 0)

    def check(self, *, keep: int = 0) -> None:
        """Look at the outstanding steps except the newest `keep`.

        Args:
            keep: how many of the newest steps may stay unchecked.

        Raises:
            NonFiniteLossError: a loss or gradient norm is not finite; names the step, and the samples of its
                batch are written to `path`.
            LossSpikeError: the loss jumped and `stops_at_spikes`.
        """
        while len(self._outstanding) > keep:
            watched = self._outstanding.popleft()
            if watched.arrived is not None:
                watched.arrived.synchronize()
            loss, grad_norm, excess = (float(value) for value in watched.values)
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                self._stop(watched, loss=loss, grad_norm=grad_norm)
            if excess > 1:
                self._note_spike(watched, loss=loss, excess=excess)

    def _note_spike(self, watched: _Watched, *, loss: float, excess: float) -> None:
        spike = LossSpike(watched.step, loss, excess, [int(row) for row in watched.sample_ids])
        if self.stops_at_spikes:
            raise LossSpikeError(
                f"step {watched.step}: the loss is {loss:.4g}, {excess:.3g} times what run.spike_factor "
                "allows; stopped, nothing was saved since. The batch held samples "
                f"{few(spike.sample_ids, 8)}. Lower optim.learning_rate, or take "
                "run.on_spike = skip, then resume from the last checkpoint"
            )
        self.spikes.append(spike)

    def _stop(self, watched: _Watched, *, loss: float, grad_norm: float) -> None:
        ids = [int(sample_id) for sample_id in watched.sample_ids]
        # Numbers as text: JSON has no word for infinity.
        record = {
            "step": watched.step,
            "loss": str(loss),
            "grad_norm": str(grad_norm),
            "sample_ids": ids,
        }
        atomic_write_text(self.path, json.dumps(record, indent=1))
        what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {grad_norm}"
        raise NonFiniteLossError(
            f"step {watched.step}: the {what}; stopped, nothing was saved since. The batch held samples "
            f"{few(ids, 8)} (all in {self.path}). Lower optim.learning_rate, "
            "set optim.clip_grad_norm, or take run.precision = fp32, then resume from the last checkpoint"
        )
