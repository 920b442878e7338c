"""Held-out loss of masked-video pre-training, with the same masks every time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn

from avion_dali.contracts import ClipBatch, UserError
from avion_dali.device_ops.randomness import StepKey
from avion_dali.engine.distributed import Distributed
from avion_dali.engine.per_sample import SampleSums
from avion_dali.engine.precision import Precision, autocast
from avion_dali.objectives.masked_video import MaskedReconstruction

FIXED_MASKS: Final = StepKey(seed=0, step=0)


@dataclass(frozen=True)
class MaskedResult:
    """Outcome of an evaluation of masked-video pre-training, the same on every rank.

    Args:
        loss: mean squared error.
        clips: samples in the mean.
        unreadable: clips that could not be read and are in no mean.
    """

    loss: float
    clips: int
    unreadable: int

    def metrics(self) -> dict[str, float]:
        """Return the numbers to log; `reconstruction` is the error with its sign turned: larger is better."""
        return {
            "reconstruction": -self.loss,
            "loss": self.loss,
            "clips": self.clips,
            "unreadable": self.unreadable,
        }


def evaluate_masked(
    model: nn.Module,
    batches: Iterable[ClipBatch],
    objective: MaskedReconstruction,
    *,
    precision: Precision,
    distributed: Distributed,
) -> MaskedResult:
    """Mean reconstruction error over a manifest.

    A sample's mask depends on its manifest row and crop alone: the same in every evaluation, run and number of
    ranks, so that numbers compare.

    Args:
        model: the bare `MaskedVideo`, in evaluation mode.
        batches: this rank's share of the manifest's clips.
        objective: as trained with.
        precision: of the forward passes.
        distributed: this rank among all.

    Raises:
        UserError: when not one clip could be read.
    """
    sums = SampleSums()
    with torch.inference_mode():
        for batch in batches:
            if not len(batch):  # the last share of a rank may be empty
                continue
            with autocast(precision, distributed.device):
                (errors_B,) = objective.outputs(model, batch, FIXED_MASKS)
            sums.add(batch, errors_B[:, None])
        samples = sums.gather(1, distributed.device)
    if not len(samples.sample_ids):
        raise UserError(f"not one of {samples.unreadable} evaluation clips could be read; see quarantine.jsonl")
    loss = float(samples.means_SX.mean(dtype="float64"))
    return MaskedResult(loss, len(samples.sample_ids), samples.unreadable)
