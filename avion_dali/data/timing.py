"""Times of pictures and what follows from them: order, constant or varying rate, the densest rate.

Runs in probing and chunking workers: imports numpy alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

NTSC = Fraction(1000, 1001)
# Below this rate a picture stays long enough that the one on show and the nearest one are worth telling apart.
SLOW_FPS = 10
# A burst of this many intervals is movement that is worth its rate; fewer may be jitter of a clock.
_SUSTAINED_INTERVALS = 12
_FREQUENT_SHARE = 0.25
# Clocks jitter: a measured rate so near a plain one is that one.
_SNAP = 0.04


def complete_times(times: Sequence[int | None], step: Fraction) -> np.ndarray:
    """Return a time for each picture in the order in which a decoder delivers them, strictly increasing.

    Pictures without a time stand evenly between those that have one. Where times go back, as in recordings
    that were joined byte by byte, what follows continues one step after what came before.

    Args:
        times: stated times in ticks, None for pictures that have none.
        step: ticks from one picture to the next where nothing else is known.

    Returns:
        int64 array (len(times),) of ticks.
    """
    known = np.array([i for i, time in enumerate(times) if time is not None], dtype=np.int64)
    numbers = np.arange(len(times))
    if not len(known):
        return np.round(numbers * float(step)).astype(np.int64)
    ticks = np.array([times[i] for i in known], dtype=np.int64)
    gaps = np.diff(ticks)
    steps = np.maximum(np.round(np.diff(known) * float(step)), 1).astype(np.int64)
    ticks[1:] += np.where(gaps <= 0, steps - gaps, 0).cumsum()
    full = np.interp(numbers, known, ticks)
    before, after = numbers < known[0], numbers > known[-1]
    full[before] = ticks[0] - (known[0] - numbers[before]) * float(step)
    full[after] = ticks[-1] + (numbers[after] - known[-1]) * float(step)
    return np.round(full).astype(np.int64)


def measure_rate(
    ticks: np.ndarray, tick: Fraction, *, stated: Sequence[Fraction | None]
) -> tuple[Fraction, bool]:
    """Return the frame rate and whether it is constant: the plainest rate that fits, else the average.

    Args:
        ticks: int64 (F,), sorted presentation times.
        tick: seconds of a tick.
        stated: rates that the container states, the likeliest first.

    Returns:
        Frames per second, and True when every frame lies within a tick of `index / rate`.
    """
    rates = [rate for rate in stated if rate]
    if len(ticks) == 1:
        return (rates or [Fraction(25)])[0], True
    exact = (len(ticks) - 1) / (int(ticks[-1] - ticks[0]) * tick)
    average = exact.limit_denominator(100_000)
    plain = [rate for rate in rates if rate.denominator in (1, 1001)]
    seconds = (ticks - ticks[0]) * float(tick)
    # A header's average over a short file is off by the rounding of its clock (19001/317 for 59.94), so
    # whole and NTSC rates are tried first.
    for rate in (*plain, *_plain_rates(exact), *rates, average):
        # Times are rounded to ticks; where a tick is as coarse as a frame (AVI) no rounding is excused.
        tolerance = min(float(tick), 0.25 / max(float(rate), 1.0)) * 1.001
        if rate and np.abs(seconds - np.arange(len(ticks)) / float(rate)).max() <= tolerance:
            return rate, True
    return average, False


def _plain_rates(rate: Fraction) -> list[Fraction]:
    """Return the nearest whole rate and the nearest NTSC rate, the nearer one first."""
    candidates = [Fraction(round(rate)), round(rate / NTSC) * NTSC]
    return sorted((r for r in candidates if r), key=lambda candidate: abs(candidate - rate))


def _frequent_interval(intervals: np.ndarray) -> float:
    """Return the most frequent of some intervals, give or take a millisecond; infinity when none stands out."""
    milliseconds, counts = np.unique(np.round(intervals * 1000).astype(np.int64), return_counts=True)
    edges = np.searchsorted(milliseconds, [milliseconds - 1, milliseconds + 2])
    before = np.concatenate([[0], counts.cumsum()])
    totals = before[edges[1]] - before[edges[0]]
    best = int(totals.argmax())
    if totals[best] < max(_FREQUENT_SHARE * len(intervals), 2):
        return float("inf")
    return float(intervals[np.abs(intervals * 1000 - milliseconds[best]) <= 1.5].mean())


def densest_rate(seconds: np.ndarray, stated: Sequence[Fraction | None]) -> Fraction:
    """Return the rate of a video whose rate varies, in the passage where its pictures are densest.

    The mean rate says nothing of a video that pauses. A passage has 12 intervals, or half of a shorter video;
    an interval that is frequent all over the video counts as well (a camera that drops frames).

    Args:
        seconds: float64 (F,), F >= 2, ascending times of the pictures.
        stated: rates that the container states.

    Returns:
        Frames per second, a stated or plain rate where one is near.
    """
    count = min(_SUSTAINED_INTERVALS, max((len(seconds) - 1) // 2, 1))
    passage = float((seconds[count:] - seconds[:-count]).min()) / count
    interval = min(passage, _frequent_interval(np.diff(seconds)))
    measured = Fraction(1 / max(interval, 1e-3)).limit_denominator(1000)
    for rates in ([rate for rate in stated if rate], [Fraction(round(measured))]):
        near = [rate for rate in rates if abs(rate / measured - 1) <= _SNAP]
        if near:
            return min(near, key=lambda rate: abs(rate - measured))
    return measured
