"""Recognition on a manifest with classes: every clip and crop of a row is scored, and scores are averaged."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import nn

from avion_dali.config import Normalization
from avion_dali.contracts import ClipBatch, UserError
from avion_dali.data.classes import ClassTable
from avion_dali.device_ops.normalize import normalize_frames
from avion_dali.engine.distributed import Distributed
from avion_dali.engine.evaluate import FramesTransform
from avion_dali.engine.per_sample import SampleSums
from avion_dali.engine.precision import Precision, autocast
from avion_dali.metrics.classification import ClassScores, class_scores, softmax


@dataclass(frozen=True)
class ClassResult:
    """Outcome of a recognition evaluation, the same on every rank.

    Args:
        scores: accuracies of the mean probabilities over a sample's clips and crops, as VideoMAE averages.
        logit_scores: accuracies of the mean logits, which AVION reports too; equal where a sample has one view.
        probabilities_NK: float32 mean probabilities of each scored sample.
        labels: int64 (N,), their classes.
        sample_ids: int64 (N,), their manifest rows.
        names: class names.
        unreadable: clips that could not be read and are in no mean.
    """

    scores: ClassScores
    logit_scores: ClassScores
    probabilities_NK: np.ndarray
    labels: np.ndarray
    sample_ids: np.ndarray
    names: tuple[str, ...]
    unreadable: int

    def metrics(self) -> dict[str, float]:
        """Return the numbers to log; accuracies are fractions, verbs and nouns only where classes have them."""
        measured = {name: value for name, value in asdict(self.scores).items() if value is not None}
        return {
            **measured,
            "top1_of_mean_logits": self.logit_scores.top1,
            "top5_of_mean_logits": self.logit_scores.top5,
            "clips": len(self.sample_ids),
            "unreadable": self.unreadable,
        }


def evaluate_classes(
    model: nn.Module,
    batches: Iterable[ClipBatch],
    classes: ClassTable,
    *,
    normalization: Normalization,
    precision: Precision,
    distributed: Distributed,
    transform: FramesTransform | None = None,
) -> ClassResult:
    """Classify all samples; averages run over a sample's clips and crops, wherever they were evaluated.

    Memory on every rank is about 30 bytes for a sample and class: for EPIC-KITCHENS-100's 9,668 clips and 3,806
    actions 1.1 GB at the end, however many clips and crops.

    Args:
        model: maps frames (B*V, 3, T, H, W) to logits (B*V, K), in evaluation mode.
        batches: this rank's share of the manifest's rows, any number of clips a row and crops a clip.
        classes: of the manifest and the model.
        normalization: pixel mean and deviation.
        precision: of the forward passes.
        distributed: this rank among all.
        transform: changes frames (B, T, H, W, C) before the model, for controls such as frozen frames.

    Raises:
        UserError: not one clip could be read, a row has no class, or the model has other classes.
    """
    device, sums = distributed.device, SampleSums()
    with torch.inference_mode():
        for batch in batches:
            if not len(batch):  # the last share of a rank may be empty
                continue
            frames = batch.frames_BTHWC if transform is None else transform(batch.frames_BTHWC)
            with autocast(precision, device):
                logits_BK = model(normalize_frames(frames, normalization)).float()
            if logits_BK.shape[1] != len(classes):
                raise UserError(
                    f"the model scores {logits_BK.shape[1]} classes, the manifest has {len(classes)}; build it "
                    "with the classes of the training's (--classes-from)"
                )
            sums.add(batch, torch.cat([logits_BK.softmax(dim=1), logits_BK], dim=1))
        samples = sums.gather(2 * len(classes), device)
    if not len(samples.sample_ids):
        raise UserError(f"not one of {samples.unreadable} evaluation clips could be read; see quarantine.jsonl")
    probabilities_NK, logits_NK = np.split(samples.means_SX, 2, axis=1)

    def scored(scores_NK: np.ndarray) -> ClassScores:
        return class_scores(scores_NK, samples.labels, verbs=classes.verbs, nouns=classes.nouns)

    return ClassResult(
        scored(probabilities_NK),
        scored(softmax(logits_NK)),
        probabilities_NK,
        samples.labels,
        samples.sample_ids,
        classes.names,
        samples.unreadable,
    )
