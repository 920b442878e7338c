"""Finds and probes the chunks of a folder: `<folder>/<video>/<start second>.<extension>`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path

from avion_dali.contracts import ChunkRef, DecodeError, PacketIndexRef, UserError
from avion_dali.data.joined import find_recordings
from avion_dali.data.manifest import Chunk, IndexWriter
from avion_dali.data.probe import probe_chunk
from avion_dali.data.probing_pool import map_in_processes

_ENDINGS = (
    ".3g2 .3gp .amv .asf .avi .av1 .divx .dv .f4v .flv .gif .h264 .264 .h265 .265 .hevc .ivf .m1v .m2p .m2t "
    ".m2ts .m2v .m4v .mjpeg .mjpg .mkv .mod .mov .mp4 .mpe .mpeg .mpg .mpv .mts .mxf .nut .obu .ogm .ogv .ps "
    ".qt .rm .rmvb .tod .tp .trp .ts .vob .webm .wmv .wtv .y4m"
)
VIDEO_SUFFIXES = frozenset(_ENDINGS.split())
CHUNK_SUFFIXES = frozenset({".mp4", ".mkv", ".webm", ".mov", ".avi"})
_LEAST_SIDE = 2  # crop windows are on the even pixel grid
# Chunks cut at keyframes are up to one keyframe distance longer than their names suggest.
_OVERLAP_S, _OVERLAP_SHARE, _GAP_SHARE = 0.5, 0.5, 1.5
# For fewer files, starting processes takes longer than probing.
_SERIAL_LIMIT = 64


ChunkFile = tuple[str, float, Path]  # video, start in seconds, file


@dataclass(frozen=True, slots=True)
class ChunkNames:
    """Meaning of the names of chunk files.

    Args:
        kind: `start` if a name is the second at which the chunk begins, `index` if it is the index of the chunk
            in its video, counted from 0 or 1; empty for start seconds that are checked for plausibility.
        seconds: length of the chunks, for names that are indices.

    Raises:
        UserError: when a length is missing or not applicable.
    """

    kind: str = ""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.kind == "index" and not self.seconds > 0:
            raise UserError("--chunk-names index needs --chunk-seconds, the length of a chunk")
        if self.kind != "index" and self.seconds:
            raise UserError("--chunk-seconds requires --chunk-names index")

    def problem(self, spans: Sequence[tuple[float, float | None]]) -> str:
        """Return why the names of one video's chunks cannot have the assumed meaning.

        Args:
            spans: (start, end) in seconds of each chunk, from its name and duration, sorted; the end is None if
                the chunk cannot be read.

        Returns:
            The problem and how to solve it; empty if there is no problem.
        """
        pairs = [(start, end, after) for (start, end), (after, _) in pairwise(spans) if end is not None]
        for start, end, after in pairs:
            if end - after > max(_OVERLAP_S, _OVERLAP_SHARE * (after - start)):
                return self._misnamed("overlap", start, end, after)
        spacings = [after - start for start, _, after in pairs]
        is_regular = len(pairs) > 1 and max(spacings) < min(spacings) * 1.01
        if not self.kind and is_regular and all(after - s > _GAP_SHARE * (end - s) for s, end, after in pairs):
            return self._misnamed("leave gaps", *pairs[0])
        return ""

    def _misnamed(self, how: str, start: float, end: float, following: float) -> str:
        length = end - start
        names = ", ".join(f"{start + i * length:.4g}" for i in range(3))
        if self.kind == "index":
            advice = f"give --chunk-seconds {length:.4g} if this is the length of the chunks"
        else:
            advice = (
                f"names must be start seconds ({names}, ...); for names that are indices, give "
                f"--chunk-names index --chunk-seconds {length:.4g}"
            )
            advice += "" if how == "overlap" else ", and --chunk-names start if the gaps are intended"
        return (
            f"chunks {how}: by its name, one begins at {start:g} s and lasts {length:.2f} s, and the next one "
            f"begins at {following:g} s; {advice}"
        )


@dataclass(frozen=True, slots=True)
class UnusableChunk:
    """A chunk file that cannot be used.

    Args:
        path: the file.
        reason: the reason.
    """

    path: str
    reason: str


Probed = tuple[Chunk | UnusableChunk, bytes]


def find_chunk_files(
    folder: str | Path, *, names: ChunkNames = ChunkNames(), passed_over: list[Path] | None = None
) -> list[ChunkFile]:
    """List the chunk files of a folder, sorted by video and start.

    Args:
        folder: the chunk folder; videos may be in subfolders (`P01/P01_01.MP4/15.MP4`).
        names: meaning of the file names.
        passed_over: list to which videos are added whose names are not numbers.

    Returns:
        (video, start in seconds, file); the name of a video is its path relative to the folder.

    Raises:
        UserError: when the folder is missing or contains no chunk.
    """
    root = Path(folder).resolve()
    if not root.is_dir():
        raise UserError(f"{folder} is not a folder; name the output folder of `avion-dali chunk`")
    videos = [path for path in files_below(root) if path.suffix.lower() in VIDEO_SUFFIXES]
    found = [
        (path.parent.relative_to(root).as_posix(), float(path.stem), path)
        for path in videos
        if _is_second(path.stem)
    ]
    if passed_over is not None:
        passed_over += [path for path in videos if not _is_second(path.stem)]
    if not found:
        raise UserError(
            f"{folder} contains no chunks (files <video>/<start second>.mp4); make them with `avion-dali chunk`"
        )
    if names.kind == "index":
        base = 1 if min(start for _, start, _ in found) == 1 else 0
        found = [(video, (index - base) * names.seconds, path) for video, index, path in found]
    return sorted(found)


def check_names(files: Iterable[ChunkFile], chunks: Iterable[Chunk], *, names: ChunkNames) -> None:
    """Check that the names of chunks are consistent with their durations.

    Args:
        files: all chunk files, sorted by (video, start).
        chunks: the usable chunks among them.
        names: meaning of the file names.

    Raises:
        UserError: when chunks of a video overlap, or there are gaps between all of them.
    """
    ends = {chunk.ref.path: chunk.end_s for chunk in chunks}
    for video, members in groupby(files, key=lambda file: file[0]):
        problem = names.problem([(start, ends.get(str(path))) for _, start, path in members])
        if problem:
            raise UserError(f"video {video!r}: {problem}")


def scan_chunks(
    folder: str | Path,
    *,
    jobs: int,
    index: IndexWriter | None = None,
    on_progress: Callable[[int], object] | None = None,
) -> tuple[list[Chunk], list[UnusableChunk]]:
    """Probe all chunks of a folder in parallel.

    Args:
        folder: the chunk folder.
        jobs: number of processes.
        index: receives the packet index of each usable chunk; None creates no indexes.
        on_progress: called with the number of probed files.

    Returns:
        The usable chunks, sorted by (video, start), and the unusable ones, with reasons.

    Raises:
        UserError: when the folder is missing or contains no chunk.
    """
    return probe_files(find_chunk_files(folder), jobs=jobs, index=index, on_progress=on_progress)


def probe_files(
    files: list[ChunkFile],
    *,
    jobs: int,
    index: IndexWriter | None = None,
    on_progress: Callable[[int], object] | None = None,
) -> tuple[list[Chunk], list[UnusableChunk]]:
    """Probe files, which are chunks or whole videos, in parallel.

    Args:
        files: (video, start in seconds, file), sorted by (video, start).
        jobs: number of processes.
        index: receives the packet index of each usable file; None creates no indexes.
        on_progress: called with the number of probed files.

    Returns:
        The usable files as chunks, in the given order, and the unusable ones, with reasons.
    """
    chunks: list[Chunk] = []
    unusable: list[UnusableChunk] = []
    probe = partial(_probe, index=index is not None)
    for done, (result, record) in enumerate(_probe_all(files, jobs, probe=probe), start=1):
        if isinstance(result, UnusableChunk):
            unusable.append(result)
        elif chunks and (result.video, result.start_s) == (chunks[-1].video, chunks[-1].start_s):
            unusable.append(UnusableChunk(result.ref.path, f"has the same start as {chunks[-1].ref.path}"))
        else:
            chunks.append(result if index is None else _indexed(result, index.add(record)))
        if on_progress is not None:
            on_progress(done)
    return chunks, unusable


def files_below(root: Path) -> Iterator[Path]:
    """Yield all files, including those in linked folders (videos on several disks), visiting each folder once.

    Args:
        root: the folder.
    """
    entered: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in entered:  # a link to a folder that was visited
            subfolders.clear()
            continue
        entered.add(real)
        yield from (path for path in (Path(folder, name) for name in names) if path.is_file())


def _indexed(chunk: Chunk, index: PacketIndexRef | None) -> Chunk:
    return replace(chunk, ref=replace(chunk.ref, index=index))


def _probe_all(files: list[ChunkFile], jobs: int, *, probe: Callable[[ChunkFile], Probed]) -> Iterator[Probed]:
    if jobs <= 1 or len(files) < _SERIAL_LIMIT:
        yield from map(probe, files)
        return
    yield from map_in_processes(probe, files, jobs=jobs, lost=_lost)


def _lost(file: ChunkFile, reason: str) -> Probed:
    return UnusableChunk(str(file[2]), reason), b""


def _probe(file: ChunkFile, *, index: bool) -> Probed:
    """Return a file as a chunk, or why it is unusable, and its packet index."""
    video, start_s, path = file
    if not _is_text(str(path)):
        return UnusableChunk(str(path), "its name is not UTF-8; rename it"), b""
    try:
        if path.is_file() and (count := len(find_recordings(path))) > 1:
            reason = f"contains {count} recordings and only the first would be read"
            return UnusableChunk(str(path), f"{reason}; chunk it with `avion-dali chunk`"), b""
        facts = probe_chunk(path, index=index)
    except DecodeError as error:
        return UnusableChunk(str(path), f"{error.kind}: {error.cause}"), b""
    except Exception as error:  # a process boundary: any error is a failure of this file
        return UnusableChunk(str(path), f"corrupt: {type(error).__name__}: {error}"), b""
    if facts.rotation:
        reason = f"rotated by {facts.rotation} degrees; chunk it with `avion-dali chunk`"
        return UnusableChunk(str(path), reason), b""
    if min(facts.width, facts.height) < _LEAST_SIDE:
        reason = f"its pictures have {facts.width}x{facts.height} pixels; chunk it with `avion-dali chunk`"
        return UnusableChunk(str(path), reason), b""
    chunk = Chunk(
        ref=ChunkRef(str(path), facts.size_bytes, facts.num_frames, facts.width, facts.height),
        video=video,
        start_s=start_s,
        fps=facts.fps,
        codec=facts.codec,
        frame_times=facts.clock_times(),
        last_s=facts.last_s,
        pixel_aspect=float(facts.pixel_aspect),
    )
    return chunk, facts.packet_index


def _is_text(name: str) -> bool:
    """Return whether a file name can be encoded: file systems allow bytes that are not text."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_second(stem: str) -> bool:
    return stem.isascii() and stem.replace(".", "", 1).isdigit()
