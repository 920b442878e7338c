"""The evaluation loop: scores every clip and averages the scores of a sample over its clips and views.

Axes: B clips, V views of a clip, T frames, H W pixels, C channels, X numbers per sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from avion_dali.contracts import ClipBatch, UserError
from avion_dali.engine.distributed import Distributed
from avion_dali.engine.precision import Precision, autocast
from avion_dali.tasks.sample_means import PerSample, SampleSums

FramesTransform = Callable[[Tensor], Tensor]


class EvaluationResult(Protocol):
    """Outcome of an evaluation, the same on every rank."""

    def metrics(self) -> dict[str, float]:
        """Return the numbers to log, including the task's best metric."""


ResultT_co = TypeVar("ResultT_co", covariant=True)


class Scorer(Protocol[ResultT_co]):
    """Computes one kind of evaluation from a model's outputs."""

    def scores(self, model: nn.Module, batch: ClipBatch) -> Tensor:
        """Score one batch.

        Args:
            model: the bare model, in evaluation mode.
            batch: B samples of V views each.

        Returns:
            Float (B*V, X), one row of numbers per view; they must be meaningful when averaged over views.
        """

    def result(self, model: nn.Module, samples: PerSample, device: torch.device) -> ResultT_co:
        """Compute the result from the means of all samples.

        Args:
            model: the bare model, in evaluation mode.
            samples: means over each sample's clips and views, the same on every rank; at least one sample.
            device: device of the model.
        """


def evaluate(
    model: nn.Module,
    batches: Iterable[ClipBatch],
    scorer: Scorer[ResultT_co],
    *,
    precision: Precision,
    distributed: Distributed,
    transform: FramesTransform | None = None,
) -> ResultT_co:
    """Score all samples of a manifest; every rank must call it.

    Args:
        model: the bare model, in evaluation mode.
        batches: this rank's part of the manifest's clips, with any number of clips per row and views per clip.
        scorer: computes the scores of a batch and the result.
        precision: precision of the forward passes.
        distributed: this process among all processes of the run.
        transform: changes frames, uint8 (B*V, T, H, W, C), before the model, for controls such as
            `freeze_first_frame`.

    Returns:
        The result of the scorer, the same on every rank.

    Raises:
        UserError: when no clip could be read.
    """
    device, sums = distributed.device, SampleSums()
    with torch.inference_mode():
        for batch in batches:
            if not len(batch):  # the last batch of a rank may be empty
                continue
            if transform is not None:
                batch = replace(batch, frames_BTHWC=transform(batch.frames_BTHWC))
            with autocast(precision, device):
                scores_BX = scorer.scores(model, batch)
            sums.add(batch, scores_BX)
        samples = sums.gather(device)
        if not len(samples.sample_ids):
            raise UserError(
                f"none of the {samples.unreadable} evaluation clips could be read; see quarantine.jsonl"
            )
        with autocast(precision, device):
            return scorer.result(model, samples, device)


def freeze_first_frame(frames_BTHWC: Tensor) -> Tensor:
    """Repeat each clip's first frame, as a control that removes the motion of a clip but keeps its appearance.

    Args:
        frames_BTHWC: uint8 (B, T, H, W, C).
    """
    return frames_BTHWC[:, :1].expand_as(frames_BTHWC).contiguous()
