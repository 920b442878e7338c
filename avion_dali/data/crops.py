"""Crop windows on the even pixel grid: numbers in, `CropWindow` out, no pixels touched."""

from __future__ import annotations

import math

import numpy as np

from avion_dali.contracts import CropWindow

_ATTEMPTS = 10


def _even(value: float) -> int:
    """Round down to an even integer."""
    return int(value) // 2 * 2


def random_resized_window(
    width: int,
    height: int,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> CropWindow:
    """Draw a random-resized-crop window (Inception, arXiv 1409.4842, section 6).

    The area is uniform in `scale` and the aspect log-uniform in `ratio`; the offset is uniform over the
    even positions that keep the window inside. After ten draws that do not fit, the largest centred
    window of the nearest allowed aspect is taken.

    Args:
        width: source width in pixels, >= 2.
        height: source height in pixels, >= 2.
        scale: range of the window's share of the frame's area.
        ratio: range of width / height.
        rng: the clip's generator.
    """
    log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
    for _ in range(_ATTEMPTS):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(*log_ratio))
        # Nearest even size: flooring would shrink the mean area below the drawn one.
        w, h = _even(math.sqrt(area * aspect) + 1), _even(math.sqrt(area / aspect) + 1)
        if 0 < w <= width and 0 < h <= height:
            x = 2 * int(rng.integers(0, (width - w) // 2 + 1))
            y = 2 * int(rng.integers(0, (height - h) // 2 + 1))
            return CropWindow(x, y, w, h)
    aspect = min(max(width / height, ratio[0]), ratio[1])
    return _centred(width, height, min(width, height * aspect), min(height, width / aspect))


def center_square_window(width: int, height: int) -> CropWindow:
    """Return the largest centred square, floored to the even grid (evaluation).

    Args:
        width: source width in pixels, >= 2.
        height: source height in pixels, >= 2.
    """
    side = min(width, height)
    return _centred(width, height, side, side)


def _centred(width: int, height: int, window_width: float, window_height: float) -> CropWindow:
    w, h = max(_even(window_width), 2), max(_even(window_height), 2)
    return CropWindow(_even((width - w) / 2), _even((height - h) / 2), w, h)
