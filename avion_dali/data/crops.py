"""Crop windows on the even pixel grid: numbers in, `CropWindow` out, no pixels touched."""

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
# Corners, middles of the edges, centre, and the centres of the quarters, in quarters of the free room.
_PLACES = tuple((x, y) for y in range(5) for x in range(5) if x % 2 == y % 2)


def _even(value: float) -> int:
    """Round down to an even integer."""
    return int(value) // 2 * 2


def narrowed_window(window: CropWindow, factor: float, *, limit: int) -> CropWindow:
    """Return the window of stored pixels that shows what a window of square pixels shows.

    Args:
        window: in a picture of square pixels.
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
    lowest, highest = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_ATTEMPTS):
        # What `Generator.uniform` computes, at a third of its cost: most draws do not fit a wide frame.
        area = width * height * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = math.exp(lowest + (highest - lowest) * rng.random())
        # Nearest even size: flooring would shrink the mean area below the drawn one.
        w, h = _even(math.sqrt(area * aspect) + 1), _even(math.sqrt(area / aspect) + 1)
        if 0 < w <= width and 0 < h <= height:
            x = 2 * int(rng.integers(0, (width - w) // 2 + 1))
            y = 2 * int(rng.integers(0, (height - h) // 2 + 1))
            return CropWindow(x, y, w, h)
    aspect = min(max(width / height, ratio[0]), ratio[1])
    return _centred(
        width, height, window_width=min(width, height * aspect), window_height=min(height, width / aspect)
    )


def simple_random_window(width: int, height: int, *, rng: np.random.Generator) -> CropWindow:
    """Draw a square as large as the short side, at a place uniform over the even positions.

    This is the simple random crop of DeiT III (arXiv 2204.07118, section 3.2: the short side is resized to the
    training size, then a random square is taken) without its four pixels of reflected padding: a window shows
    pixels of the frame only. So it moves along the longer side alone.

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
    """Draw one of ten window shapes and one of 13 places (TSN, arXiv 1608.00859, section 4.1).

    Width and height are shares 1, .875, .75 or .66 of the short side, no more than one step apart; a length
    within two pixels of `frame_size` becomes that, which spares the resizing. The places are the corners, the
    middles of the edges, the centre, and half way from it to the corners; all on the even grid.

    Args:
        width: source width in pixels, >= 4.
        height: source height in pixels, >= 4.
        frame_size: side of the output in pixels.
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
    """Return the largest squares at both ends and at the centre of the longer side (three-crop testing).

    Args:
        width: source width in pixels, >= 2.
        height: source height in pixels, >= 2.

    Returns:
        Left, centre and right, or top, centre and bottom; on the even grid.
    """
    side = _even(min(width, height))
    right, bottom = (_even(width - side), 0) if width >= height else (0, _even(height - side))
    ends = CropWindow(0, 0, side, side), CropWindow(right, bottom, side, side)
    return ends[0], center_square_window(width, height), ends[1]


def center_square_window(width: int, height: int) -> CropWindow:
    """Return the largest centred square, floored to the even grid (evaluation).

    Args:
        width: source width in pixels, >= 2.
        height: source height in pixels, >= 2.
    """
    side = min(width, height)
    return _centred(width, height, window_width=side, window_height=side)


def _centred(width: int, height: int, *, window_width: float, window_height: float) -> CropWindow:
    w, h = max(_even(window_width), 2), max(_even(window_height), 2)
    return CropWindow(_even((width - w) / 2), _even((height - h) / 2), w, h)


CropRule = Callable[[int, int, ClipOptions, np.random.Generator], CropWindow]
"""Draws a training window: (source width, source height, options, the clip's generator) to the window."""

CROPS: dict[str, CropRule] = {
    "random-resized": lambda width, height, options, rng: random_resized_window(
        width, height, scale=options.crop_scale, ratio=options.crop_ratio, rng=rng
    ),
    "simple-random": lambda width, height, _, rng: simple_random_window(width, height, rng=rng),
    "multi-scale": lambda width, height, options, rng: multi_scale_window(
        width, height, frame_size=options.frame_size, rng=rng
    ),
    "centre": lambda width, height, *_: center_square_window(width, height),
}
"""The table of crop rules, by the names in `crop`."""


def find_crop(name: str) -> CropRule:
    """Return the crop rule of a name.

    Args:
        name: the configuration's `crop`.

    Raises:
        UserError: when there is none; lists those there are.
    """
    if name not in CROPS:
        raise UserError(f"`crop` = {name!r} is not a crop rule; choose one of {', '.join(CROPS)}")
    return CROPS[name]
