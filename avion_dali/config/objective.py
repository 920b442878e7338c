"""What a training minimises: one name and one sub-section for each objective."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from avion_dali.config.checks import require


@dataclass(frozen=True)
class ContrastiveConfig:
    """InfoNCE over all clips and texts of a step.

    Args:
        local_loss: each rank scores its own rows against all columns; the same gradient, less memory for
            very many ranks.
    """

    local_loss: bool = False


@dataclass(frozen=True)
class MaxMarginConfig:
    """Retrieval fine-tuning with graded relevancy between clips and captions.

    Args:
        loss: `max-margin` (AVION, LaViLa), which ignores relevancy; or `symmetric-multi-similarity` (SMS,
            Wang et al. 2024), which grades pairs by it.
        margin: least distance between the cosines of a right pair and a wrong one; for SMS, between pairs whose
            relevancies are 1 and 0 (its recipes take 0.6).
        relaxation: SMS only: how far the cosines of equally relevant pairs may lie apart.
    """

    loss: Literal["max-margin", "symmetric-multi-similarity"] = "max-margin"
    margin: float = 0.2
    relaxation: float = 0.1

    def __post_init__(self) -> None:
        require(self.margin > 0, "objective.max_margin.margin", self.margin, "> 0")
        require(self.relaxation >= 0, "objective.max_margin.relaxation", self.relaxation, ">= 0")


@dataclass(frozen=True)
class ClassificationConfig:
    """Soft-target cross-entropy over the manifest's classes.

    Args:
        dropout: before the head.
        label_smoothing: share of a target spread over all classes.
        mixup: alpha of the Beta distribution of mixing weights; 0 for none.
        cutmix: the same for pasted boxes; with both, one is drawn for each step.
        mix_probability: chance that a step mixes at all.
        switch_probability: with both, chance that a mixing step takes CutMix.
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
            require(0 <= getattr(self, name) < 1, prefix + name, getattr(self, name), "in [0, 1)")
        for name in ("mixup", "cutmix"):
            require(getattr(self, name) >= 0, prefix + name, getattr(self, name), ">= 0 (0: none)")
        for name in ("mix_probability", "switch_probability"):
            require(0 <= getattr(self, name) <= 1, prefix + name, getattr(self, name), "in [0, 1]")


@dataclass(frozen=True)
class MaskedVideoConfig:
    """VideoMAE: predict the pixels of masked tubes.

    Args:
        mask_ratio: share of tubes hidden.
        decoder_depth: blocks of the decoder.
        normalize_target: predict each tube's pixels less their mean and divided by their deviation.
    """

    mask_ratio: float = 0.9
    decoder_depth: int = 4
    normalize_target: bool = True

    def __post_init__(self) -> None:
        prefix = "objective.masked_video."
        require(0 < self.mask_ratio < 1, prefix + "mask_ratio", self.mask_ratio, "in (0, 1)")
        require(self.decoder_depth >= 1, prefix + "decoder_depth", self.decoder_depth, ">= 1")


@dataclass(frozen=True)
class ObjectiveConfig:
    """Which objective, and the settings of each.

    Args:
        name: `contrastive` (video-text pre-training), `max-margin` (retrieval fine-tuning), `classification`
            (recognition) or `masked-video` (VideoMAE pre-training).
        contrastive: settings of that objective.
        max_margin: settings of that objective.
        classification: settings of that objective.
        masked_video: settings of that objective.
    """

    name: str = "contrastive"
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    max_margin: MaxMarginConfig = field(default_factory=MaxMarginConfig)
    classification: ClassificationConfig = field(default_factory=ClassificationConfig)
    masked_video: MaskedVideoConfig = field(default_factory=MaskedVideoConfig)
