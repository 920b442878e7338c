"""Recognition: a classifier trained on labeled clips, evaluated by the accuracy of its averaged scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import nn

from avion_dali.config import Normalization, TrainConfig
from avion_dali.contracts import ClipBatch, UserError
from avion_dali.data.classes import ClassTable
from avion_dali.data.manifest import Manifest
from avion_dali.device_ops.normalize import normalize_frames
from avion_dali.engine.protocols import Objective
from avion_dali.metrics.accuracy import class_scores, softmax
from avion_dali.models.classifier import build_classifier
from avion_dali.objectives.classification import Classification
from avion_dali.tasks.requirements import class_table, require_in_every_row
from avion_dali.tasks.sample_means import PerSample
from avion_dali.tasks.task import Task


@dataclass(frozen=True)
class ClassResult:
    """Result of a recognition evaluation, the same on every rank.

    Args:
        scores: accuracies of the mean probabilities over a sample's clips and views, which is VideoMAE's way of
            averaging; see `class_scores`.
        logit_scores: accuracies of the mean logits, which AVION also reports. They are equal to `scores` if
            each sample has one view.
        probabilities_NK: float32 mean probabilities of each scored sample.
        labels: int64 (N,), classes of these samples.
        sample_ids: int64 (N,), manifest rows of these samples.
        names: class names.
        unreadable: number of clips that could not be read; the means exclude them.
    """

    scores: dict[str, float]
    logit_scores: dict[str, float]
    probabilities_NK: np.ndarray
    labels: np.ndarray
    sample_ids: np.ndarray
    names: tuple[str, ...]
    unreadable: int

    def metrics(self) -> dict[str, float]:
        """Return the numbers to log; accuracies are fractions, for verbs and nouns if classes have them."""
        return {
            **self.scores,
            "top1_of_mean_logits": self.logit_scores["top1"],
            "top5_of_mean_logits": self.logit_scores["top5"],
            "clips": len(self.sample_ids),
            "unreadable": self.unreadable,
        }


class ClassScorer:
    """Classifies clips and averages both probabilities and logits over a sample's clips and views.

    Every rank needs about 30 bytes of memory per sample and class, for any number of clips and views: 1.1 GB
    for the 9,668 clips and 3,806 actions of EPIC-KITCHENS-100.

    Args:
        classes: classes of the manifest.
        normalization: pixel statistics that the model expects.
    """

    def __init__(self, classes: ClassTable, *, normalization: Normalization) -> None:
        self.classes, self.normalization = classes, normalization

    def scores(self, model: nn.Module, batch: ClipBatch) -> torch.Tensor:
        """Return probabilities and logits side by side.

        Args:
            model: maps frames (B*V, 3, T, H, W) to logits (B*V, K).
            batch: B samples of V views each.

        Returns:
            Float32 (B*V, 2 K).

        Raises:
            UserError: when the model and the manifest have different numbers of classes.
        """
        logits_BK = model(normalize_frames(batch.frames_BTHWC, self.normalization)).float()
        if logits_BK.shape[1] != len(self.classes):
            raise UserError(
                f"the model has {logits_BK.shape[1]} classes, the manifest has {len(self.classes)}; build the "
                "manifest with the classes of the training manifest (--classes-from)"
            )
        return torch.cat([logits_BK.softmax(dim=1), logits_BK], dim=1)

    def result(self, model: nn.Module, samples: PerSample, device: torch.device) -> ClassResult:
        """Compare the means with the labels.

        Args:
            model: not used, because the means are sufficient.
            samples: mean probabilities and logits.
            device: not used, because accuracies are computed in numpy.

        Raises:
            UserError: when a row has no class.
        """
        del model, device
        probabilities_NK, logits_NK = np.split(samples.means_SX, 2, axis=1)
        parts = {"verbs": self.classes.verbs, "nouns": self.classes.nouns}
        return ClassResult(
            class_scores(probabilities_NK, samples.labels, **parts),
            class_scores(softmax(logits_NK), samples.labels, **parts),
            probabilities_NK,
            samples.labels,
            samples.sample_ids,
            self.classes.names,
            samples.unreadable,
        )


def _check(config: TrainConfig, manifest: Manifest) -> None:
    """Reject rows without a class, and mixing if a micro-batch holds one clip."""
    class_table(manifest)
    require_in_every_row(manifest, "label", objective=config.objective.name)
    mixing = config.objective.classification
    mixes = (mixing.mixup or mixing.cutmix) and mixing.mix_probability
    if mixes and config.optim.micro_batch == config.data.repeats == 1:
        raise UserError(
            "objective.classification.mixup and cutmix mix the clips of a micro-batch and have no effect with "
            "one clip; set optim.micro_batch to 2 or more, or set both of them to 0"
        )


def _build_model(config: TrainConfig, num_classes: int) -> nn.Module:
    return build_classifier(
        config.model,
        num_classes=num_classes,
        num_frames=config.data.num_frames,
        frame_size=config.data.frame_size,
        dropout=config.objective.classification.dropout,
    )


def _build_objective(config: TrainConfig, _model: nn.Module, manifest: Manifest) -> Objective:
    return Classification(
        config.objective.classification,
        config.augment,
        normalization=config.data.normalization,
        num_classes=len(class_table(manifest)),
    )


def _build_scorer(config: TrainConfig, _model: nn.Module, manifest: Manifest) -> ClassScorer:
    return ClassScorer(class_table(manifest), normalization=config.data.normalization)


CLASSIFICATION: Final = Task(
    command="finetune",
    best_metric="top1",
    check=_check,
    build_model=_build_model,
    build_objective=_build_objective,
    build_scorer=_build_scorer,
    class_names=lambda manifest: class_table(manifest).names,
)
