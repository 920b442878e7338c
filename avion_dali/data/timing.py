"""Times of pictures and their consequences: order, constant or variable rate, and the densest rate.

This module runs in probing and chunking workers, so it imports only numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

NTSC = Fraction(1000, 1001)
# Below this rate, pictures are shown for so long that the picture shown at a time and the nearest one differ.
SLOW_FPS = 10
# A burst of at least this many intervals is motion that deserves its rate; a shorter one may be clock jitter.
_SUSTAINED_INTERVALS = 12
_FREQUENT_SHARE = 0.25
# Because of clock jitter, a measured rate this close to a plain rate is replaced by it.
_SNAP = 0.04


def complete_times(times: Sequence[int | None], step: Fraction) -> np.ndarray:
    """Return strictly increasing times of pictures in the order in which a decoder delivers them.

    Pictures without a time are spaced evenly between those with one. If times decrease, as in recordings that
    were joined byte by byte, the following pictures continue one step after the previous ones.

    Args:
        times: stated times in ticks; None for pictures without one.
        step: ticks between pictures if nothing else is known.

    Returns:
        int64 array (len(times),) of ticks.
    """
    known = np.array([i for i, time in enumerate(times) if time is not None], dtype=np.int64)
    numbers = np.arange(len(times))
    if not len(known):
        return np.round(numbers * float(step)).astype(np.int64)
    ticks = np.array([times[i] for i in known], dtype=np.int64)
    known, ticks = _without_misplaced(known, ticks, step=float(step))
    gaps = np.diff(ticks)
    steps = np.maximum(np.round(np.diff(known) * float(step)), 1).astype(np.int64)
    ticks[1:] += np.where(gaps <= 0, steps - gaps, 0).cumsum()
    full = np.interp(numbers, known, ticks)
    before, after = numbers < known[0], numbers > known[-1]
    full[before] = ticks[0] - (known[0] - numbers[before]) * float(step)
    full[after] = ticks[-1] + (numbers[after] - known[-1]) * float(step)
    return np.round(full).astype(np.int64)


def _without_misplaced(known: np.ndarray, ticks: np.ndarray, *, step: float) -> tuple[np.ndarray, np.ndarray]:
    """Leave out times that are not before the next one, although the times around them are one step apart.

    Program streams state the time of one picture in several, and FFmpeg may assign it to an earlier picture.
    """
    apart = np.abs(ticks[2:] - ticks[:-2] - (known[2:] - known[:-2]) * step)
    misplaced = np.zeros(len(ticks), dtype=bool)
    misplaced[1:-1] = (np.diff(ticks)[1:] <= 0) & (apart <= step / 2)
    return known[~misplaced], ticks[~misplaced]


def measure_rate(
    ticks: np.ndarray, tick: Fraction, *, stated: Sequence[Fraction | None]
) -> tuple[Fraction, bool]:
    """Return the frame rate and whether it is constant: the plainest rate that fits, otherwise the average.

    Args:
        ticks: int64 (F,), sorted presentation times.
        tick: length of a tick in seconds.
        stated: rates that the container states, the most likely one first.

    Returns:
        Frames per second, and whether every frame lies within one tick of `index / rate`.
    """
    rates = [rate for rate in stated if rate]
    if len(ticks) == 1:
        return (rates or [Fraction(25)])[0], True
    exact = (len(ticks) - 1) / (int(ticks[-1] - ticks[0]) * tick)
    average = exact.limit_denominator(100_000)
    plain = [rate for rate in rates if rate.denominator in (1, 1001)]
    seconds = (ticks - ticks[0]) * float(tick)
    # For short files, the average in the header is affected by rounding of the clock (19001/317 for 59.94), so
    # whole and NTSC rates are tried first.
    for rate in (*plain, *_plain_rates(exact), *rates, average):
        # Times are rounded to ticks; if a tick is as long as a frame (AVI), rounding is not tolerated.
        tolerance = min(float(tick), 0.25 / max(float(rate), 1.0)) * 1.001
        if rate and np.abs(seconds - np.arange(len(ticks)) / float(rate)).max() <= tolerance:
            return rate, True
    return average, False


def _plain_rates(rate: Fraction) -> list[Fraction]:
    """Return the nearest whole rate and the nearest NTSC rate, the closer one first."""
    candidates = [Fraction(round(rate)), round(rate / NTSC) * NTSC]
    return sorted((r for r in candidates if r), key=lambda candidate: abs(candidate - rate))


def _frequent_interval(intervals: np.ndarray) -> float:
    """Return the most frequent interval, with a tolerance of a millisecond; infinity if none is frequent."""
    milliseconds, counts = np.unique(np.round(intervals * 1000).astype(np.int64), return_counts=True)
    edges = np.searchsorted(milliseconds, [milliseconds - 1, milliseconds + 2])
    before = np.concatenate([[0], counts.cumsum()])
    totals = before[edges[1]] - before[edges[0]]
    best = int(totals.argmax())
    if totals[best] < max(_FREQUENT_SHARE * len(intervals), 2):
        return float("inf")
    return float(intervals[np.abs(intervals * 1000 - milliseconds[best]) <= 1.5].mean())


def densest_rate(seconds: np.ndarray, stated: Sequence[Fraction | None]) -> Fraction:
    """Return the rate of a variable-rate video in the passage where its pictures are densest.

    The mean rate is not meaningful for a video with pauses. A passage has 12 intervals, or half of those of a
    shorter video; an interval that is frequent in the whole video counts as well (a camera that drops frames).

    Args:
        seconds: float64 (F,), F >= 2, ascending times of the pictures.
        stated: rates that the container states.

    Returns:
        Frames per second; a stated or plain rate if one is close.
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
