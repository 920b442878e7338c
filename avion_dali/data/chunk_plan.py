"""Where a video is cut: its rate, its frames on a constant-rate grid, and the borders of its chunks.

Runs in chunking workers: imports numpy alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction

from avion_dali.data.probe import HDR_TRANSFERS, ChunkFacts
from avion_dali.data.timing import SLOW_FPS

# Slow rates are raised so that a chunk border lies between two frames, up to this rate.
_MAX_RAISED_FPS = 30
_TOLD_FROM = Fraction(51, 50)  # a rate that varies by less is a clock's rounding
# A varying rate may ask for this much without being told; a video whose mean is higher, for its mean.
_MAX_VARYING_FPS = 60


@dataclass(frozen=True)
class ChunkPlan:
    """Borders of a video's chunks on its constant-rate frame grid.

    Args:
        fps: frames per second of the chunks.
        total: frames of the whole video at that rate.
        chunk_seconds: length of a chunk.
    """

    fps: Fraction
    total: int
    chunk_seconds: int
    borders: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        borders = [0]
        while borders[-1] < self.total:
            borders.append(min(round(len(borders) * self.chunk_seconds * self.fps), self.total))
        object.__setattr__(self, "borders", tuple(borders))

    @property
    def frames(self) -> dict[int, int]:
        """Frames of each chunk by its start second."""
        sizes = (after - before for before, after in zip(self.borders, self.borders[1:], strict=False))
        return {k * self.chunk_seconds: size for k, size in enumerate(sizes)}

    def looked_at(self, count: int) -> frozenset[int]:
        """Return which pictures of a chunk are compared with the source: of its first, middle and last second.

        Args:
            count: frames of the chunk.
        """
        second = max(round(self.fps), 1)
        near = (0, second // 2, second - 1)
        places = [*near, *(count // 2 + i for i in near), *(count - 1 - i for i in near)]
        return frozenset(place for place in places if 0 <= place < count)


def plan_chunks(facts: ChunkFacts, *, chunk_seconds: int, max_fps: int = 0) -> ChunkPlan:
    """Lay a video's frames on a constant-rate grid and cut it.

    Chunk k holds the grid frames [round(k L fps), round((k + 1) L fps)), so that borders do not drift where
    the rate is no whole number. A varying rate becomes the one of the densest passage: its pictures are placed
    by their times, so that does not drift either. A slow rate is raised until a chunk holds a whole number of
    frames: the picture on show at a border then begins both chunks.

    Args:
        facts: of the source video.
        chunk_seconds: length L of a chunk.
        max_fps: upper limit of the rate; 0 for none.

    Returns:
        The plan.
    """
    fps = _grid_rate(facts, chunk_seconds, max_fps=max_fps)
    if fps == facts.fps and facts.is_cfr and not facts.lingers:
        return ChunkPlan(fps, round(facts.start_s * fps) + facts.num_frames, chunk_seconds)
    end_s = facts.end_s()
    return ChunkPlan(fps, max(round(end_s * fps), round((end_s - facts.last_s) * fps) + 1), chunk_seconds)


def _grid_rate(facts: ChunkFacts, chunk_seconds: int, *, max_fps: int) -> Fraction:
    fps = facts.densest_fps or facts.fps
    if not facts.is_cfr:
        fps = min(max(fps, Fraction(SLOW_FPS)), Fraction(max(_MAX_VARYING_FPS, round(facts.fps))))
        # Any rate will do: one that has a frame at every border is the most exact.
        fps = Fraction(max(round(fps * chunk_seconds), 1), chunk_seconds)
    if max_fps:
        fps = min(fps, Fraction(max_fps))
    if fps >= SLOW_FPS:
        return fps
    per_chunk = fps * chunk_seconds
    raised = fps * per_chunk.denominator
    return raised if raised <= _MAX_RAISED_FPS else Fraction(_MAX_RAISED_FPS)


def describe_plan(facts: ChunkFacts, plan: ChunkPlan) -> Iterator[str]:
    """Say what is done to a video that is no plain one.

    Args:
        facts: of the source video.
        plan: how it is cut.

    Yields:
        Notes for the user.
    """
    if not facts.is_cfr and facts.densest_fps > facts.fps * _TOLD_FROM:
        rate, densest = float(facts.fps), float(facts.densest_fps)
        yield f"its rate varies ({rate:.4g} in the mean, {densest:.4g} at most): cut at {float(plan.fps):.4g}"
    elif facts.is_cfr and plan.fps != facts.fps:
        yield f"its {float(facts.fps):.4g} frames a second are cut at {float(plan.fps):.4g}"
    if facts.start_s:
        yield f"its picture begins {facts.start_s:.2f} s late: the first one stands in until then"
    if facts.is_interlaced:
        yield "it is interlaced: its fields are not separated"
    if facts.transfer in HDR_TRANSFERS:
        yield f"its transfer is {HDR_TRANSFERS[facts.transfer]}: colors come out pale, for tones are not mapped"
