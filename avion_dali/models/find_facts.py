"""Finding out what weights are: told by the header in files of this project, guessed for files of others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Final

from torch import Tensor

from avion_dali.config import ModelConfig, ObjectiveConfig
from avion_dali.models.convert import encoder_of_names
from avion_dali.models.layout import TowerLayout
from avion_dali.models.presets import PRESETS
from avion_dali.models.towers import ENCODERS, resolve_model
from avion_dali.models.weight_facts import Family, Role, WeightFacts

# Trained with: activation, LayerNorm epsilon, pixel statistics. AVION gave its models CLIP's weights and exact
# GELU; LaViLa and AVION share a mistyped mean of red (see device_ops/normalize.py); EgoVLP began from ImageNet.
_PUBLISHED: Final[dict[Family, dict[str, Any]]] = {
    "avion": {"activation": "gelu", "norm_eps": 1e-6, "normalization": "openai-avion"},
    "lavila": {"activation": "quick_gelu", "norm_eps": 1e-6, "normalization": "openai-avion"},
    "egovlp": {"activation": "gelu", "norm_eps": 1e-6, "normalization": "imagenet"},
    "videomae": {"activation": "gelu", "norm_eps": 1e-6, "normalization": "imagenet"},
    "open_clip": {"activation": None, "norm_eps": 1e-5, "normalization": "openai"},
}
_ROLES: Final[dict[str, Role]] = {
    "contrastive": "dual-encoder",
    "max-margin": "dual-encoder",
    "classification": "classifier",
    "masked-video": "masked-video",
}


def facts_of_config(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> WeightFacts:
    """Read from its configuration what a file of this project holds.

    Args:
        config: configuration of the training as plain values; fields that an older version did not have take
            their defaults.
        state: our name to tensor; asked for the head alone, whose number of classes no configuration holds.

    Raises:
        UserError: when the encoder is not known here.
    """
    known = {item.name for item in fields(ModelConfig)}
    told = {name: value for name, value in config.get("model", {}).items() if name in known}
    model, data = resolve_model(ModelConfig(**told)), config.get("data", {})
    preset, head = PRESETS[model.size], state.get("fc_cls.weight")
    objective = config.get("objective", {}).get("name", ObjectiveConfig.name)
    role = _ROLES.get(objective) or role_of(state)  # an objective of a user trains one of these models, too
    if role == "classifier" and head is None:  # a tower of another project, converted
        role = "video-tower"
    assert model.activation != "auto"
    return WeightFacts(
        family="avion_dali",
        role=role,
        encoder=model.encoder,
        activation=model.activation,
        norm_eps=model.norm_eps,
        pre_norm=model.pre_norm,
        normalization=data.get("normalization"),
        num_frames=data.get("num_frames", 0),
        frame_size=data.get("frame_size", 0),
        patch_size=preset.patch_size,
        width=preset.video_width,
        layers=preset.video_layers,
        embed_dim=model.embed_dim if role == "dual-encoder" else 0,
        context_length=model.context_length if role == "dual-encoder" else 0,
        num_classes=0 if head is None else head.shape[0],
    )


def guessed_facts(
    state: Mapping[str, Tensor], family: Family, *, known: Mapping[str, Any] | None = None
) -> WeightFacts:
    """Gather what names, shapes and the publisher tell about the weights of another project.

    Args:
        state: our name to tensor.
        family: whose file it was.
        known: facts from elsewhere (a published name) that replace the family's.

    Raises:
        UserError: when there is no video encoder.
    """
    encoder = encoder_of_names(state)
    layout = ENCODERS[encoder].layout
    root = "encoder." if "mask_token" in state else "visual."
    patches, blocks = state[root + layout.patches], f"{root}{layout.blocks}."
    layers = {name.removeprefix(blocks).split(".")[0] for name in state if name.startswith(blocks)}
    projection, text = state.get("visual.image_projection"), state.get("textual.positional_embedding")
    head, norm = state.get("fc_cls.weight"), layout.optional_pre_norm
    shapes: dict[str, Any] = {
        "role": role_of(state),
        "encoder": encoder,
        "pre_norm": not norm or f"{root}{norm}.weight" in state,
        "num_frames": _frames(state, layout),
        "frame_size": _grid(state, layout) * patches.shape[-1],
        "patch_size": patches.shape[-1],
        "width": patches.shape[0],
        "layers": len(layers),
        "embed_dim": 0 if projection is None else projection.shape[1],
        "context_length": 0 if text is None else text.shape[0],
        "num_classes": 0 if head is None else head.shape[0],
    }
    return WeightFacts(family=family, **{**_PUBLISHED[family], **shapes, **(known or {})})


def role_of(state: Mapping[str, Tensor]) -> Role:
    """Tell what kind of model a state dict in our names belongs to.

    Args:
        state: our name to tensor.
    """
    if "mask_token" in state:
        return "masked-video"
    if "fc_cls.weight" in state:
        return "classifier"
    return "dual-encoder" if "logit_scale" in state else "video-tower"


def _frames(state: Mapping[str, Tensor], layout: TowerLayout) -> int:
    """Frames per clip by the frame positions; 1 for an image model without them, 0 when the tower has none."""
    names = [f"visual.{table}" for table in layout.frame_positions]
    rows = [state[name].shape[-2] for name in names if name in state]
    return rows[0] if rows else int(bool(names))


def _grid(state: Mapping[str, Tensor], layout: TowerLayout) -> int:
    """Patches along a side of a frame by the place positions; 0 where these are not stored."""
    names = [f"visual.{table}" for table in layout.place_positions]
    rows = [state[name].shape[-2] for name in names if name in state]
    return math.isqrt(rows[0] - layout.class_token) if rows else 0
