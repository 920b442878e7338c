"""Assigns time spans to chunks: finds the chunk rows of a span, or the reason why it cannot be used."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from avion_dali.contracts import UserError
from avion_dali.data.manifest import Chunk
from avion_dali.data.scanning import VIDEO_SUFFIXES, ChunkFile
from avion_dali.data.sidecar import Sidecar, read_sidecar
from avion_dali.wording import few

# How far a span may extend beyond the last frame before it is rejected: annotations are rounded, and the last
# frames of a source may be too few for a chunk.
PAST_END_TOLERANCE_S = 1.0
# Permitted gap between neighboring chunks: the last frame of a chunk may be missing.
_GAP_TOLERANCE_S = 0.5


class SpanError(ValueError):
    """A row or its span cannot be used.

    Args:
        reason: description of the reason.
        kind: short category of the reason, by which reports count.
    """

    def __init__(self, reason: str, kind: str = "malformed row") -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class _VideoChunks:
    """The chunks of one video: their rows from `first_row` on, their times, and the gaps between them.

    `lost_s` is the start of the first unusable chunk after the last usable one, or infinity.
    """

    first_row: int
    starts: np.ndarray
    ends: np.ndarray
    hole_starts: np.ndarray
    hole_ends: np.ndarray
    lost_s: float


@dataclass(frozen=True, slots=True)
class LostPart:
    """A time range of a video without a chunk, because the video is damaged there.

    Args:
        start_s: start of the range in seconds.
        end_s: end of the range in seconds.
        reason: description of the damage.
    """

    start_s: float
    end_s: float
    reason: str


class ChunkLookup:
    """Finds the chunks of time spans.

    Args:
        chunks: all chunk rows, sorted by (video, start).
        lost: (video, start in seconds) of chunk files that cannot be used, in any order.
        damage: by video, the ranges that were left out when it was cut.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk],
        lost: Iterable[tuple[str, float]] = (),
        *,
        damage: Mapping[str, Sequence[LostPart]] | None = None,
    ) -> None:
        self._chunks, self._damage = chunks, damage or {}
        rows: dict[str, list[int]] = {}
        for row, chunk in enumerate(chunks):
            rows.setdefault(chunk.video, []).append(row)
        lost_starts: dict[str, list[float]] = {}
        for video, start_s in lost:
            lost_starts.setdefault(video, []).append(start_s)
        self._videos = {
            video: _video_chunks(chunks, members, lost_starts=lost_starts.get(video, ()))
            for video, members in rows.items()
        }
        self._names: dict[str, list[str]] = {}
        for video in dict.fromkeys([*self._videos, *lost_starts]):
            path = PurePosixPath(video)
            for name in {video, _without_suffix(video), path.name, _without_suffix(path.name)}:
                self._names.setdefault(_composed(name), []).append(video)

    def locate(self, video: str, start_s: float, end_s: float) -> tuple[int, int, float]:
        """Return (first chunk row, number of chunks, end limited to the video).

        Args:
            video: name of the video in the chunk folder, or its file name without extension.
            start_s: start in seconds of the video.
            end_s: end in seconds of the video.

        Raises:
            SpanError: when the times are invalid, the video is unknown, the span extends beyond its end, or one
                of its chunks is missing.
        """
        if not (np.isfinite(start_s) and np.isfinite(end_s)) or start_s < 0:
            raise SpanError(f"start {start_s} and end {end_s} must be seconds >= 0", "bad times")
        if end_s < start_s:
            raise SpanError(f"ends at {end_s:g} s, before its start at {start_s:g} s", "bad times")
        known = self._find(video)
        self._check_damage(known, start_s, end_s=end_s)
        video_end = float(known.ends[-1])
        if end_s > max(known.lost_s, video_end) or start_s >= known.lost_s:
            raise _lost_chunk(known.lost_s)
        if start_s >= video_end or end_s > video_end + PAST_END_TOLERANCE_S:
            where = f"lies past the end of the video ({video_end:.2f} s)"
            raise SpanError(f"span {start_s:g}-{end_s:g} s {where}", "past the end")
        end_s = min(end_s, video_end)
        first = int(np.searchsorted(known.starts, start_s, side="right")) - 1
        last = max(int(np.searchsorted(known.starts, end_s, side="left")) - 1, first)
        self._check(known, first, last, (start_s, end_s))
        return known.first_row + first, last - first + 1, end_s

    def locate_whole(self, video: str, *, start_s: float = 0.0) -> tuple[int, int, float]:
        """Return (first chunk row, number of chunks, end in seconds) of a video from a start time to its end.

        Args:
            video: name of the video, as for `locate`.
            start_s: start in seconds of the video.

        Raises:
            SpanError: when the video is unknown or one of its chunks is missing.
        """
        known = self._find(video)
        self._check_damage(known, start_s, end_s=math.inf)
        if math.isfinite(known.lost_s):
            raise _lost_chunk(known.lost_s)
        return self.locate(video, start_s, max(float(known.ends[-1]), start_s))

    def has(self, video: str) -> bool:
        """Return whether a video has exactly this name.

        Args:
            video: name of the video in the chunk folder.
        """
        return video in self._videos

    def knows(self, video: str) -> bool:
        """Return whether a video of this name has any chunk, usable or not.

        Args:
            video: name of the video, as for `locate`.
        """
        return video in self._videos or bool(self._candidates(video))

    def _candidates(self, video: str) -> list[str]:
        video = _composed(video)
        return self._names.get(video) or self._names.get(_without_suffix(video), [])

    def _find(self, video: str) -> _VideoChunks:
        if video in self._videos:
            return self._videos[video]
        names = self._candidates(video)
        if len(names) > 1:
            raise SpanError(f"video {video!r} could be any of {few(names, 3)}", "ambiguous video")
        if not names:
            raise SpanError(f"video {video!r} has no chunks", "unknown video")
        if names[0] not in self._videos:
            raise SpanError(f"video {video!r} has no chunks that can be used", "missing chunk")
        return self._videos[names[0]]

    def _check_damage(self, known: _VideoChunks, start_s: float, *, end_s: float) -> None:
        for part in self._damage.get(self._chunks[known.first_row].video, ()):
            if start_s < part.end_s and max(end_s, np.nextafter(start_s, np.inf)) > part.start_s:
                raise SpanError(f"lies in a lost part of the video, which is {part.reason}", "in a lost part")

    def _check(self, known: _VideoChunks, first: int, last: int, span: tuple[float, float]) -> None:
        start_s, end_s = span
        touched = (known.hole_starts < max(end_s, np.nextafter(start_s, np.inf))) & (known.hole_ends > start_s)
        if touched.any():
            hole = int(np.argmax(touched))
            where = f"{known.hole_starts[hole]:g}-{known.hole_ends[hole]:g} s"
            raise SpanError(f"the chunk of {where} is missing", "missing chunk")
        rows = [self._chunks[known.first_row + i] for i in range(first, last + 1)]
        if len({(row.ref.width, row.ref.height, row.pixel_aspect) for row in rows}) > 1:
            raise SpanError("its chunks differ in frame size", "mixed frame sizes")


def _lost_chunk(start_s: float) -> SpanError:
    return SpanError(f"the chunk that begins at {start_s:g} s cannot be used", "missing chunk")


def _video_chunks(chunks: Sequence[Chunk], rows: list[int], *, lost_starts: Iterable[float]) -> _VideoChunks:
    starts = np.array([chunks[r].start_s for r in rows])
    ends = np.array([chunks[r].end_s for r in rows])
    if (np.diff(starts) <= 0).any():
        raise UserError(f"video {chunks[rows[0]].video!r} has two chunks that start at the same second")
    before, after = np.append(0.0, ends[:-1]), starts
    holes = after > before + _GAP_TOLERANCE_S
    lost_s = min((start for start in lost_starts if start > starts[-1]), default=math.inf)
    return _VideoChunks(rows[0], starts, ends, before[holes], after[holes], lost_s)


def _composed(name: str) -> str:
    """Return a name in composed form (NFC): macOS separates letters from accents (NFD)."""
    return unicodedata.normalize("NFC", name)


def _without_suffix(name: str) -> str:
    path = PurePosixPath(name)
    return str(path.with_suffix("")) if path.suffix.lower() in VIDEO_SUFFIXES else name


def damaged_parts(files: Iterable[ChunkFile]) -> dict[str, list[LostPart]]:
    """Return the ranges of videos that `avion-dali chunk` found damaged and left out.

    Args:
        files: chunk files.
    """
    folders = {video: path.parent for video, _, path in files}
    sidecars = ((video, read_sidecar(folder)) for video, folder in folders.items())
    return {video: _lost_parts(sidecar) for video, sidecar in sidecars if sidecar and sidecar.losses.chunks}


def _lost_parts(sidecar: Sidecar) -> list[LostPart]:
    length = float(sidecar.settings["chunk_seconds"])
    return [LostPart(start, start + length, str(sidecar.losses)) for start in sidecar.losses.chunks]
