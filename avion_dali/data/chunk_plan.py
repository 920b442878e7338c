"""Plans how a video is cut: its frame rate, its frames on a constant-rate grid, and the borders of its chunks.

This module runs in chunking workers, so it imports only numpy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction

from avion_dali.data.colors import HDR_TRANSFERS
from avion_dali.data.probe import ChunkFacts
from avion_dali.data.timing import SLOW_FPS

# Low rates are multiplied so that chunk borders lie between two frames, up to this rate.
_MAX_RAISED_FPS = 30
_TOLD_FROM = Fraction(51, 50)  # a smaller variation of the rate is rounding of a clock
# Upper limit of the grid rate for a varying rate, if `max_fps` sets none; a higher mean rate raises this limit.
_MAX_VARYING_FPS = 60


@dataclass(frozen=True)
class ChunkPlan:
    """Borders of a video's chunks on its constant-rate frame grid.

    Args:
        fps: frames per second of the chunks.
        total: frames of the whole video at this rate.
        chunk_seconds: length of a chunk in seconds.
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
        """Number of frames of each chunk by its start second."""
        sizes = (after - before for before, after in zip(self.borders, self.borders[1:], strict=False))
        return {k * self.chunk_seconds: size for k, size in enumerate(sizes)}

    def looked_at(self, count: int) -> frozenset[int]:
        """Return the pictures that are compared with the source: those of the first, middle and last second.

        Args:
            count: frames of the chunk.
        """
        second = max(round(self.fps), 1)
        near = (0, second // 2, second - 1)
        places = [*near, *(count // 2 + i for i in near), *(count - 1 - i for i in near)]
        return frozenset(place for place in places if 0 <= place < count)


def plan_chunks(facts: ChunkFacts, *, chunk_seconds: int, max_fps: int = 0) -> ChunkPlan:
    """Place the frames of a video on a constant-rate grid and cut it.

    Chunk k contains the grid frames [round(k L fps), round((k + 1) L fps)), so borders do not drift if the rate
    is not an integer. For a varying rate, the grid has the rate of the densest passage; pictures are placed
    by their times, so they do not drift either. A low rate is multiplied until a chunk contains an integer
    number of frames; the picture shown at a border is then the first one of the next chunk.

    Args:
        facts: facts of the source video.
        chunk_seconds: length L of a chunk in seconds.
        max_fps: upper limit of the rate; 0 for no limit.

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
        # Any rate is possible; a rate with a frame at every border is the most exact.
        fps = Fraction(max(round(fps * chunk_seconds), 1), chunk_seconds)
    if max_fps:
        fps = min(fps, Fraction(max_fps))
    if fps >= SLOW_FPS:
        return fps
    per_chunk = fps * chunk_seconds
    raised = fps * per_chunk.denominator
    return raised if raised <= _MAX_RAISED_FPS else Fraction(_MAX_RAISED_FPS)


def describe_plan(facts: ChunkFacts, plan: ChunkPlan) -> Iterator[str]:
    """Describe what happens to a video with special properties.

    Args:
        facts: facts of the source video.
        plan: the plan of its chunks.

    Yields:
        Notes for the user.
    """
    if not facts.is_cfr and facts.densest_fps > facts.fps * _TOLD_FROM:
        rate, densest = float(facts.fps), float(facts.densest_fps)
        yield f"its frame rate varies (mean {rate:.4g}, maximum {densest:.4g}): cut at {float(plan.fps):.4g}"
    elif facts.is_cfr and plan.fps != facts.fps:
        yield f"its {float(facts.fps):.4g} frames per second are cut at {float(plan.fps):.4g}"
    if facts.start_s:
        yield f"its picture begins {facts.start_s:.2f} s late: the first picture is repeated until then"
    if facts.is_interlaced:
        yield "it is interlaced: its fields are not separated"
    if facts.transfer in HDR_TRANSFERS:
        yield f"its transfer is {HDR_TRANSFERS[facts.transfer]}: colors look pale, because tones are not mapped"
