"""The manifest: what can be trained on, as memory-mapped Arrow tables.

A manifest is a folder of four files. `chunks.arrow` holds one row per chunk file with its probed facts,
sorted by (video, start); `samples.arrow` holds one row per clip with its time span, its chunks (a run of
rows of the other table) and its token ids; `packets.bin` holds the chunks' packet indexes, which decode
workers read for themselves; `manifest.json` says how it was made. Both tables are written
in record batches of a fixed row count, so that a batch's strings stay far below Arrow's 2 GB limit and a
row is found by division. Columns are memory-mapped: opening costs nothing and all processes share pages.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from avion_dali.contracts import ChunkRef, PacketIndexRef, UserError

FORMAT_VERSION = 2
ROWS_PER_BATCH = 65_536
INDEX_FILE = "packets.bin"
_REQUIRED_FACTS = ("chunk_root", "num_chunks", "num_samples", "index_bytes", "fingerprint")

CHUNK_SCHEMA = pa.schema(
    [
        ("path", pa.string()),  # relative to the chunk folder
        ("video", pa.string()),
        ("start_s", pa.float64()),  # where the chunk begins in its video
        ("fps_num", pa.int32()),
        ("fps_den", pa.int32()),
        ("num_frames", pa.int32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("size_bytes", pa.int64()),
        ("codec", pa.string()),
        ("frame_times", pa.list_(pa.float64())),  # null for a constant frame rate
        ("index_offset", pa.int64()),  # of its record in packets.bin
        ("index_bytes", pa.int32()),  # 0 for a chunk without index
    ]
)
SAMPLE_SCHEMA = pa.schema(
    [
        ("first_chunk", pa.int32()),
        ("num_chunks", pa.int16()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("text", pa.string()),
        ("tokens", pa.list_(pa.uint16())),
        ("verb", pa.string()),
        ("nouns", pa.list_(pa.string())),
    ]
)


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk file with its probed facts.

    Args:
        ref: path, size, frame count and frame size.
        video: name of the source video.
        start_s: seconds from the start of the video to the chunk's first frame.
        fps: frames per second.
        codec: codec name as libavcodec says it.
        frame_times: float64 seconds of each frame from the first one, or None for a constant rate.
    """

    ref: ChunkRef
    video: str
    start_s: float
    fps: Fraction
    codec: str
    frame_times: np.ndarray | None = None

    @property
    def end_s(self) -> float:
        """Seconds from the start of the video to the end of the chunk's last frame."""
        if self.frame_times is not None:
            return self.start_s + float(self.frame_times[-1]) + float(1 / self.fps)
        return self.start_s + float(self.ref.num_frames / self.fps)


@dataclass(frozen=True, slots=True)
class Sample:
    """One row: a time span of a video and what is said of it.

    Args:
        first_chunk: row of the first chunk the span touches.
        num_chunks: how many consecutive chunk rows it touches.
        start_s: start in seconds of the video.
        end_s: end in seconds of the video.
        text: the narration.
        tokens: its token ids, start and end markers included, not padded.
        verb: verb class, or empty.
        nouns: noun classes.
    """

    first_chunk: int
    num_chunks: int
    start_s: float
    end_s: float
    text: str
    tokens: tuple[int, ...] = ()
    verb: str = ""
    nouns: tuple[str, ...] = ()


class _MappedTable:
    """A memory-mapped Arrow file whose batches all have `ROWS_PER_BATCH` rows, but for the last."""

    def __init__(self, path: Path) -> None:
        try:
            self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"{path} is not a readable manifest table ({error}); build it again") from error
        self._columns: dict[tuple[int, str], np.ndarray] = {}
        self._batches: dict[int, pa.RecordBatch] = {}
        last = self._reader.num_record_batches - 1
        self.num_rows = max(last, 0) * ROWS_PER_BATCH + (self.batch(last).num_rows if last >= 0 else 0)

    def batch(self, index: int) -> pa.RecordBatch:
        if index not in self._batches:
            self._batches[index] = self._reader.get_batch(index)
        return self._batches[index]

    def locate(self, row: int) -> tuple[int, int]:
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row {row} outside [0, {self.num_rows})")
        return divmod(row, ROWS_PER_BATCH)

    def number(self, batch: int, name: str, row: int) -> Any:
        """Return one number of a column, through a cached zero-copy view."""
        view = self._columns.get((batch, name))
        if view is None:
            view = self._columns[batch, name] = self.batch(batch).column(name).to_numpy(zero_copy_only=True)
        return view[row].item()

    def value(self, batch: int, name: str, row: int) -> Any:
        """Return one string, list or null."""
        return self.batch(batch).column(name)[row].as_py()


class Manifest:
    """An opened manifest.

    Args:
        folder: what `avion-dali manifest` wrote.
        chunk_root: where the chunk files are now, when they moved since; by default where they were.

    Raises:
        UserError: when the folder is not a manifest, or of another format version.
    """

    def __init__(self, folder: str | Path, *, chunk_root: str | Path | None = None) -> None:
        self.folder = Path(folder)
        self.info = _read_info(self.folder)
        self.chunk_root = os.path.abspath(chunk_root or self.info["chunk_root"])
        self._index_path = os.path.abspath(self.folder / INDEX_FILE)
        _check_index_file(self._index_path, self.info["index_bytes"])
        self._chunks = _MappedTable(self.folder / "chunks.arrow")
        self._samples = _MappedTable(self.folder / "samples.arrow")
        # Reading the timestamps of a variable-rate chunk costs milliseconds, and clips share chunks.
        self._recent_chunk = lru_cache(maxsize=1024)(self._read_chunk)
        rows = (self._chunks.num_rows, self._samples.num_rows)
        if rows != (self.info["num_chunks"], self.info["num_samples"]):
            raise UserError(
                f"{self.folder}: tables have {rows} rows, manifest.json says otherwise; build it again"
            )

    @property
    def fingerprint(self) -> int:
        """Checksum of both tables: the same rows, wherever the chunks lie."""
        return int(self.info["fingerprint"])

    @property
    def num_samples(self) -> int:
        """Number of clips."""
        return self._samples.num_rows

    @property
    def num_chunks(self) -> int:
        """Number of chunk files."""
        return self._chunks.num_rows

    def sample(self, row: int) -> Sample:
        """Return one clip's row.

        Args:
            row: in [0, num_samples).
        """
        table = self._samples
        batch, i = table.locate(row)
        return Sample(
            first_chunk=table.number(batch, "first_chunk", i),
            num_chunks=table.number(batch, "num_chunks", i),
            start_s=table.number(batch, "start_s", i),
            end_s=table.number(batch, "end_s", i),
            text=table.value(batch, "text", i),
            tokens=tuple(table.value(batch, "tokens", i)),
            verb=table.value(batch, "verb", i),
            nouns=tuple(table.value(batch, "nouns", i)),
        )

    def chunk(self, row: int) -> Chunk:
        """Return one chunk's facts.

        Args:
            row: in [0, num_chunks).
        """
        return self._recent_chunk(row)

    def _read_chunk(self, row: int) -> Chunk:
        table = self._chunks
        batch, i = table.locate(row)
        times = table.value(batch, "frame_times", i)
        index_bytes = table.number(batch, "index_bytes", i)
        index = PacketIndexRef(self._index_path, table.number(batch, "index_offset", i), index_bytes)
        ref = ChunkRef(
            path=os.path.join(self.chunk_root, table.value(batch, "path", i)),
            size_bytes=table.number(batch, "size_bytes", i),
            num_frames=table.number(batch, "num_frames", i),
            width=table.number(batch, "width", i),
            height=table.number(batch, "height", i),
            index=index if index_bytes else None,
        )
        return Chunk(
            ref=ref,
            video=table.value(batch, "video", i),
            start_s=table.number(batch, "start_s", i),
            fps=Fraction(table.number(batch, "fps_num", i), table.number(batch, "fps_den", i)),
            codec=table.value(batch, "codec", i),
            frame_times=None if times is None else np.asarray(times),
        )


class IndexWriter:
    """Writes the packet indexes of a manifest as they are made.

    As a context manager: what an error leaves unfinished is deleted.

    Args:
        folder: the manifest's folder; it is made.
    """

    def __init__(self, folder: str | Path) -> None:
        self._path = Path(folder).absolute() / INDEX_FILE
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._partial = self._path.with_suffix(".partial")
        self._file = self._partial.open("wb")
        self._end = 0

    def add(self, record: bytes) -> PacketIndexRef | None:
        """Append a chunk's record.

        Args:
            record: from `ChunkFacts.packet_index`; an empty one is not stored.

        Returns:
            Where it lies, or None for an empty one.
        """
        if not record:
            return None
        self._file.write(record)
        self._end += len(record)
        return PacketIndexRef(str(self._path), self._end - len(record), len(record))

    def finish(self) -> None:
        """Give the file its name; runs that read the file before it keep doing so."""
        self._file.close()
        os.replace(self._partial, self._path)

    def __enter__(self) -> IndexWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)


def write_manifest(
    folder: str | Path,
    *,
    chunk_root: str | Path,
    chunks: Iterable[Chunk],
    samples: Iterable[Sample],
    info: dict[str, Any] | None = None,
) -> None:
    """Write a manifest folder; `manifest.json` comes last, so an interrupted build is not taken for one.

    Args:
        folder: where to write; its parents are made.
        chunk_root: the folder that the chunks' paths are stored relative to.
        chunks: all chunk rows, sorted by (video, start); their indexes are in the folder already.
        samples: all clip rows; their `first_chunk` counts the rows of `chunks`.
        info: further facts for `manifest.json`.
    """
    folder, root = Path(folder), str(Path(chunk_root).resolve())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)
    index_path = folder / INDEX_FILE
    num_chunks = _write_table(folder / "chunks.arrow", CHUNK_SCHEMA, (_chunk_row(c, root) for c in chunks))
    num_samples = _write_table(folder / "samples.arrow", SAMPLE_SCHEMA, (_sample_row(s) for s in samples))
    facts = {
        **(info or {}),
        "format_version": FORMAT_VERSION,
        "chunk_root": root,
        "num_chunks": num_chunks,
        "num_samples": num_samples,
        "index_bytes": index_path.stat().st_size if index_path.exists() else 0,
        "fingerprint": tables_fingerprint(folder / "chunks.arrow", folder / "samples.arrow"),
    }
    (folder / "manifest.json").write_text(json.dumps(facts, indent=2) + "\n")


def tables_fingerprint(chunks: Path, samples: Path) -> int:
    """Return the fingerprint of a manifest with these tables: the CRC-32 of their bytes one after another.

    Args:
        chunks: its `chunks.arrow`.
        samples: its `samples.arrow`.
    """
    checksum = 0
    for path in (chunks, samples):
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                checksum = zlib.crc32(block, checksum)
    return checksum


def _chunk_row(chunk: Chunk, root: str) -> dict[str, Any]:
    return {
        "path": os.path.relpath(chunk.ref.path, root),
        "video": chunk.video,
        "start_s": chunk.start_s,
        "fps_num": chunk.fps.numerator,
        "fps_den": chunk.fps.denominator,
        "num_frames": chunk.ref.num_frames,
        "width": chunk.ref.width,
        "height": chunk.ref.height,
        "size_bytes": chunk.ref.size_bytes,
        "codec": chunk.codec,
        "frame_times": chunk.frame_times,
        "index_offset": chunk.ref.index.offset if chunk.ref.index else 0,
        "index_bytes": chunk.ref.index.num_bytes if chunk.ref.index else 0,
    }


def _sample_row(sample: Sample) -> dict[str, Any]:
    return {name: getattr(sample, name) for name in SAMPLE_SCHEMA.names}


def _write_table(path: Path, schema: pa.Schema, rows: Iterable[dict[str, Any]]) -> int:
    count = 0
    # A new file in the old one's place: runs that map the old one keep reading it.
    partial = path.with_suffix(".partial")
    with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        remaining = iter(rows)
        while block := list(islice(remaining, ROWS_PER_BATCH)):
            writer.write_batch(pa.RecordBatch.from_pylist(block, schema=schema))
            count += len(block)
    os.replace(partial, path)
    return count


def _check_index_file(path: str, num_bytes: int) -> None:
    found = os.path.getsize(path) if os.path.exists(path) else 0
    if found != num_bytes:
        raise UserError(f"{path} has {found} bytes, manifest.json says {num_bytes}; build the manifest again")


def _read_info(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        info = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder} is not a manifest: {path} is missing; make one with `avion-dali manifest`"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); build the manifest again") from error
    if not isinstance(info, dict) or info.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path}: this version reads manifests of format {FORMAT_VERSION}; build it again")
    absent = [key for key in _REQUIRED_FACTS if key not in info]
    if absent:
        raise UserError(f"{path} lacks {', '.join(absent)}; build the manifest again")
    return info
