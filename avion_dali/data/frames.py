"""Which frames make a clip: index arithmetic only, no file is opened here."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

_LONG_SHOWN_S = 0.1  # a picture that stays for so long is part of what is seen


def segment_frame_ids(
    start: int, stop: int, num_frames: int, rng: np.random.Generator | None = None
) -> np.ndarray:
    """Draw one frame from each of `num_frames` equal segments of [start, stop).

    Without a generator: the middle of each segment. With one: the middle plus a jitter uniform in
    [-0.5, 0.5) * (stop - start - 1) / num_frames (AVION and LaViLa's sampling; TSN, arXiv 1608.00859,
    section 3.1). Ids repeat when the range is shorter than the clip.

    Args:
        start: first frame of the range.
        stop: one past the last frame, > start.
        num_frames: clip length T.
        rng: draws the jitter; None for evaluation.

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


@lru_cache(maxsize=4096)  # spans of a data set have few lengths
def _segment_middles(start: int, stop: int, num_frames: int) -> np.ndarray:
    edges = np.linspace(start, stop, num_frames + 1)
    return (edges[:-1] + edges[1:]) / 2


def segment_of(num_source: int, part: int, *, num_parts: int) -> tuple[int, int]:
    """Return the frames [first, stop) of one of `num_parts` equal parts; parts of few frames share some.

    Args:
        num_source: frames of the whole, >= 1.
        part: which part, in [0, num_parts).
        num_parts: how many.
    """
    first = part * num_source // num_parts
    return first, max((part + 1) * num_source // num_parts, first + 1)


def strided_frame_ids(
    num_source: int, num_frames: int, stride: int, rng: np.random.Generator | None = None
) -> np.ndarray:
    """Take every `stride`-th frame from a random start, each shifted by its own draw from [0, stride).

    Short videos wrap round. This is the clip of VideoMAE pre-training as AVION does it (VideoMAE,
    arXiv 2203.12602, section 3.3, without the per-frame shift).

    Args:
        num_source: frames of the video, >= 1.
        num_frames: clip length T.
        stride: source frames between neighbours.
        rng: draws start and shifts; None starts at frame 0 without shifts.

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
    """Spread `num_frames` over a random window of `num_frames * stride` frames, ends included.

    Videos no longer than the window are read at the plain stride and their last frame repeated.
    This is the clip of VideoMAE fine-tuning (arXiv 2203.12602, appendix A).

    Args:
        num_source: frames of the video, >= 1.
        num_frames: clip length T.
        stride: nominal source frames between neighbours.
        rng: draws the window; None takes the middle one.

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
    """Return the start frames of `num_views` temporal views spread evenly over a video.

    Args:
        num_source: frames of the video.
        num_frames: clip length T.
        stride: source frames between neighbours.
        num_views: temporal views, >= 2.
    """
    step = max((num_source - num_frames * stride) / (num_views - 1), 0)
    return [int(k * step) for k in range(num_views)]


def view_frame_ids(num_source: int, num_frames: int, *, stride: int, start: int) -> np.ndarray:
    """Return every `stride`-th frame from `start`; past the end the last one repeats.

    This is a clip of VideoMAE's multi-view test (arXiv 2203.12602, appendix A).

    Args:
        num_source: frames of the video, >= 1.
        num_frames: clip length T.
        stride: source frames between neighbours.
        start: see `view_start_frames`.

    Returns:
        int64 array (T,), non-decreasing, each in [0, num_source).
    """
    return np.minimum(start + stride * np.arange(num_frames), num_source - 1)


def frame_at(seconds: float, *, fps: float, num_frames: int, frame_times: np.ndarray | None = None) -> int:
    """Return the frame of one chunk that stands for a moment, clamped to the chunk.

    Args:
        seconds: from the chunk's first frame.
        fps: the chunk's own frame rate.
        num_frames: the chunk's real frame count.
        frame_times: float64 array (num_frames,) of seconds, for a variable frame rate; None for constant.

    Returns:
        The nearest frame of a constant rate, the frame on show of a variable one.
    """
    if frame_times is None:
        frame = round(seconds * fps)
    else:
        frame = int(np.searchsorted(frame_times, seconds, side="right")) - 1
    return min(max(frame, 0), num_frames - 1)


def frame_range_in_seconds(
    start_s: float, end_s: float, *, fps: float, num_frames: int, frame_times: np.ndarray | None = None
) -> tuple[int, int]:
    """Return the frames [first, stop) of one chunk that lie in a time span, clamped to the chunk.

    Args:
        start_s: seconds from the chunk's first frame; may be negative.
        end_s: seconds from the chunk's first frame; may lie past its end.
        fps: the chunk's own frame rate.
        num_frames: the chunk's real frame count.
        frame_times: float64 array (num_frames,) of seconds, for a variable frame rate; None for constant.

    Returns:
        (first, stop), 0 <= first <= stop <= num_frames; empty when no frame lies inside. A frame that began
        before the span lies inside when it stays on show for long: slides, and pauses of a screen recording.
    """
    if frame_times is None:
        first, stop = round(start_s * fps), round(end_s * fps)  # half to even, as numpy does
    else:
        first, stop = (int(i) for i in np.searchsorted(frame_times, [start_s, end_s]))
        shown_until = min(float(frame_times[first]), end_s) if first < len(frame_times) else start_s
        first -= first > 0 and shown_until - start_s > _LONG_SHOWN_S
    first = min(max(first, 0), num_frames)
    return first, min(max(stop, first), num_frames)
