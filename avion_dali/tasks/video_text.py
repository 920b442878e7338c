"""Tasks of a dual encoder: contrastive pre-training and retrieval fine-tuning, both evaluated by retrieval."""

from __future__ import annotations

from dataclasses import replace
from typing import Final, cast

from torch import nn

from avion_dali.config import TrainConfig
from avion_dali.data.manifest import Manifest
from avion_dali.data.relevancy import open_captions
from avion_dali.engine.protocols import Objective
from avion_dali.models.dual_encoder import DualEncoder, build_dual_encoder
from avion_dali.objectives.contrastive import Contrastive
from avion_dali.objectives.max_margin import MaxMargin
from avion_dali.tasks.requirements import require_in_every_row
from avion_dali.tasks.retrieval_scoring import RetrievalScorer, build_gallery
from avion_dali.tasks.task import Task, no_constraint


def _check(config: TrainConfig, manifest: Manifest) -> None:
    if config.data.text == "own":
        require_in_every_row(manifest, "text", objective=config.objective.name)


def _build_model(config: TrainConfig, _num_classes: int) -> nn.Module:
    return build_dual_encoder(
        config.model, num_frames=config.data.num_frames, frame_size=config.data.frame_size
    )


def _build_contrastive(config: TrainConfig, _model: nn.Module, _manifest: Manifest) -> Objective:
    local_loss = config.objective.contrastive.local_loss
    return Contrastive(config.data.normalization, augment=config.augment, local_loss=local_loss)


def _build_max_margin(config: TrainConfig, _model: nn.Module, manifest: Manifest) -> Objective:
    settings = config.objective.max_margin
    is_graded = settings.loss == "symmetric-multi-similarity"
    captions = open_captions(manifest) if is_graded else None
    return MaxMargin(settings, config.data.normalization, captions, augment=config.augment)


def _build_scorer(config: TrainConfig, _model: nn.Module, manifest: Manifest) -> RetrievalScorer:
    return RetrievalScorer(build_gallery(manifest), normalization=config.data.normalization)


def _clamp_logit_scale(model: nn.Module) -> None:
    cast(DualEncoder, model).clamp_logit_scale()


CONTRASTIVE: Final = Task(
    command="pretrain",
    best_metric="map_avg",
    reads_texts=True,
    check=_check,
    build_model=_build_model,
    build_objective=_build_contrastive,
    build_scorer=_build_scorer,
    after_step=_clamp_logit_scale,
)

# Margin losses have no temperature, so there is nothing to clamp after a step.
MAX_MARGIN: Final = replace(
    CONTRASTIVE, command="finetune", build_objective=_build_max_margin, after_step=no_constraint
)
