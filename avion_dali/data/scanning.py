"""Find and probe the chunks of a folder: `<folder>/<video>/<start second>.<extension>`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from avion_dali.contracts import ChunkRef, DecodeError, PacketIndexRef, UserError
from avion_dali.data.manifest import Chunk, IndexWriter
from avion_dali.data.probe import probe_chunk
from avion_dali.data.probing_pool import map_in_processes

CHUNK_SUFFIXES = frozenset({".mp4", ".mkv", ".webm", ".mov", ".avi"})
# Below this many files, starting processes takes longer than probing.
_SERIAL_LIMIT = 64


ChunkFile = tuple[str, float, Path]  # video, start in seconds, file


@dataclass(frozen=True, slots=True)
class UnusableChunk:
    """A chunk file that cannot be used.

    Args:
        path: the file.
        reason: why not.
    """

    path: str
    reason: str


Probed = tuple[Chunk | UnusableChunk, bytes]


def find_chunk_files(folder: str | Path) -> list[ChunkFile]:
    """List a folder's chunk files, sorted by video and start.

    Args:
        folder: the chunk folder; videos may lie deeper (`P01/P01_01.MP4/15.MP4`).

    Returns:
        (video, start in seconds, file), the video named by its path below the folder.

    Raises:
        UserError: when the folder is missing or holds no chunk.
    """
    root = Path(folder).resolve()
    if not root.is_dir():
        raise UserError(f"{folder} is not a folder; name the one that `avion-dali chunk --output` wrote")
    found = [
        (path.parent.relative_to(root).as_posix(), float(path.stem), path)
        for path in _files_below(root)
        if path.suffix.lower() in CHUNK_SUFFIXES and _is_second(path.stem)
    ]
    if not found:
        raise UserError(
            f"{folder} holds no chunks (files <video>/<start second>.mp4); make them with `avion-dali chunk`"
        )
    return sorted(found)


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
        jobs: processes.
        index: takes the packet index of each usable chunk; without one, none are made.
        on_progress: called with the number of files done.

    Returns:
        The usable chunks, sorted by (video, start), and those that are not, with reasons.

    Raises:
        UserError: when the folder is missing or holds no chunk.
    """
    return probe_files(find_chunk_files(folder), jobs=jobs, index=index, on_progress=on_progress)


def probe_files(
    files: list[ChunkFile],
    *,
    jobs: int,
    index: IndexWriter | None = None,
    on_progress: Callable[[int], object] | None = None,
) -> tuple[list[Chunk], list[UnusableChunk]]:
    """Probe files in parallel, chunks or whole videos.

    Args:
        files: (video, start in seconds, file), sorted by (video, start).
        jobs: processes.
        index: takes the packet index of each usable file; without one, none are made.
        on_progress: called with the number of files done.

    Returns:
        The usable files as chunks, in the order given, and those that are not, with reasons.
    """
    chunks: list[Chunk] = []
    unusable: list[UnusableChunk] = []
    probe = partial(_probe, index=index is not None)
    for done, (result, record) in enumerate(_probe_all(files, jobs, probe), start=1):
        if isinstance(result, UnusableChunk):
            unusable.append(result)
        elif chunks and (result.video, result.start_s) == (chunks[-1].video, chunks[-1].start_s):
            unusable.append(UnusableChunk(result.ref.path, f"holds the same seconds as {chunks[-1].ref.path}"))
        else:
            chunks.append(result if index is None else _indexed(result, index.add(record)))
        if on_progress is not None:
            on_progress(done)
    return chunks, unusable


def _files_below(root: Path) -> Iterator[Path]:
    """Yield all files, also those in linked folders (videos spread over disks), each folder once."""
    entered: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in entered:  # a link back to where we are
            subfolders.clear()
            continue
        entered.add(real)
        yield from (path for path in (Path(folder, name) for name in names) if path.is_file())


def _indexed(chunk: Chunk, index: PacketIndexRef | None) -> Chunk:
    return replace(chunk, ref=replace(chunk.ref, index=index))


def _probe_all(files: list[ChunkFile], jobs: int, probe: Callable[[ChunkFile], Probed]) -> Iterator[Probed]:
    if jobs <= 1 or len(files) < _SERIAL_LIMIT:
        yield from map(probe, files)
        return
    yield from map_in_processes(probe, files, jobs=jobs, lost=_lost)


def _lost(file: ChunkFile, reason: str) -> Probed:
    return UnusableChunk(str(file[2]), reason), b""


def _probe(file: ChunkFile, *, index: bool) -> Probed:
    """Return a file's facts, or why it is unusable, and its packet index."""
    video, start_s, path = file
    try:
        facts = probe_chunk(path, index=index)
    except DecodeError as error:
        return UnusableChunk(str(path), f"{error.kind}: {error.cause}"), b""
    except Exception as error:  # a process boundary: what one damaged file provokes is that file's failure
        return UnusableChunk(str(path), f"corrupt: {type(error).__name__}: {error}"), b""
    if facts.rotation:
        reason = f"rotated by {facts.rotation} degrees; chunk it with `avion-dali chunk`"
        return UnusableChunk(str(path), reason), b""
    ref = ChunkRef(str(path), facts.size_bytes, facts.num_frames, facts.width, facts.height)
    return Chunk(ref, video, start_s, facts.fps, facts.codec, facts.frame_times), facts.packet_index


def _is_second(stem: str) -> bool:
    return stem.isascii() and stem.replace(".", "", 1).isdigit()
