"""Put time spans on chunks: which rows of the chunk table a clip touches, or why it cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from avion_dali.data.manifest import Chunk

# How much a span may reach past the last frame before it is refused: annotations are rounded, and the
# last frames of a source may not make a chunk.
PAST_END_TOLERANCE_S = 1.0
# Neighbouring chunks may lie this far apart: a chunk can miss its last frame.
_GAP_TOLERANCE_S = 0.5


class SpanError(ValueError):
    """A span cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class _VideoChunks:
    first_row: int
    starts: np.ndarray
    ends: np.ndarray


class ChunkLookup:
    """Finds the chunks of a time span.

    Args:
        chunks: all chunk rows, sorted by (video, start).
    """

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self._chunks = chunks
        rows: dict[str, list[int]] = {}
        for row, chunk in enumerate(chunks):
            rows.setdefault(chunk.video, []).append(row)
        self._videos = {
            video: _VideoChunks(
                first_row=members[0],
                starts=np.array([chunks[r].start_s for r in members]),
                ends=np.array([chunks[r].end_s for r in members]),
            )
            for video, members in rows.items()
        }
        self._by_stem: dict[str, list[str]] = {}
        for video in self._videos:
            self._by_stem.setdefault(PurePosixPath(video).stem, []).append(video)

    def locate(self, video: str, start_s: float, end_s: float) -> tuple[int, int, float]:
        """Return (first chunk row, number of chunks, end clamped to the video).

        Args:
            video: the video's name as in the chunk folder, or its file name without extension.
            start_s: start in seconds of the video.
            end_s: end in seconds of the video.

        Raises:
            SpanError: when the span is not a span, the video is unknown, the span lies past its end, or
                a chunk of it is missing.
        """
        if not (np.isfinite(start_s) and np.isfinite(end_s)) or start_s < 0:
            raise SpanError(f"start {start_s} and end {end_s} must be seconds >= 0")
        if end_s < start_s:
            raise SpanError(f"ends at {end_s:g} s, before its start at {start_s:g} s")
        known = self._find(video)
        video_end = float(known.ends[-1])
        if start_s >= video_end or end_s > video_end + PAST_END_TOLERANCE_S:
            raise SpanError(f"span {start_s:g}-{end_s:g} s lies past the end of the video ({video_end:.2f} s)")
        end_s = min(end_s, video_end)
        first = int(np.searchsorted(known.starts, start_s, side="right")) - 1
        last = max(int(np.searchsorted(known.starts, end_s, side="left")) - 1, first)
        self._check_gaps(known, first, last, start_s)
        return known.first_row + first, last - first + 1, end_s

    def _find(self, video: str) -> _VideoChunks:
        if video in self._videos:
            return self._videos[video]
        names = self._by_stem.get(PurePosixPath(video).stem, [])
        if len(names) > 1:
            raise SpanError(f"video {video!r} could be any of {', '.join(names[:3])}")
        if not names:
            raise SpanError(f"video {video!r} has no chunks")
        return self._videos[names[0]]

    def _check_gaps(self, known: _VideoChunks, first: int, last: int, start_s: float) -> None:
        if first < 0 or start_s > known.ends[first] + _GAP_TOLERANCE_S:
            raise SpanError(f"the chunk that holds {start_s:g} s is missing")
        for i in range(first, last):
            if known.starts[i + 1] > known.ends[i] + _GAP_TOLERANCE_S:
                raise SpanError(f"the chunk after {known.starts[i]:g} s is missing")
        refs = [self._chunks[known.first_row + i].ref for i in range(first, last + 1)]
        if len({(r.width, r.height) for r in refs}) > 1:
            raise SpanError("its chunks differ in frame size")
