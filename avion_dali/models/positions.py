"""Position tables of tokens, and their adaptation to other numbers of frames or patches.

Axes: T frames, N tokens, D width.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional


def sincos_positions(tokens: int, width: int) -> Tensor:
    """Fixed positions of a sequence: sines and cosines of decreasing frequency.

    Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.5; in VideoMAE the sequence is that of the tubes.

    Args:
        tokens: length of the sequence (N).
        width: token width (D).

    Returns:
        Float32 (N, D): column j holds the sine (j even) or cosine (j odd) of n / 10000^(2 (j // 2) / D).
    """
    column_D = torch.arange(width)
    frequency_D = 10000.0 ** (-2.0 * (column_D // 2).double() / width)
    angle_ND = torch.arange(tokens).double().unsqueeze(1) * frequency_D
    return torch.where(column_D % 2 == 0, angle_ND.sin(), angle_ND.cos()).float()


def resize_temporal_embedding(
    temporal_TD: Tensor, num_frames: int, *, shrink: Literal["interpolate", "truncate"] = "interpolate"
) -> Tensor:
    """Adapt frame positions to another number of frames.

    For more frames, rows are interpolated linearly between the centers of the old rows, and the ends are
    constant. For fewer frames, they are interpolated in the same way, which preserves the span of a clip, or
    cut to the first rows as AVION does.

    Args:
        temporal_TD: frame positions, float (T, D).
        num_frames: target number of frames, >= 1.
        shrink: method if `num_frames` < T.

    Returns:
        Float (num_frames, D) of the same dtype; the input itself if nothing changes.

    Raises:
        ValueError: when the shape or the number of frames is invalid.
    """
    if temporal_TD.ndim != 2 or num_frames < 1:
        raise ValueError(f"cannot resize frame positions {tuple(temporal_TD.shape)} to {num_frames} frames")
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


def resize_spatial_positions(pos_ND: Tensor, *, grid: int, extra: int) -> Tensor:
    """Adapt the positions of a square grid of patches to another square, as open_clip does.

    The interpolation is bicubic with antialiasing; rows before the patches (that of the class token) are kept.

    Args:
        pos_ND: positions, float (extra + side * side, D), patches row by row.
        grid: target number of patches along a side, >= 1.
        extra: number of rows that belong to no patch, >= 0.

    Returns:
        Float (extra + grid * grid, D) of the same dtype; the input itself if nothing changes.

    Raises:
        ValueError: when the patches do not form a square.
    """
    side = math.isqrt(max(0, pos_ND.shape[0] - extra))
    if pos_ND.ndim != 2 or side < 1 or side * side + extra != pos_ND.shape[0] or grid < 1:
        raise ValueError(
            f"cannot resize positions {tuple(pos_ND.shape)}, {extra} of them extra, to {grid} x {grid}"
        )
    if side == grid:
        return pos_ND
    square_1DHW = pos_ND[extra:].float().t().unflatten(1, (side, side)).unsqueeze(0)
    resized_1DHW = functional.interpolate(
        square_1DHW, size=(grid, grid), mode="bicubic", antialias=True, align_corners=False
    )
    patches_ND = resized_1DHW.squeeze(0).flatten(1).t().to(pos_ND.dtype)
    return torch.cat([pos_ND[:extra], patches_ND])
