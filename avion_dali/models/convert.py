"""Weights of other projects in our parameter names.

AVION stores the video tower in two styles, depending on the flags of the training; ours is the plain one,
which is also OpenAI's and open_clip's. Axes: T frames, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, Literal

from torch import Tensor
from torch.nn import functional

from avion_dali.contracts import UserError

_BLOCK_RENAMES: Final[tuple[tuple[str, str], ...]] = (
    (".attn.Wqkv.weight", ".attn.in_proj_weight"),
    (".attn.Wqkv.bias", ".attn.in_proj_bias"),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)


def remap_avion_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and reshape the weights of an AVION dual encoder to ours.

    Both of AVION's styles are accepted (flash or plain attention, linear or convolutional patch embedding),
    with or without the `module.` that data-parallel training leaves in names. The tensors are shared with
    the input, not copied.

    Args:
        state_dict: parameter name to tensor.

    Returns:
        A dict that `DualEncoder.load_state_dict` takes when sizes, frames and embedding width agree.

    Raises:
        UserError: when two names become one, or the patch embedding is not that of square RGB patches.
    """
    remapped: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        name = _our_name(key)
        if name in remapped:
            raise UserError(f"weights: {key!r} and another entry both mean {name!r}; the file mixes two styles")
        is_patch_embedding = name == "conv1.weight" or name.endswith(".conv1.weight")
        remapped[name] = _as_convolution(name, tensor) if is_patch_embedding else tensor
    return remapped


def _our_name(key: str) -> str:
    """The name this project gives to an AVION parameter."""
    name = key.replace("module.", "")
    if ".resblocks." in name:
        for theirs, ours in _BLOCK_RENAMES:
            name = name.replace(theirs, ours)
    return name


def _as_convolution(name: str, weight: Tensor) -> Tensor:
    """A linear patch embedding (D, 3*P*P), channels before rows before columns, as (D, 3, P, P)."""
    if weight.ndim != 2:
        return weight
    side = math.isqrt(weight.shape[1] // 3)
    if 3 * side * side != weight.shape[1]:
        raise UserError(f"weights: {name} has shape {tuple(weight.shape)}, not that of square RGB patches")
    return weight.unflatten(1, (3, side, side))


def resize_temporal_embedding(
    temporal_TD: Tensor, num_frames: int, *, shrink: Literal["interpolate", "truncate"] = "interpolate"
) -> Tensor:
    """Fit frame positions to another number of frames.

    More frames are interpolated linearly between the centres of the old ones, the ends held. Fewer frames are
    interpolated likewise, which keeps the span of a clip, or cut to the first rows as AVION does.

    Args:
        temporal_TD: frame positions, float (T, D).
        num_frames: frames wanted, >= 1.
        shrink: what to do when `num_frames` < T.

    Returns:
        Float (num_frames, D), dtype kept; the input itself when nothing changes.

    Raises:
        ValueError: when the shape or the number is not usable.
    """
    if temporal_TD.ndim != 2 or num_frames < 1:
        raise ValueError(f"cannot fit frame positions {tuple(temporal_TD.shape)} to {num_frames} frames")
    loaded = temporal_TD.shape[0]
    if loaded == num_frames:
        return temporal_TD
    if loaded > num_frames and shrink == "truncate":
        return temporal_TD[:num_frames]
    # (T, D) -> (1, D, T): interpolation runs along the last axis; float32 because fp16 has no CPU kernel.
    resized_1DT = functional.interpolate(
        temporal_TD.float().t().unsqueeze(0), size=num_frames, mode="linear", align_corners=False
    )
    return resized_1DT.squeeze(0).t().contiguous().to(temporal_TD.dtype)
