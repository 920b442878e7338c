"""Settings of the objectives: the name of the chosen one, and one section per objective."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from avion_dali.config.checks import require


@dataclass(frozen=True)
class ContrastiveConfig:
    """InfoNCE over all clips and texts of a step.

    Args:
        local_loss: each rank scores only its own clips and texts against those of all ranks. The gradient is
            the same, and memory is saved with very many ranks.
    """

    local_loss: bool = False


@dataclass(frozen=True)
class MaxMarginConfig:
    """Retrieval fine-tuning on clips and captions.

    Args:
        loss: `max-margin` (AVION, LaViLa), which ignores relevancy; or `symmetric-multi-similarity` (SMS,
            Wang et al. 2024), which scales margins by relevancy.
        margin: required difference between the cosines of a matching and a non-matching pair; for SMS, between
            pairs with relevancies 1 and 0 (its recipes use 0.6).
        relaxation: SMS only: allowed difference between the cosines of equally relevant pairs.
    """

    loss: Literal["max-margin", "symmetric-multi-similarity"] = "max-margin"
    margin: float = 0.2
    relaxation: float = 0.1

    def __post_init__(self) -> None:
        require(self.margin > 0, "objective.max_margin.margin", value=self.margin, allowed="> 0")
        require(self.relaxation >= 0, "objective.max_margin.relaxation", value=self.relaxation, allowed=">= 0")


@dataclass(frozen=True)
class ClassificationConfig:
    """Soft-target cross-entropy over the manifest's classes.

    Args:
        dropout: dropout probability before the head.
        label_smoothing: part of a target's probability that is spread over all classes.
        mixup: alpha of the Beta distribution of mixup weights; 0 turns mixup off.
        cutmix: alpha of the Beta distribution of CutMix weights; 0 turns CutMix off. If both are on, each step
            uses one of them.
        mix_probability: probability that a step mixes clips.
        switch_probability: if both are on, probability that a mixing step uses CutMix.
    """

    dropout: float = 0.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float = 1.0
    switch_probability: float = 0.5

    def __post_init__(self) -> None:
        prefix = "objective.classification."
        for name in ("dropout", "label_smoothing"):
            require(0 <= getattr(self, name) < 1, prefix + name, value=getattr(self, name), allowed="in [0, 1)")
        for name in ("mixup", "cutmix"):
            require(
                getattr(self, name) >= 0, prefix + name, value=getattr(self, name), allowed=">= 0 (0: none)"
            )
        for name in ("mix_probability", "switch_probability"):
            require(
                0 <= getattr(self, name) <= 1, prefix + name, value=getattr(self, name), allowed="in [0, 1]"
            )


@dataclass(frozen=True)
class MaskedVideoConfig:
    """VideoMAE: predicts the pixels of masked tubes.

    Args:
        mask_ratio: fraction of tubes that are hidden.
        decoder_depth: number of blocks of the MAE decoder.
        normalize_target: normalize the target pixels of each tube to zero mean and unit standard deviation.
    """

    mask_ratio: float = 0.9
    decoder_depth: int = 4
    normalize_target: bool = True

    def __post_init__(self) -> None:
        prefix = "objective.masked_video."
        require(0 < self.mask_ratio < 1, prefix + "mask_ratio", value=self.mask_ratio, allowed="in (0, 1)")
        require(self.decoder_depth >= 1, prefix + "decoder_depth", value=self.decoder_depth, allowed=">= 1")


@dataclass(frozen=True)
class ObjectiveConfig:
    """The chosen objective, and the settings of all objectives.

    Args:
        name: `contrastive` (video-text pre-training), `max-margin` (retrieval fine-tuning), `classification`
            (recognition) or `masked-video` (VideoMAE pre-training).
        contrastive: settings of `contrastive`.
        max_margin: settings of `max-margin`.
        classification: settings of `classification`.
        masked_video: settings of `masked-video`.
    """

    name: str = "contrastive"
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    max_margin: MaxMarginConfig = field(default_factory=MaxMarginConfig)
    classification: ClassificationConfig = field(default_factory=ClassificationConfig)
    masked_video: MaskedVideoConfig = field(default_factory=MaskedVideoConfig)
