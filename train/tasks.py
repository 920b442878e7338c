"""What each objective trains and how it is judged: model, objective and evaluation belong together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from avion_dali.config import TrainConfig
from avion_dali.contracts import ClipBatch, UserError
from avion_dali.data.manifest import Manifest
from avion_dali.data.relevancy import open_captions
from avion_dali.engine.distributed import Distributed
from avion_dali.engine.evaluate import FramesTransform, RetrievalResult, build_gallery, evaluate_retrieval
from avion_dali.engine.evaluate_classes import ClassResult, evaluate_classes
from avion_dali.engine.evaluate_masked import MaskedResult, evaluate_masked
from avion_dali.engine.loop import Objective
from avion_dali.engine.precision import resolve_precision
from avion_dali.models.classifier import build_classifier
from avion_dali.models.dual_encoder import build_dual_encoder
from avion_dali.models.masked_video import build_masked_video
from avion_dali.objectives.classification import Classification
from avion_dali.objectives.contrastive import Contrastive
from avion_dali.objectives.masked_video import MaskedReconstruction
from avion_dali.objectives.max_margin import MaxMargin

EvaluationResult = RetrievalResult | ClassResult | MaskedResult
Evaluate = Callable[[Iterable[ClipBatch], FramesTransform | None], EvaluationResult]

BEST_METRIC = {
    "contrastive": "map_avg",
    "max-margin": "map_avg",
    "classification": "top1",
    "masked-video": "reconstruction",
}
"""The number of an evaluation that the best checkpoint is chosen by; larger is better."""


@dataclass(frozen=True)
class Task:
    """A model and what to do with it.

    Args:
        model: fresh, on this rank's device.
        objective: batch to loss.
        after_step: called after every change of the weights; None for nothing.
    """

    model: nn.Module
    objective: Objective
    after_step: Callable[[], None] | None


def build_model(config: TrainConfig, device: torch.device, *, num_classes: int = 0) -> nn.Module:
    """Create the model of an objective with weights drawn from the run's seed.

    Args:
        config: the run's configuration.
        device: where it goes.
        num_classes: of a recognition model.
    """
    torch.manual_seed(config.run.seed)
    shape = {"num_frames": config.data.num_frames, "frame_size": config.data.frame_size}
    objective = config.objective
    model: nn.Module
    if objective.name in ("contrastive", "max-margin"):
        model = build_dual_encoder(config.model, **shape)
    elif objective.name == "classification":
        dropout = objective.classification.dropout
        model = build_classifier(config.model, **shape, num_classes=num_classes, dropout=dropout)
    else:
        model = build_masked_video(config.model, **shape, decoder_depth=objective.masked_video.decoder_depth)
    return model.to(device)


def build_task(config: TrainConfig, manifest: Manifest, device: torch.device) -> Task:
    """Create the model and the objective that a configuration names.

    Args:
        config: the run's configuration.
        manifest: the training manifest.
        device: where the model goes.

    Raises:
        UserError: when the manifest lacks what the objective needs.
    """
    objective, normalization = config.objective, config.data.normalization
    num_classes = class_count(manifest) if objective.name == "classification" else 0
    model = build_model(config, device, num_classes=num_classes)
    if objective.name == "contrastive":
        local = objective.contrastive.local_loss
        contrastive = Contrastive(normalization, augment=config.augment, local_loss=local)
        return Task(model, contrastive, model.clamp_logit_scale)
    if objective.name == "max-margin":
        captions = open_captions(manifest)
        return Task(model, MaxMargin(objective.max_margin, normalization, captions), None)
    if objective.name == "classification":
        settings = {"normalization": normalization, "num_classes": num_classes}
        return Task(model, Classification(objective.classification, config.augment, **settings), None)
    masking = {"time_slots": model.time_slots, "places": model.places}
    reconstruction = MaskedReconstruction(objective.masked_video, normalization=normalization, **masking)
    return Task(model, reconstruction, None)


def build_evaluation(
    config: TrainConfig, model: nn.Module, manifest: Manifest, distributed: Distributed
) -> Evaluate:
    """Return a function that scores the model, as it stands, on batches of a manifest.

    Args:
        config: the run's configuration.
        model: the bare model.
        manifest: the evaluation manifest.
        distributed: this rank among all.

    Raises:
        UserError: when the manifest lacks what the evaluation needs.
    """
    settings = {
        "normalization": config.data.normalization,
        "precision": resolve_precision(config.run.precision, distributed.device),
        "distributed": distributed,
    }
    name = config.objective.name
    if name in ("contrastive", "max-margin"):
        gallery = build_gallery(manifest)
        return lambda batches, transform: evaluate_retrieval(
            model, batches, gallery, transform=transform, **settings
        )
    if name == "classification":
        class_count(manifest)
        return lambda batches, transform: evaluate_classes(
            model, batches, manifest.classes, transform=transform, **settings
        )
    return lambda batches, transform: evaluate_masked(
        model, batches, config.objective.masked_video, transform=transform, **settings
    )


def class_count(manifest: Manifest) -> int:
    """Return how many classes a manifest's labels have.

    Args:
        manifest: a manifest for recognition.

    Raises:
        UserError: when it has no labels.
    """
    if manifest.classes is None:
        raise UserError(
            f"{manifest.folder} has no class labels, which objective.name = classification needs; build it with "
            "a `label` column, or with `avion-dali manifest ek100 --task recognition` or `kinetics`"
        )
    return len(manifest.classes.names)
