"""Converts the names of VideoMAE's models, the original's and AVION's, to ours and back.

Axes: D width, F frames of a tube, P side length of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from avion_dali.contracts import UserError
from avion_dali.models.convert_clip import strip_wrappers

TUBE_FRAMES: Final = 2
_PATCHES: Final = "patch_embed.proj.weight"


def videomae_to_ours(state_dict: Mapping[str, Tensor], *, pretraining: bool) -> dict[str, Tensor]:
    """Rename and reshape VideoMAE weights, with flash or plain attention and linear or convolutional tubes.

    The original has biases of queries and values but not of keys; ours is one vector with zeros for the keys.

    Args:
        state_dict: parameter name to tensor.
        pretraining: True for an encoder with its decoder, whose names are kept; False for a classifier, which
            becomes `visual.*` and `fc_cls.*`.

    Returns:
        Our name to tensor, sharing memory except for biases.

    Raises:
        UserError: when a bias lacks its counterpart, or the tubes are not square RGB tubes.
    """
    state: dict[str, Tensor] = {}
    half_biases: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        name = strip_wrappers(key).removeprefix("backbone.")
        if not pretraining:
            name = "fc_cls." + name.removeprefix("head.") if name.startswith("head.") else "visual." + name
        name = name.replace(".attn.Wqkv.", ".attn.qkv.").replace(".attn.out_proj.", ".attn.proj.")
        if name.endswith((".attn.q_bias", ".attn.v_bias")):
            half_biases[name] = tensor
            continue
        if name in state:
            raise UserError(f"weights: {key!r} and another entry both mean {name!r}; the file mixes two styles")
        state[name] = _as_tubes(name, tensor) if name.endswith(_PATCHES) else tensor
    state |= _joined(half_biases)
    return state


def _joined(half_biases: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join the biases of queries and values to those of the joint projection, with zeros for keys."""
    joined = {}
    for block in dict.fromkeys(name.rpartition(".")[0] for name in half_biases):
        pair = [half_biases.get(f"{block}.{part}_bias") for part in "qv"]
        if pair[0] is None or pair[1] is None or pair[0].shape != pair[1].shape:
            raise UserError(f"weights: {block} needs q_bias and v_bias of the same length; the file is damaged")
        joined[f"{block}.qkv.bias"] = torch.cat([pair[0], torch.zeros_like(pair[0]), pair[1]])
    return joined


def _as_tubes(name: str, weight: Tensor) -> Tensor:
    """Reshape a linear tube embedding (D, 3*F*P*P), by channel, frame, row and column, to (D, 3, F, P, P)."""
    if weight.ndim != 2:
        return weight
    side = math.isqrt(weight.shape[1] // (3 * TUBE_FRAMES))
    if 3 * TUBE_FRAMES * side * side != weight.shape[1]:
        raise UserError(f"weights: {name} has shape {tuple(weight.shape)}, not that of tubes of two RGB frames")
    return weight.unflatten(1, (3, TUBE_FRAMES, side, side))


def to_videomae(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename our weights to the original's names: separate biases of queries and values, convolutional tubes.

    A bias of keys adds the same number to all scores of a query, which softmax ignores, so it is omitted.

    Args:
        state: a masked-video model or a classifier with a `videomae` encoder, in our names.

    Returns:
        Their name to tensor.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        key = _their_root(name)
        if key.endswith(".attn.qkv.bias"):
            block = key.removesuffix("qkv.bias")
            q_D, _, v_D = tensor.chunk(3)
            renamed |= {f"{block}q_bias": q_D, f"{block}v_bias": v_D}
        else:
            renamed[key] = tensor
    return renamed


def to_avion_videomae(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename our weights to the style of AVION's VideoMAE: flash attention, linear tubes.

    Args:
        state: a masked-video model or a classifier with a `videomae` encoder, in our names.

    Returns:
        Their name to tensor, sharing memory.
    """
    renamed = {}
    for name, tensor in state.items():
        key = _their_root(name).replace(".attn.qkv.", ".attn.Wqkv.").replace(".attn.proj.", ".attn.out_proj.")
        renamed[key] = tensor.flatten(1) if name.endswith(_PATCHES) else tensor
    return renamed


def _their_root(name: str) -> str:
    if name.startswith("fc_cls."):
        return "head." + name.removeprefix("fc_cls.")
    return name.removeprefix("visual.")


def encoder_of(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Take the encoder of a masked-video model as the video tower of another model.

    The encoder's last norm is not used, because a tower that averages its tokens normalizes the mean instead
    (Tong et al. 2022, arXiv 2203.12602).

    Args:
        state: a masked-video model, in our names.

    Returns:
        `visual.*` to tensor, sharing memory; and the entries that are not used, name to reason.
    """
    tower: dict[str, Tensor] = {}
    left_over: dict[str, str] = {}
    for name, tensor in state.items():
        if name.startswith("encoder.norm."):
            left_over[name] = "the mean of the tokens has a separate norm"
        elif name.startswith("encoder."):
            tower["visual." + name.removeprefix("encoder.")] = tensor
        elif name == "mask_token" or name.startswith(("decoder.", "encoder_to_decoder.")):
            left_over[name] = "for pre-training only"
        else:
            tower[name] = tensor
    return tower, left_over
