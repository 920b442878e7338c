"""What each objective trains and how it is judged: model, objective and evaluation belong together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import nn

from avion_dali.config import ObjectiveName, TrainConfig
from avion_dali.contracts import ClipBatch, UserError
from avion_dali.data.classes import ClassTable
from avion_dali.data.manifest import Manifest
from avion_dali.data.relevancy import open_captions
from avion_dali.engine.distributed import Distributed
from avion_dali.engine.evaluate import FramesTransform, RetrievalResult, build_gallery, evaluate_retrieval
from avion_dali.engine.evaluate_classes import ClassResult, evaluate_classes
from avion_dali.engine.evaluate_masked import MaskedResult, evaluate_masked
from avion_dali.engine.precision import AUTOCAST_DTYPES, resolve_precision
from avion_dali.engine.protocols import Objective
from avion_dali.models.attention import resolve_attention
from avion_dali.models.classifier import build_classifier
from avion_dali.models.dual_encoder import DualEncoder, build_dual_encoder
from avion_dali.models.masked_video import MaskedVideo, build_masked_video
from avion_dali.objectives.classification import Classification
from avion_dali.objectives.contrastive import Contrastive
from avion_dali.objectives.masked_video import MaskedReconstruction
from avion_dali.objectives.max_margin import MaxMargin

EvaluationResult = RetrievalResult | ClassResult | MaskedResult
Evaluate = Callable[[Iterable[ClipBatch], FramesTransform | None], EvaluationResult]

BEST_METRIC: Final[dict[ObjectiveName, str]] = {
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
    after_step: Callable[[], None] | None = None


def build_model(config: TrainConfig, device: torch.device, *, num_classes: int = 0) -> nn.Module:
    """Create the model of an objective with weights drawn from the run's seed.

    Args:
        config: the run's configuration.
        device: where it goes.
        num_classes: of a recognition model.

    Raises:
        UserError: when the encoder does not fit the objective or the frames, or the attention kernel asked for
            cannot run.
    """
    precision = resolve_precision(config.run.precision, device)
    kernel = resolve_attention(config.model.attention, device, AUTOCAST_DTYPES[precision])
    config = replace(config, model=replace(config.model, attention=kernel))
    torch.manual_seed(config.run.seed)
    objective, frames, size = config.objective, config.data.num_frames, config.data.frame_size
    model: nn.Module
    if objective.name in ("contrastive", "max-margin"):
        model = build_dual_encoder(config.model, num_frames=frames, frame_size=size)
    elif objective.name == "classification":
        model = build_classifier(
            config.model,
            num_classes=num_classes,
            num_frames=frames,
            frame_size=size,
            dropout=objective.classification.dropout,
        )
    elif config.model.encoder != "videomae":
        raise UserError(
            f"objective.name = masked-video trains model.encoder videomae, not {config.model.encoder}; set it"
        )
    else:
        depth = objective.masked_video.decoder_depth
        model = build_masked_video(config.model, num_frames=frames, frame_size=size, decoder_depth=depth)
    return model.to(device)


def _require_partners(config: TrainConfig) -> None:
    """Refuse mixing where a micro-batch holds one clip: it would silently do nothing."""
    mixing = config.objective.classification
    mixes = (mixing.mixup or mixing.cutmix) and mixing.mix_probability
    if mixes and config.optim.micro_batch * config.data.repeats < 2:
        raise UserError(
            "objective.classification.mixup and cutmix mix clips of a micro-batch: set optim.micro_batch to "
            "2 or more, or both of them to 0"
        )


def build_task(config: TrainConfig, manifest: Manifest, device: torch.device) -> Task:
    """Create the model and the objective that a configuration names.

    Args:
        config: the run's configuration.
        manifest: the training manifest.
        device: where the model goes.

    Raises:
        UserError: when the manifest lacks what the objective needs, or the parts do not go together.
    """
    objective, normalization = config.objective, config.data.normalization
    if objective.name == "classification":
        num_classes = len(class_table(manifest))
        _require_in_every_row(manifest, "label", objective.name)
        _require_partners(config)
        recognition = Classification(
            objective.classification, config.augment, normalization=normalization, num_classes=num_classes
        )
        return Task(build_model(config, device, num_classes=num_classes), recognition)
    model = build_model(config, device)
    if isinstance(model, MaskedVideo):
        return Task(model, _reconstruction(config, model))
    assert isinstance(model, DualEncoder)
    if config.data.text == "own":
        _require_in_every_row(manifest, "text", objective.name)
    if objective.name == "max-margin":
        is_graded = objective.max_margin.loss == "symmetric-multi-similarity"
        captions = open_captions(manifest) if is_graded else None
        return Task(model, MaxMargin(objective.max_margin, normalization, captions, augment=config.augment))
    local_loss = objective.contrastive.local_loss
    contrastive = Contrastive(normalization, augment=config.augment, local_loss=local_loss)
    return Task(model, contrastive, model.clamp_logit_scale)


def build_evaluation(
    config: TrainConfig, model: nn.Module, manifest: Manifest, distributed: Distributed
) -> Evaluate:
    """Return a function that scores the model, as it stands, on batches of a manifest.

    Its second argument changes the frames, see `evaluate_retrieval`.

    Args:
        config: the run's configuration.
        model: the bare model.
        manifest: the evaluation manifest.
        distributed: this rank among all.

    Raises:
        UserError: when the manifest lacks what the evaluation needs.
    """
    precision = resolve_precision(config.run.precision, distributed.device)
    on: dict[str, Any] = {"precision": precision, "distributed": distributed}
    if isinstance(model, MaskedVideo):
        objective = _reconstruction(config, model)

        def reconstruct(batches: Iterable[ClipBatch], transform: FramesTransform | None) -> MaskedResult:
            if transform is not None:
                raise UserError("frozen_frames is for models that recognise or retrieve; leave it out")
            return evaluate_masked(model, batches, objective, **on)

        return reconstruct
    on["normalization"] = config.data.normalization
    if isinstance(model, DualEncoder):
        gallery = build_gallery(manifest)
        return lambda batches, transform: evaluate_retrieval(model, batches, gallery, transform=transform, **on)
    classes = class_table(manifest)
    return lambda batches, transform: evaluate_classes(model, batches, classes, transform=transform, **on)


def class_table(manifest: Manifest) -> ClassTable:
    """Return the classes that a manifest's labels count.

    Args:
        manifest: a manifest for recognition.

    Raises:
        UserError: when it has no labels.
    """
    if manifest.classes is None:
        raise UserError(
            f"{manifest.folder} has no class labels, which objective.name = classification needs; build it "
            "with a `label` column, or with `avion-dali manifest ek100 --task recognition` or `kinetics`"
        )
    return manifest.classes


def _reconstruction(config: TrainConfig, model: MaskedVideo) -> MaskedReconstruction:
    return MaskedReconstruction(
        config.objective.masked_video,
        normalization=config.data.normalization,
        time_slots=model.time_slots,
        places=model.places,
    )


def _require_in_every_row(manifest: Manifest, what: Literal["label", "text"], objective: ObjectiveName) -> None:
    """Look before the training does: a missing label would stop it at some step, a missing text spoil it."""
    with pa.memory_map(str(manifest.folder / "samples.arrow")) as file:
        reader = pa.ipc.open_file(file)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        if what == "label":
            missing = sum(pc.sum(pc.less(batch["label"], 0)).as_py() or 0 for batch in batches)
        else:
            counts = (pc.list_value_length(batch["texts"]) for batch in batches)
            missing = sum(pc.sum(pc.equal(count, 0)).as_py() or 0 for count in counts)
    if missing:
        raise UserError(
            f"{manifest.folder}: {missing} of {manifest.num_samples} rows have no {what}, and "
            f"objective.name = {objective} needs one in each; leave them out of the annotations"
        )
