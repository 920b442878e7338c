"""Converts the names of AVION's and open_clip's dual encoders to ours and back.

AVION stores the video tower in two styles, depending on the flags of the training. Ours is the plain style,
which OpenAI and open_clip use as well. Axes: D width, P side length of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from torch import Tensor

from avion_dali.contracts import UserError

FLASH_RENAMES: Final[tuple[tuple[str, str], ...]] = (
    (".attn.Wqkv.weight", ".attn.in_proj_weight"),
    (".attn.Wqkv.bias", ".attn.in_proj_bias"),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)
# Constants in CLIP's state dict, which follow from the shapes of the weights.
CONSTANTS: Final = ("input_resolution", "context_length", "vocab_size", "attn_mask", "text.attn_mask")
TEXT_ROOTS: Final = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")


def strip_wrappers(name: str) -> str:
    """Return a name without the prefixes added by data-parallel training and torch.compile."""
    return name.replace("module.", "").replace("_orig_mod.", "")


def remap_avion_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and reshape the weights of an AVION dual encoder or classifier to ours.

    Both of AVION's styles are accepted (flash or plain attention, linear or convolutional patch embedding),
    with or without the prefix `module.` of data-parallel training. Tensors are shared with the input and not
    copied.

    Args:
        state_dict: parameter name to tensor.

    Returns:
        A dict for `load_state_dict` of our model with the same sizes, frames and embedding width.

    Raises:
        UserError: when two entries have the same name afterwards, or the patches are not square RGB patches.
    """
    remapped: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        name = _plain_name(key)
        if name in remapped:
            raise UserError(f"weights: {key!r} and another entry both mean {name!r}; the file mixes two styles")
        is_patch_embedding = name == "conv1.weight" or name.endswith(".conv1.weight")
        remapped[name] = _as_convolution(name, tensor) if is_patch_embedding else tensor
    return remapped


def _plain_name(key: str) -> str:
    name = strip_wrappers(key)
    if ".resblocks." in name:
        for flash, plain in FLASH_RENAMES:
            name = name.replace(flash, plain)
    return name


def _as_convolution(name: str, weight: Tensor) -> Tensor:
    """Reshape a linear patch embedding (D, 3*P*P), ordered by channel, row and column, to (D, 3, P, P)."""
    if weight.ndim != 2:
        return weight
    side = math.isqrt(weight.shape[1] // 3)
    if 3 * side * side != weight.shape[1]:
        raise UserError(f"weights: {name} has shape {tuple(weight.shape)}, not that of square RGB patches")
    return weight.unflatten(1, (3, side, side))


def to_avion_flash(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename our weights to the style of AVION's released models: flash attention, linear patch embedding.

    Args:
        state: a dual encoder or classifier with a `vit` encoder, in our names.

    Returns:
        Their name to tensor, sharing memory.
    """
    renamed = {}
    for name, tensor in state.items():
        key = name
        if name.startswith("visual."):
            for flash, plain in FLASH_RENAMES:
                key = key.replace(plain, flash)
        renamed[key] = tensor.flatten(1) if name == "visual.conv1.weight" else tensor
    return renamed


def open_clip_to_ours(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Rename the weights of an OpenAI or open_clip model with a ViT.

    Args:
        state_dict: parameter name to tensor, text tower at the top level or under `text.`.

    Returns:
        Our name to tensor, sharing memory; and the entries that are not used, name to reason.
    """
    state: dict[str, Tensor] = {}
    left_over: dict[str, str] = {}
    for key, tensor in state_dict.items():
        name = strip_wrappers(key)
        if name in CONSTANTS:
            left_over[name] = "a constant, not a weight"
        elif name == "visual.proj":
            state["visual.image_projection"] = tensor
        elif name.startswith("text."):
            state["textual." + name.removeprefix("text.")] = tensor
        else:
            state["textual." + name if name.startswith(TEXT_ROOTS) else name] = tensor
    return state, left_over


def to_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename our weights to open_clip's names; its models take images, so frame positions must be zero.

    Args:
        state: a dual encoder with a `vit` encoder, in our names.

    Returns:
        Their name to tensor, sharing memory.

    Raises:
        UserError: when the model has frame positions other than zero.
    """
    renamed = {}
    for name, tensor in state.items():
        if name == "visual.temporal_embedding":
            if tensor.any():
                raise UserError(
                    f"open_clip's models cannot store {tensor.shape[0]} frame positions; only a model of one "
                    "frame or with zero frame positions can be written in this layout"
                )
            continue
        key = "visual.proj" if name == "visual.image_projection" else name
        renamed[key.removeprefix("textual.")] = tensor
    return renamed
