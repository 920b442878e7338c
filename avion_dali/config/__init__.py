"""Typed configuration: YAML files and the command line fill these dataclasses.

Every field is checked once, when a configuration is created; error messages name the key and its allowed
values. All defaults are defined here, and a recipe in `configs/` contains only the fields that differ from
them.
"""

from avion_dali.config.commands import EvaluateConfig, TrainConfig
from avion_dali.config.dali import DaliConfig
from avion_dali.config.data import (
    AugmentConfig,
    ClipOptions,
    DataConfig,
    LoaderOptions,
    Normalization,
    Sampling,
)
from avion_dali.config.model import (
    DEFAULT_NORM_EPS,
    Activation,
    AttentionBackend,
    CompileMode,
    ModelConfig,
    ModelSize,
    ResidualDtype,
    TemporalResize,
)
from avion_dali.config.objective import (
    ClassificationConfig,
    ContrastiveConfig,
    MaskedVideoConfig,
    MaxMarginConfig,
    ObjectiveConfig,
)
from avion_dali.config.optim import OptimConfig, RunConfig

__all__ = [
    "DEFAULT_NORM_EPS",
    "Activation",
    "AttentionBackend",
    "AugmentConfig",
    "ClassificationConfig",
    "ClipOptions",
    "CompileMode",
    "ContrastiveConfig",
    "DaliConfig",
    "DataConfig",
    "EvaluateConfig",
    "LoaderOptions",
    "MaskedVideoConfig",
    "MaxMarginConfig",
    "ModelConfig",
    "ModelSize",
    "Normalization",
    "ObjectiveConfig",
    "OptimConfig",
    "ResidualDtype",
    "RunConfig",
    "Sampling",
    "TemporalResize",
    "TrainConfig",
]
