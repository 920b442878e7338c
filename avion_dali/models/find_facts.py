"""Determines the facts about weights, from the header of this project's files or by inspecting other files."""

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

# Activation, LayerNorm epsilon and pixel statistics of the training. AVION combines CLIP's weights with exact
# GELU; LaViLa and AVION have a mistyped red mean (see device_ops/normalize.py); EgoVLP starts from ImageNet
# weights.
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
    """Read the facts about a file of this project from its configuration.

    Args:
        config: configuration of the training as plain values; fields that an older version did not have take
            their defaults.
        state: our name to tensor; only the number of classes of the head is read from it.

    Raises:
        UserError: when the encoder is unknown.
    """
    known = {item.name for item in fields(ModelConfig)}
    values = {name: value for name, value in config.get("model", {}).items() if name in known}
    model, data = resolve_model(ModelConfig(**values)), config.get("data", {})
    preset, head = PRESETS[model.size], state.get("fc_cls.weight")
    objective = config.get("objective", {}).get("name", ObjectiveConfig.name)
    role = _ROLES.get(objective) or role_of(state)  # a user's objective trains one of these models as well
    if role == "classifier" and head is None:  # a converted tower of another project
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
    """Infer the facts about weights of another project from names, shapes and the family's published settings.

    Args:
        state: our name to tensor.
        family: the project of the file.
        known: further known facts (from a published name), which override those of the family.

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
    """Return the kind of model to which a state dict in our names belongs.

    Args:
        state: our name to tensor.
    """
    if "mask_token" in state:
        return "masked-video"
    if "fc_cls.weight" in state:
        return "classifier"
    return "dual-encoder" if "logit_scale" in state else "video-tower"


def _frames(state: Mapping[str, Tensor], layout: TowerLayout) -> int:
    """Read the frames per clip from the frame positions; 1 for an image model without them, 0 if unknown."""
    names = [f"visual.{table}" for table in layout.frame_positions]
    rows = [state[name].shape[-2] for name in names if name in state]
    return rows[0] if rows else int(bool(names))


def _grid(state: Mapping[str, Tensor], layout: TowerLayout) -> int:
    """Read the number of patches along a frame's side from the place positions; 0 if these are not stored."""
    names = [f"visual.{table}" for table in layout.place_positions]
    rows = [state[name].shape[-2] for name in names if name in state]
    return math.isqrt(rows[0] - layout.class_token) if rows else 0
