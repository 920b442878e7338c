"""Colors: DALI converts to RGB as BT.601 whatever a stream says; this corrects them to what the stream means.

DALI does honor limited and full range. Both conversions are linear, so one 3x3 matrix leads from one to the
other; BT.709 then agrees with the CPU decoders as well as BT.601 does. This is not part of the graph: hardly
any chunk needs it, and which ones do is known only when their packets have been read.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

# Shares of red and blue in luma by AVColorSpace number (ITU-T H.273, Table 4); all others are taken as BT.601.
_BT601 = (0.299, 0.114)
_LUMA_SHARES = {
    1: (0.2126, 0.0722),  # BT.709
    4: (0.30, 0.11),  # FCC
    7: (0.212, 0.087),  # SMPTE 240M
    9: (0.2627, 0.0593),  # BT.2020, non-constant luminance
    10: (0.2627, 0.0593),  # BT.2020, constant luminance: FFmpeg uses the same matrix
}


def need_correction(colorspaces: Sequence[int]) -> bool:
    """Tell whether DALI gives any of some clips other colors than its stream means.

    Args:
        colorspaces: AVColorSpace number of each clip's stream.
    """
    return not _LUMA_SHARES.keys().isdisjoint(colorspaces)


def correct_colors(frames: torch.Tensor, colorspaces: Sequence[int]) -> None:
    """Turn colors that were converted as BT.601 into those the streams mean, in place.

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
    """Return the matrix float32 (3, 3) from RGB converted as BT.601 to the RGB that a stream means.

    Args:
        colorspace: AVColorSpace number of the stream.
    """
    right = _rgb_from_ycc(*_LUMA_SHARES.get(colorspace, _BT601))
    return (right @ np.linalg.inv(_rgb_from_ycc(*_BT601))).astype(np.float32)


def _rgb_from_ycc(red: float, blue: float) -> np.ndarray:
    """Matrix (3, 3) of ITU-T H.273, section 8.3 (matrix coefficients), inverted."""
    green = 1 - red - blue
    from_cb, from_cr = 2 * (1 - blue), 2 * (1 - red)
    return np.array([[1, 0, from_cr], [1, -from_cb * blue / green, -from_cr * red / green], [1, from_cb, 0]])
