"""Typed configuration: YAML files and the command line fill these dataclasses.

Every field is checked here, once; a message names the key and what is allowed. No defaults are hidden
elsewhere, and a recipe in `configs/` writes only the fields that differ from these.
"""

from avion_dali.config.commands import EvaluateConfig, TrainConfig
from avion_dali.config.data import (
    CPU_DECODERS,
    AugmentConfig,
    Crop,
    DataConfig,
    Decoder,
    Normalization,
    Sampling,
)
from avion_dali.config.model import (
    DEFAULT_NORM_EPS,
    Activation,
    AttentionBackend,
    ModelConfig,
    ModelSize,
    TemporalResize,
)
from avion_dali.config.objective import (
    ClassificationConfig,
    ContrastiveConfig,
    MaskedVideoConfig,
    MaxMarginConfig,
    ObjectiveConfig,
    ObjectiveName,
)
from avion_dali.config.optim import OptimConfig, RunConfig

__all__ = [
    "CPU_DECODERS",
    "DEFAULT_NORM_EPS",
    "Activation",
    "AttentionBackend",
    "AugmentConfig",
    "ClassificationConfig",
    "ContrastiveConfig",
    "Crop",
    "DataConfig",
    "Decoder",
    "EvaluateConfig",
    "MaskedVideoConfig",
    "MaxMarginConfig",
    "ModelConfig",
    "ModelSize",
    "Normalization",
    "ObjectiveConfig",
    "ObjectiveName",
    "OptimConfig",
    "RunConfig",
    "Sampling",
    "TemporalResize",
    "TrainConfig",
]
