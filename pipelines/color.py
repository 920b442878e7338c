"""Color correction: DALI converts all streams to RGB with the BT.601 matrix, even if they declare another one.

DALI does respect limited and full range. Both conversions are linear, so a 3x3 matrix converts one result into
the other; BT.709 then agrees with the CPU decoders as well as BT.601 does. The correction is not part of the
graph, because few chunks need it, and which ones is known only when their packets have been read.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

# Weights of red and blue in luma by AVColorSpace number (ITU-T H.273, Table 4); all others count as BT.601.
_BT601 = (0.299, 0.114)
_LUMA_SHARES = {
    1: (0.2126, 0.0722),  # BT.709
    4: (0.30, 0.11),  # FCC
    7: (0.212, 0.087),  # SMPTE 240M
    9: (0.2627, 0.0593),  # BT.2020, non-constant luminance
    10: (0.2627, 0.0593),  # BT.2020, constant luminance: FFmpeg uses the same matrix
}


def need_correction(colorspaces: Sequence[int]) -> bool:
    """Return whether DALI converts any of the clips with a matrix that its stream does not declare.

    Args:
        colorspaces: AVColorSpace number of each clip's stream.
    """
    return not _LUMA_SHARES.keys().isdisjoint(colorspaces)


def correct_colors(frames: torch.Tensor, colorspaces: Sequence[int]) -> None:
    """Correct colors that were converted with BT.601 to the matrices that the streams declare, in place.

    Args:
        frames: uint8 (B, ..., 3) RGB.
        colorspaces: AVColorSpace number of each clip's stream, B of them.
    """
    for colorspace in set(colorspaces) & _LUMA_SHARES.keys():
        rows = [row for row, other in enumerate(colorspaces) if other == colorspace]
        matrix = torch.from_numpy(from_bt601(colorspace)).to(frames.device)
        corrected = frames[rows].float() @ matrix.T
        frames[rows] = corrected.round_().clamp_(0, 255).to(torch.uint8)


@lru_cache(maxsize=16)
def from_bt601(colorspace: int) -> np.ndarray:
    """Return the matrix float32 (3, 3) from RGB converted with BT.601 to the RGB that a stream declares.

    Args:
        colorspace: AVColorSpace number of the stream.
    """
    right = _rgb_from_ycc(*_LUMA_SHARES.get(colorspace, _BT601))
    return (right @ np.linalg.inv(_rgb_from_ycc(*_BT601))).astype(np.float32)


def _rgb_from_ycc(red: float, blue: float) -> np.ndarray:
    """Return the inverse of the matrix (3, 3) of ITU-T H.273, section 8.3 (matrix coefficients)."""
    green = 1 - red - blue
    from_cb, from_cr = 2 * (1 - blue), 2 * (1 - red)
    return np.array([[1, 0, from_cr], [1, -from_cb * blue / green, -from_cr * red / green], [1, from_cb, 0]])
