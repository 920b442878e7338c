"""Chooses the frames of clips. This module only computes indices; it opens no files."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

_LONG_SHOWN_S = 0.1  # minimum remaining display time of a frame that begins before a span and belongs to it


def segment_frame_ids(
    start: int, stop: int, num_frames: int, rng: np.random.Generator | None = None
) -> np.ndarray:
    """Draw one frame from each of `num_frames` equal segments of [start, stop).

    Without a generator, these are the middle frames of the segments. With a generator, a jitter that is uniform
    in [-0.5, 0.5) * (stop - start - 1) / num_frames is added to the middles (the sampling of AVION and LaViLa;
    TSN, arXiv 1608.00859, section 3.1). Ids repeat when the range is shorter than the clip.

    Args:
        start: first frame of the range.
        stop: one past the last frame, > start.
        num_frames: frames per clip (T).
        rng: generator of the jitter; None for evaluation.

    Returns:
        int64 array (T,), non-decreasing, each in [start, stop).

    Raises:
        ValueError: when the range is empty.
    """
    if stop <= start:
        raise ValueError(f"cannot sample {num_frames} frames from the empty range [{start}, {stop})")
    positions = _segment_middles(start, stop, num_frames)
    if rng is not None:
        positions = positions + (rng.random(num_frames) - 0.5) * (stop - start - 1) / num_frames
    return positions.astype(np.int64)


@lru_cache(maxsize=4096)  # the spans of a data set have few different lengths
def _segment_middles(start: int, stop: int, num_frames: int) -> np.ndarray:
    edges = np.linspace(start, stop, num_frames + 1)
    return (edges[:-1] + edges[1:]) / 2


def segment_of(num_source: int, part: int, *, num_parts: int) -> tuple[int, int]:
    """Return the frames [first, stop) of one of `num_parts` equal parts; parts overlap if frames are too few.

    Args:
        num_source: total number of frames, >= 1.
        part: index of the part, in [0, num_parts).
        num_parts: number of parts.
    """
    first = part * num_source // num_parts
    return first, max((part + 1) * num_source // num_parts, first + 1)


def strided_frame_ids(
    num_source: int, num_frames: int, stride: int, rng: np.random.Generator | None = None
) -> np.ndarray:
    """Take every `stride`-th frame from a random start, each shifted by a random offset in [0, stride).

    In short videos, ids wrap around. These are the clips of VideoMAE pre-training in AVION (VideoMAE,
    arXiv 2203.12602, section 3.3, without the shift per frame).

    Args:
        num_source: frames of the video, >= 1.
        num_frames: frames per clip (T).
        stride: source frames between neighboring clip frames.
        rng: generator of start and shifts; None starts at frame 0 without shifts.

    Returns:
        int64 array (T,), each in [0, num_source).
    """
    span = (num_frames + 1) * stride
    start = rng.integers(0, num_source - span) if rng is not None and num_source > span else 0
    ids = start + stride * np.arange(num_frames)
    if rng is not None:
        ids = ids + rng.integers(0, stride, size=num_frames)
    return (ids % num_source).astype(np.int64)


def dense_frame_ids(
    num_source: int, num_frames: int, stride: int, rng: np.random.Generator | None = None
) -> np.ndarray:
    """Spread `num_frames` over a random range of `num_frames * stride` frames, including both ends.

    If the video is not longer than this range, every `stride`-th frame is used and the last frame is repeated.
    These are the clips of VideoMAE fine-tuning (arXiv 2203.12602, appendix A).

    Args:
        num_source: frames of the video, >= 1.
        num_frames: frames per clip (T).
        stride: nominal number of source frames between neighboring clip frames.
        rng: generator of the range; None uses the middle one.

    Returns:
        int64 array (T,), non-decreasing, each in [0, num_source).
    """
    span = num_frames * stride
    if num_source <= span:
        ids = np.arange(0, num_source, stride)[:num_frames]
        return np.concatenate([ids, np.full(num_frames - len(ids), num_source - 1)]).astype(np.int64)
    stop = int(rng.integers(span, num_source)) if rng is not None else (span + num_source) // 2
    return np.clip(np.linspace(stop - span, stop, num_frames), stop - span, stop - 1).astype(np.int64)


def view_start_frames(num_source: int, num_frames: int, *, stride: int, num_views: int) -> list[int]:
    """Return the start frames of `num_views` temporal views that are evenly spread over a video.

    Args:
        num_source: frames of the video.
        num_frames: frames per clip (T).
        stride: source frames between neighboring clip frames.
        num_views: temporal views, >= 2.
    """
    step = max((num_source - num_frames * stride) / (num_views - 1), 0)
    return [int(k * step) for k in range(num_views)]


def view_frame_ids(num_source: int, num_frames: int, *, stride: int, start: int) -> np.ndarray:
    """Return every `stride`-th frame from `start`; beyond the end, the last frame is repeated.

    These are the clips of VideoMAE's multi-view test (arXiv 2203.12602, appendix A).

    Args:
        num_source: frames of the video, >= 1.
        num_frames: frames per clip (T).
        stride: source frames between neighboring clip frames.
        start: start frame, see `view_start_frames`.

    Returns:
        int64 array (T,), non-decreasing, each in [0, num_source).
    """
    return np.minimum(start + stride * np.arange(num_frames), num_source - 1)


def frame_at(seconds: float, *, fps: float, num_frames: int, frame_times: np.ndarray | None = None) -> int:
    """Return the frame of one chunk for a point in time, limited to the chunk.

    Args:
        seconds: time after the chunk's first frame.
        fps: frame rate of the chunk.
        num_frames: frame count of the chunk.
        frame_times: float64 array (num_frames,) of seconds, for a variable frame rate; None for a constant one.

    Returns:
        The nearest frame for a constant rate, the frame shown at that time for a variable rate.
    """
    if frame_times is None:
        frame = round(seconds * fps)
    else:
        frame = int(np.searchsorted(frame_times, seconds, side="right")) - 1
    return min(max(frame, 0), num_frames - 1)


def frame_range_in_seconds(
    start_s: float, end_s: float, *, fps: float, num_frames: int, frame_times: np.ndarray | None = None
) -> tuple[int, int]:
    """Return the frames [first, stop) of one chunk that lie in a time span, limited to the chunk.

    Args:
        start_s: seconds after the chunk's first frame; may be negative.
        end_s: seconds after the chunk's first frame; may be beyond its end.
        fps: frame rate of the chunk.
        num_frames: frame count of the chunk.
        frame_times: float64 array (num_frames,) of seconds, for a variable frame rate; None for a constant one.

    Returns:
        (first, stop), 0 <= first <= stop <= num_frames; empty when the span contains no frame. A frame that
        begins before the span belongs to it if it is shown for long within it, such as a slide or a pause of a
        screen recording.
    """
    if frame_times is None:
        first, stop = round(start_s * fps), round(end_s * fps)  # halves are rounded to even, as in numpy
    else:
        first, stop = (int(i) for i in np.searchsorted(frame_times, [start_s, end_s]))
        shown_until = min(float(frame_times[first]), end_s) if first < len(frame_times) else start_s
        first -= first > 0 and shown_until - start_s > _LONG_SHOWN_S
    first = min(max(first, 0), num_frames)
    return first, min(max(stop, first), num_frames)
