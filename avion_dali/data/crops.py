"""Crop rules: compute crop windows on the even pixel grid from sizes, without access to pixels."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from avion_dali.config.data import ClipOptions
from avion_dali.contracts import CropWindow, UserError

_ATTEMPTS = 10
_SCALES = (1.0, 0.875, 0.75, 0.66)
_SCALE_PAIRS = tuple((a, b) for i, a in enumerate(_SCALES) for j, b in enumerate(_SCALES) if abs(i - j) <= 1)
_SNAP_PIXELS = 2
# Corners, midpoints of the edges, center, and centers of the quadrants, in quarters of the free space.
_PLACES = tuple((x, y) for y in range(5) for x in range(5) if x % 2 == y % 2)


def _even(value: float) -> int:
    """Round down to an even integer."""
    return int(value) // 2 * 2


def narrowed_window(window: CropWindow, factor: float, *, limit: int) -> CropWindow:
    """Convert a window of square pixels to the window of stored pixels with the same content.

    Args:
        window: window in a picture of square pixels.
        factor: stored width divided by displayed width.
        limit: stored width in pixels, >= 2.
    """
    width = min(max(_even(window.width * factor + 1), 2), _even(limit))
    middle = (window.x + window.width / 2) * factor
    x = min(max(_even(middle - width / 2 + 1), 0), _even(limit) - width)
    return CropWindow(x, window.y, width, window.height)


def random_resized_window(
    width: int,
    height: int,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> CropWindow:
    """Draw a random-resized-crop window (Inception, arXiv 1409.4842, section 6).

    The area is uniform in `scale` and the aspect ratio is log-uniform in `ratio`; the offset is uniform over
    the even positions for which the window fits. After ten draws that do not fit, the largest centered window
    with the nearest allowed aspect ratio is used.

    Args:
        width: source width in pixels, >= 2.
        height: source height in pixels, >= 2.
        scale: range of the window's area as a fraction of the frame's area.
        ratio: range of width / height.
        rng: the clip's generator.
    """
    lowest, highest = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_ATTEMPTS):
        # Equivalent to `Generator.uniform` at a third of its cost: most draws do not fit a wide frame.
        area = width * height * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = math.exp(lowest + (highest - lowest) * rng.random())
        # Nearest even size: rounding down would reduce the mean area.
        w, h = _even(math.sqrt(area * aspect) + 1), _even(math.sqrt(area / aspect) + 1)
        if 0 < w <= width and 0 < h <= height:
            x = 2 * int(rng.integers(0, (width - w) // 2 + 1))
            y = 2 * int(rng.integers(0, (height - h) // 2 + 1))
            return CropWindow(x, y, w, h)
    aspect = min(max(width / height, ratio[0]), ratio[1])
    return _centered(
        width, height, window_width=min(width, height * aspect), window_height=min(height, width / aspect)
    )


def simple_random_window(width: int, height: int, *, rng: np.random.Generator) -> CropWindow:
    """Draw a square as large as the short side, at a position that is uniform over the even positions.

    This is the simple random crop of DeiT III (arXiv 2204.07118, section 3.2: the short side is resized to the
    training size, then a random square is cut out) without its four pixels of reflection padding: a window only
    contains pixels of the frame. The window therefore varies only along the longer side.

    Args:
        width: source width in pixels, >= 2.
        height: source height in pixels, >= 2.
        rng: the clip's generator.
    """
    side = _even(min(width, height))
    x = 2 * int(rng.integers(0, (width - side) // 2 + 1))
    y = 2 * int(rng.integers(0, (height - side) // 2 + 1))
    return CropWindow(x, y, side, side)


def multi_scale_window(width: int, height: int, *, frame_size: int, rng: np.random.Generator) -> CropWindow:
    """Draw one of ten window shapes and one of 13 positions (TSN, arXiv 1608.00859, section 4.1).

    Width and height are 1, .875, .75 or .66 of the short side, at most one step different from each other; a
    length within two pixels of `frame_size` becomes `frame_size`, which avoids resizing. The positions are the
    corners, the midpoints of the edges, the center, and halfway from it to the corners; all on the even grid.

    Args:
        width: source width in pixels, >= 4.
        height: source height in pixels, >= 4.
        frame_size: side length of the output in pixels.
        rng: the clip's generator.
    """
    base = min(width, height)
    shares = _SCALE_PAIRS[int(rng.integers(len(_SCALE_PAIRS)))]
    w, h = (_even(_snapped(int(base * share), frame_size, limit=base)) for share in shares)
    column, row = _PLACES[int(rng.integers(len(_PLACES)))]
    return CropWindow(_even(column * ((width - w) // 4)), _even(row * ((height - h) // 4)), w, h)


def _snapped(length: int, target: int, *, limit: int) -> int:
    return target if abs(length - target) <= _SNAP_PIXELS and target <= limit else length


def side_square_windows(width: int, height: int) -> tuple[CropWindow, CropWindow, CropWindow]:
    """Return the largest squares at both ends and at the center of the longer side (three-crop testing).

    Args:
        width: source width in pixels, >= 2.
        height: source height in pixels, >= 2.

    Returns:
        Left, center and right, or top, center and bottom; on the even grid.
    """
    side = _even(min(width, height))
    right, bottom = (_even(width - side), 0) if width >= height else (0, _even(height - side))
    ends = CropWindow(0, 0, side, side), CropWindow(right, bottom, side, side)
    return ends[0], center_square_window(width, height), ends[1]


def center_square_window(width: int, height: int) -> CropWindow:
    """Return the largest centered square, rounded down to the even grid (evaluation).

    Args:
        width: source width in pixels, >= 2.
        height: source height in pixels, >= 2.
    """
    side = min(width, height)
    return _centered(width, height, window_width=side, window_height=side)


def _centered(width: int, height: int, *, window_width: float, window_height: float) -> CropWindow:
    w, h = max(_even(window_width), 2), max(_even(window_height), 2)
    return CropWindow(_even((width - w) / 2), _even((height - h) / 2), w, h)


CropRule = Callable[[int, int, ClipOptions, np.random.Generator], CropWindow]
"""Maps (source width, source height, options, the clip's generator) to a training window."""

CROPS: dict[str, CropRule] = {
    "random-resized": lambda width, height, options, rng: random_resized_window(
        width, height, scale=options.crop_scale, ratio=options.crop_ratio, rng=rng
    ),
    "simple-random": lambda width, height, _, rng: simple_random_window(width, height, rng=rng),
    "multi-scale": lambda width, height, options, rng: multi_scale_window(
        width, height, frame_size=options.frame_size, rng=rng
    ),
    "center": lambda width, height, *_: center_square_window(width, height),
}
"""The crop rules by their names in `crop`."""


def find_crop(name: str) -> CropRule:
    """Return the crop rule with a name.

    Args:
        name: the configuration's `crop`.

    Raises:
        UserError: when there is no such rule; the message lists the rules.
    """
    if name == "centre":
        raise UserError("`crop` = 'centre' is now called center; write that")
    if name not in CROPS:
        raise UserError(f"`crop` = {name!r} is not a crop rule; choose one of {', '.join(CROPS)}")
    return CROPS[name]
