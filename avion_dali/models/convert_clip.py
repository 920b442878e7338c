"""Names of AVION's and open_clip's dual encoders, and ours.

AVION stores the video tower in two styles, depending on the flags of the training; ours is the plain one,
which is also OpenAI's and open_clip's. Axes: D width, P side of a patch.
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
# What CLIP keeps in its state dict besides weights; all of it follows from the shapes.
CONSTANTS: Final = ("input_resolution", "context_length", "vocab_size", "attn_mask", "text.attn_mask")
TEXT_ROOTS: Final = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")


def strip_wrappers(name: str) -> str:
    """A name without what data-parallel training and torch.compile put into it."""
    return name.replace("module.", "").replace("_orig_mod.", "")


def remap_avion_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and reshape the weights of an AVION dual encoder or classifier to ours.

    Both of AVION's styles are accepted (flash or plain attention, linear or convolutional patch embedding),
    with or without the `module.` that data-parallel training leaves in names. The tensors are shared with
    the input, not copied.

    Args:
        state_dict: parameter name to tensor.

    Returns:
        A dict that our model's `load_state_dict` takes when sizes, frames and embedding width agree.

    Raises:
        UserError: when two names become one, or the patch embedding is not that of square RGB patches.
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
    """A linear patch embedding (D, 3*P*P), channels before rows before columns, as (D, 3, P, P)."""
    if weight.ndim != 2:
        return weight
    side = math.isqrt(weight.shape[1] // 3)
    if 3 * side * side != weight.shape[1]:
        raise UserError(f"weights: {name} has shape {tuple(weight.shape)}, not that of square RGB patches")
    return weight.unflatten(1, (3, side, side))


def to_avion_flash(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names in the style of AVION's released models: flash attention, linear patch embedding.

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
        Our name to tensor, sharing memory; and what is left over, name to reason.
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
    """Our names in open_clip's: an image model, so there must be nothing about frames.

    Args:
        state: a dual encoder with a `vit` encoder, in our names.

    Returns:
        Their name to tensor, sharing memory.

    Raises:
        UserError: when the model tells frames apart, which open_clip's cannot.
    """
    renamed = {}
    for name, tensor in state.items():
        if name == "visual.temporal_embedding":
            if tensor.any():
                raise UserError(
                    f"open_clip's models have no place for {tensor.shape[0]} frame positions; only a model of "
                    "one frame, or one whose frame positions are zero, can be written so"
                )
            continue
        key = "visual.proj" if name == "visual.image_projection" else name
        renamed[key.removeprefix("textual.")] = tensor
    return renamed
