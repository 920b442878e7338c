"""What a file of weights is: architecture by its shapes, the rest by who published it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from torch import Tensor

from avion_dali.config import Activation, Encoder, ModelSize, Normalization
from avion_dali.models.convert import Family, encoder_of_names
from avion_dali.models.presets import PRESETS

Role = Literal["dual-encoder", "classifier", "masked-video", "video-tower"]


@dataclass(frozen=True)
class WeightFacts:
    """What is known of weights.

    Args:
        family: whose file it is.
        role: what is in it: both towers, a tower with a head, a masked-video model, or a tower alone.
        encoder: kind of the video tower.
        activation: what the weights were trained with; None when the file does not tell.
        norm_eps: LayerNorm epsilon of the video tower; 0 when the file does not tell.
        pre_norm: whether a norm stands before the first block; of TimeSformers only EgoVLP's has none.
        normalization: pixel statistics of the training; None when the file does not tell.
        num_frames: frames of a clip; 1 for image models, 0 when the weights do not tell.
        frame_size: side of a frame in pixels; 0 when the weights do not tell.
        patch_size: side of a patch in pixels.
        width: width of the video tower.
        layers: blocks of the video tower.
        embed_dim: width of the shared space; 0 without one.
        context_length: text tokens; 0 without a text tower.
        num_classes: classes of the head; 0 without one.
    """

    family: Family
    role: Role
    encoder: Encoder
    activation: Activation | None
    norm_eps: float
    pre_norm: bool
    normalization: Normalization | None
    num_frames: int
    frame_size: int
    patch_size: int
    width: int
    layers: int
    embed_dim: int
    context_length: int
    num_classes: int

    @property
    def size(self) -> ModelSize | None:
        """The row of presets with these dimensions, by frame size where several fit; None when none fits."""
        fitting = [name for name in PRESETS if self.fits(name)]
        exact = [name for name in fitting if PRESETS[name].image_size == self.frame_size]
        return next(iter(exact + fitting), None)

    def fits(self, size: ModelSize) -> bool:
        """Whether the video tower has the dimensions of a preset."""
        preset = PRESETS[size]
        own = (self.width, self.layers, self.patch_size)
        return own == (preset.video_width, preset.video_layers, preset.patch_size)


# Trained with: activation, LayerNorm epsilon, pixel statistics. AVION gave its models CLIP's weights and exact
# GELU; LaViLa and AVION share a mistyped mean of red (see device_ops/normalize.py); EgoVLP began from ImageNet.
_PUBLISHED: Final[dict[Family, dict[str, Any]]] = {
    "avion": {"activation": "gelu", "norm_eps": 1e-6, "normalization": "openai-avion"},
    "lavila": {"activation": "quick_gelu", "norm_eps": 1e-6, "normalization": "openai-avion"},
    "egovlp": {"activation": "gelu", "norm_eps": 1e-6, "normalization": "imagenet"},
    "videomae": {"activation": "gelu", "norm_eps": 1e-6, "normalization": "imagenet"},
    "open_clip": {"activation": None, "norm_eps": 1e-5, "normalization": "openai"},
    "avion_dali": {"activation": None, "norm_eps": 0.0, "normalization": None},
}


def facts_of(
    state: Mapping[str, Tensor], family: Family, *, known: Mapping[str, Any] | None = None
) -> WeightFacts:
    """Gather what is known of weights.

    Args:
        state: our name to tensor.
        family: whose file it was.
        known: facts from elsewhere (a header, a published name) that win over the family's.

    Raises:
        UserError: when there is no video encoder.
    """
    encoder = encoder_of_names(state)
    root = "encoder." if "mask_token" in state else "visual."
    patches = state[root + ("conv1.weight" if encoder == "vit" else "patch_embed.proj.weight")]
    block = re.compile(re.escape(root) + r"(?:transformer\.res)?blocks\.(\d+)\.")
    layers = {match.group(1) for match in map(block.match, state) if match}
    projection, text = state.get("visual.image_projection"), state.get("textual.positional_embedding")
    head = state.get("fc_cls.weight")
    shapes: dict[str, Any] = {
        "role": role_of(state),
        "encoder": encoder,
        "pre_norm": encoder != "timesformer" or "visual.ln_pre.weight" in state,
        "num_frames": _frames(state, encoder),
        "frame_size": _grid(state) * patches.shape[-1],
        "patch_size": patches.shape[-1],
        "width": patches.shape[0],
        "layers": len(layers),
        "embed_dim": 0 if projection is None else projection.shape[1],
        "context_length": 0 if text is None else text.shape[0],
        "num_classes": 0 if head is None else head.shape[0],
    }
    return WeightFacts(family=family, **{**_PUBLISHED[family], **shapes, **(known or {})})


def role_of(state: Mapping[str, Tensor]) -> Role:
    """Tell what a state dict in our names is a model of.

    Args:
        state: our name to tensor.
    """
    if "mask_token" in state:
        return "masked-video"
    if "fc_cls.weight" in state:
        return "classifier"
    return "dual-encoder" if "logit_scale" in state else "video-tower"


def _frames(state: Mapping[str, Tensor], encoder: Encoder) -> int:
    for name in ("visual.temporal_embedding", "visual.temporal_embed"):
        if name in state:
            return state[name].shape[-2]
    return 0 if encoder == "videomae" else 1


def _grid(state: Mapping[str, Tensor]) -> int:
    """Patches along a side of a frame, by the positions; 0 where these are not stored."""
    for name in ("visual.positional_embedding", "visual.pos_embed"):
        if name in state:
            return math.isqrt(state[name].shape[-2] - 1)
    return 0
