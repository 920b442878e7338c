"""Decodes frames of any video file without a manifest."""

from __future__ import annotations

import math
import numbers
import operator
import os
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any, Final, cast

import numpy as np

from avion_dali.config.checks import require, require_integer
from avion_dali.contracts import ChunkRef, ClipPart, CropWindow, UserError
from avion_dali.data.crops import center_square_window
from avion_dali.data.probe import ChunkFacts, probe_chunk
from avion_dali.decode.cpu_fused import forget_kept, one_thread
from avion_dali.decode.reading import read_planned
from avion_dali.decode.rendering import sized_view

Seconds = float | int | Fraction

LARGEST_SIDE: Final = 8192  # pixels; FFmpeg refuses pictures of about twice that
ROUNDING_FRAMES = 1e-6  # share of a frame that rounding may cost a time


def decode_clip(
    path: str | os.PathLike[str],
    *,
    frame_ids: Sequence[int] | None = None,
    seconds: Sequence[Seconds] | None = None,
    window: CropWindow | tuple[int, int, int, int] | None = None,
    frame_size: int | None = None,
) -> np.ndarray:
    """Decode selected frames of a video file, as `--decoder cpu-fused` does.

    Only the packets that the frames need are decoded. The file is read once to find them; the facts of the last
    files are kept, so further clips of a file cost only their packets. Threads that call it decode one after
    another; processes decode at the same time.

    Args:
        path: any video file that FFmpeg can read.
        frame_ids: indices of the wanted frames in presentation order, from 0; any order, repeats allowed.
        seconds: times in a player's clock instead of indices; each selects the frame shown at that time, and
            times outside the video select the first or last frame.
        window: region to cut out of each upright picture before scaling, as a `CropWindow` or (x, y, width,
            height) in pixels, all even; by default the center square if `frame_size` is given, otherwise the
            whole picture.
        frame_size: side length of the square output in pixels; by default the size of the window.

    Returns:
        uint8 (T, H, W, 3), RGB, upright.

    Raises:
        UserError: when an argument has another type, not exactly one of `frame_ids` and `seconds` is given, or
            an index or the window lies outside the video.
        DecodeError: when the file cannot be read.
    """
    if (frame_ids is None) == (seconds is None):
        raise UserError("give either `frame_ids` or `seconds`")
    require(_is_path(path), "`path`", value=path, allowed="the path of a file")
    if frame_size is not None:
        require_integer(frame_size, "`frame_size`", least=1, below=LARGEST_SIDE + 1)
    facts = _facts(os.path.abspath(path), *_version(path))
    wanted = _at(facts, seconds) if seconds is not None else _numbers(facts, cast(Sequence[int], frame_ids))
    region, size = _region(facts, window, frame_size=frame_size)
    unique = sorted(set(wanted))
    chunk = ChunkRef(facts.path, facts.size_bytes, facts.num_frames, facts.width, facts.height)
    with one_thread():
        try:
            frames = read_planned(ClipPart(chunk, tuple(unique)))
            view = sized_view(frames[0], region, size=size)
            pictures = dict(zip(unique, (_upright(view.render(frame), facts) for frame in frames), strict=True))
        except BaseException:
            forget_kept()
            raise
    return np.stack([pictures[number] for number in wanted])


def _numbers(facts: ChunkFacts, frame_ids: Sequence[int]) -> list[int]:
    ids = _as_list("frame_ids", frame_ids)
    are_whole = all(isinstance(i, numbers.Integral) and not isinstance(i, bool) for i in ids)
    if not are_whole or not ids or min(ids) < 0 or max(ids) >= facts.num_frames:
        raise UserError(
            f"`frame_ids` = {ids} must be numbers of frames of {facts.path}: 0 to {facts.num_frames - 1}"
        )
    return [int(i) for i in ids]


def _as_list(name: str, values: Iterable[Any]) -> list[Any]:
    """Return the elements of a sequence, array or tensor as plain values."""
    try:
        return list(values.tolist() if hasattr(values, "tolist") else values)
    except TypeError:
        raise UserError(f"`{name}` = {values!r} must be a sequence of numbers") from None


def _is_path(path: object) -> bool:
    return isinstance(path, (str, os.PathLike)) and os.fspath(path) != "" and "\0" not in str(path)


def _version(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return size and modification time of a file, for which facts are valid; zeros if it does not exist."""
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=64)
def _facts(path: str, _size: int, _changed_ns: int) -> ChunkFacts:
    return probe_chunk(path)


def _at(facts: ChunkFacts, seconds: Sequence[Seconds]) -> list[int]:
    """Return the frames shown at some times: the first before the video starts, the last after its end."""
    asked = _as_list("seconds", seconds)
    if not asked or not all(isinstance(time, numbers.Real) and math.isfinite(time) for time in asked):
        raise UserError(f"`seconds` = {asked} must be one or more finite times")
    times = np.array([float(time) - facts.start_s for time in asked])
    if facts.frame_times is None:
        # A time computed as number / rate may be slightly less than that of the intended frame.
        frames = np.floor(times * float(facts.fps) + ROUNDING_FRAMES).astype(int)
    else:
        frames = (
            np.searchsorted(facts.frame_times, times + ROUNDING_FRAMES / float(facts.fps), side="right") - 1
        )
    return frames.clip(0, facts.num_frames - 1).tolist()


def _region(
    facts: ChunkFacts, window: CropWindow | tuple[int, int, int, int] | None, *, frame_size: int | None
) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
    """Return the region of the coded picture, (x, y, width, height), and the output size before rotation."""
    turned = facts.rotation % 180 != 0
    width, height = (facts.height, facts.width) if turned else (facts.width, facts.height)
    if window is None:
        square = center_square_window(width, height) if frame_size else None
        x, y, w, h = (square.x, square.y, square.width, square.height) if square else (0, 0, width, height)
    else:
        chosen = window if isinstance(window, CropWindow) else _as_window(window)
        x, y, w, h = chosen.x, chosen.y, chosen.width, chosen.height
    if x + w > width or y + h > height:
        raise UserError(f"`window` = {(x, y, w, h)} exceeds the {width}x{height} pictures of {facts.path}")
    coded = {
        0: (x, y, w, h),
        90: (height - y - h, x, h, w),
        180: (width - x - w, height - y - h, w, h),
        270: (y, width - x - w, h, w),
    }[facts.rotation]
    return coded, (frame_size, frame_size) if frame_size else (coded[2], coded[3])


def _as_window(window: tuple[int, int, int, int]) -> CropWindow:
    try:
        x, y, width, height = (operator.index(number) for number in window)
        return CropWindow(x, y, width, height)
    except (TypeError, ValueError) as error:
        cause = error if str(error).startswith("crop window") else "it must be four whole numbers of pixels"
        raise UserError(f"`window` = {window!r}: {cause}") from error


def _upright(picture_HWC: np.ndarray, facts: ChunkFacts) -> np.ndarray:
    """Rotate a coded picture as a player does; returns a copy, because the filter reuses its buffer."""
    return np.ascontiguousarray(np.rot90(picture_HWC, facts.rotation // 90))
