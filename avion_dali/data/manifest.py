"""The manifest: lists the samples of a dataset in memory-mapped Arrow tables.

A manifest is a folder. `chunks.arrow` has one row per chunk file with its probed facts, sorted by (video,
start). `samples.arrow` has one row per sample with its time span, its chunks (consecutive rows of the other
table), its texts with their token ids, and its label. `packets.bin` contains the packet indexes of the chunks,
which decode workers read directly. `manifest.json` records how the manifest was built. If rows have labels,
`classes.json` names the classes; if rows have a relevancy to captions, `captions.arrow` and `relevancy.npy`
contain both.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from avion_dali.contracts import ChunkRef, PacketIndexRef, UserError
from avion_dali.data.classes import (
    CAPTIONS_FILE,
    CLASSES_FILE,
    RELEVANCY_FILE,
    CaptionTable,
    ClassTable,
    read_classes,
    write_captions,
    write_classes,
)
from avion_dali.data.rows import (
    CHUNK_SCHEMA,
    SAMPLE_SCHEMA,
    Chunk,
    ChunkColumns,
    Sample,
    SampleColumns,
    chunk_values,
    sample_values,
)
from avion_dali.data.tables import ROWS_PER_BATCH, MappedTable, Row, write_table
from avion_dali.files import partial_path, put_in_place

FORMAT_VERSION = 3
INDEX_FILE = "packets.bin"
_INFO_FILE, _CHUNKS_FILE, _SAMPLES_FILE = "manifest.json", "chunks.arrow", "samples.arrow"
# All files of a build except the index, in the order in which they replace old ones: the defining file is last.
_PARTS = (_CHUNKS_FILE, _SAMPLES_FILE, CLASSES_FILE, CAPTIONS_FILE, RELEVANCY_FILE, _INFO_FILE)
_STAGING = "new.partial"
_REQUIRED_FACTS = ("chunk_root", "num_chunks", "num_samples", "index_bytes", "fingerprint")


class Manifest:
    """An opened manifest.

    Args:
        folder: folder written by `avion-dali manifest`.
        chunk_root: current folder of the chunk files, if they were moved; by default the recorded one.

    Raises:
        UserError: when the folder is not a manifest, or has another format version.
    """

    def __init__(self, folder: str | Path, *, chunk_root: str | Path | None = None) -> None:
        self.folder = Path(folder)
        self.info = _read_info(self.folder)
        self._place_chunks(chunk_root or self.info["chunk_root"])
        self._index_path = os.path.abspath(self.folder / INDEX_FILE)
        _check_index_file(self._index_path, self.info["index_bytes"])
        self._chunks = MappedTable(self.folder / _CHUNKS_FILE, rows_per_batch=ROWS_PER_BATCH)
        self._samples = MappedTable(self.folder / _SAMPLES_FILE, rows_per_batch=ROWS_PER_BATCH)
        self._chunk_columns: dict[int, ChunkColumns] = {}
        self._sample_columns: dict[int, SampleColumns] = {}
        # Reading the timestamps of a variable-rate chunk takes milliseconds, and clips share chunks.
        self._recent_chunk = lru_cache(maxsize=1024)(self._read_chunk)
        self._fps = lru_cache(maxsize=1024)(Fraction)
        rows = (self._chunks.num_rows, self._samples.num_rows)
        if rows != (self.info["num_chunks"], self.info["num_samples"]):
            raise UserError(
                f"{self.folder}: tables have {rows} rows, but manifest.json has other numbers; build it again"
            )

    def __reduce__(self) -> tuple[type[Manifest], tuple[Path], dict[str, str]]:
        # Another process opens the folder itself, because tables are memory-mapped and caches are not shared.
        return Manifest, (self.folder.absolute(),), {"chunk_root": self.chunk_root}

    def __setstate__(self, state: dict[str, str]) -> None:
        self._place_chunks(state["chunk_root"])

    @cached_property
    def classes(self) -> ClassTable | None:
        """The class table of the labels, or None."""
        return read_classes(self.folder) if self.info.get("num_classes") else None

    @property
    def fingerprint(self) -> int:
        """Checksum of both tables; it does not depend on the location of the chunks."""
        return int(self.info["fingerprint"])

    @property
    def num_samples(self) -> int:
        """Number of samples."""
        return self._samples.num_rows

    @property
    def num_chunks(self) -> int:
        """Number of chunk files."""
        return self._chunks.num_rows

    def sample(self, row: int) -> Sample:
        """Return one row as a sample.

        Args:
            row: in [0, num_samples).
        """
        columns, i = self._locate_sample(row)
        return Sample(
            first_chunk=columns.first_chunk[i],
            num_chunks=columns.num_chunks[i],
            start_s=columns.start_s[i],
            end_s=columns.end_s[i],
            texts=tuple(map(columns.texts.values.at, columns.texts.range(i))),
            tokens=tuple(map(columns.token_ids, columns.tokens.range(i))),
            verb=columns.verb.at(i),
            nouns=tuple(map(columns.nouns.values.at, columns.nouns.range(i))),
            label=columns.label[i],
        )

    def samples(self) -> Iterator[Sample]:
        """Yield all rows as samples, in order."""
        return map(self.sample, range(self.num_samples))

    def span(self, row: int) -> tuple[int, int, float, float]:
        """Return (first chunk, number of chunks, start in seconds, end in seconds) of one row.

        Args:
            row: in [0, num_samples).
        """
        columns, i = self._locate_sample(row)
        return columns.first_chunk[i], columns.num_chunks[i], columns.start_s[i], columns.end_s[i]

    def label(self, row: int) -> int:
        """Return the class index of one row, or -1.

        Args:
            row: in [0, num_samples).
        """
        columns, i = self._locate_sample(row)
        label: int = columns.label[i]
        return label

    def num_texts(self, row: int) -> int:
        """Return the number of texts of one row.

        Args:
            row: in [0, num_samples).
        """
        columns, i = self._locate_sample(row)
        return len(columns.tokens.range(i))

    def tokens(self, row: int, text: int) -> tuple[int, ...]:
        """Return the token ids of one text.

        Args:
            row: in [0, num_samples).
            text: index of the text, in [0, num_texts(row)).
        """
        columns, i = self._locate_sample(row)
        return columns.token_ids(columns.tokens.range(i)[text])

    def chunk(self, row: int) -> Chunk:
        """Return the facts of one chunk.

        Args:
            row: in [0, num_chunks).
        """
        return self._recent_chunk(row)

    def _place_chunks(self, chunk_root: str | Path) -> None:
        self.chunk_root = os.path.abspath(chunk_root)
        self._chunk_prefix = os.path.join(self.chunk_root, "")

    def _locate_sample(self, row: int) -> tuple[SampleColumns, int]:
        batch, i = self._samples.locate(row)
        if batch not in self._sample_columns:
            self._sample_columns[batch] = SampleColumns(self._samples.batch(batch))
        return self._sample_columns[batch], i

    def _read_chunk(self, row: int) -> Chunk:
        batch, i = self._chunks.locate(row)
        if batch not in self._chunk_columns:
            self._chunk_columns[batch] = ChunkColumns(self._chunks.batch(batch))
        columns = self._chunk_columns[batch]
        index_bytes = columns.index_bytes[i]
        index = PacketIndexRef(self._index_path, columns.index_offset[i], index_bytes) if index_bytes else None
        ref = ChunkRef(
            path=self._chunk_prefix + columns.path.at(i),
            size_bytes=columns.size_bytes[i],
            num_frames=columns.num_frames[i],
            width=columns.width[i],
            height=columns.height[i],
            index=index,
        )
        return Chunk(
            ref=ref,
            video=columns.video.at(i),
            start_s=columns.start_s[i],
            fps=self._fps(columns.fps_num[i], columns.fps_den[i]),
            codec=columns.codec.at(i),
            frame_times=columns.frame_times(i),
            last_s=columns.last_s[i],
            pixel_aspect=columns.pixel_aspect[i],
        )


class IndexWriter:
    """Writes the packet indexes of a manifest as they are created.

    As a context manager, it deletes an unfinished file after an error.

    Args:
        folder: folder of the manifest; created if it does not exist.
    """

    def __init__(self, folder: str | Path) -> None:
        self._path = Path(folder).absolute() / INDEX_FILE
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._partial = partial_path(self._path)
        self._file = self._partial.open("wb")
        self._end = 0

    def add(self, record: bytes) -> PacketIndexRef | None:
        """Append the record of a chunk.

        Args:
            record: from `ChunkFacts.packet_index`; empty records are not stored.

        Returns:
            Location of the record, or None if it is empty.
        """
        if not record:
            return None
        self._file.write(record)
        self._end += len(record)
        return PacketIndexRef(str(self._path), self._end - len(record), len(record))

    @property
    def num_bytes(self) -> int:
        """Size of all records so far in bytes."""
        return self._end

    def finish(self) -> None:
        """Give the file its final name; processes that have opened the previous file can still read it."""
        self._file.close()
        put_in_place(self._partial, self._path)

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
    captions: CaptionTable | None = None,
    classes: ClassTable | None = None,
    info: dict[str, Any] | None = None,
    index: IndexWriter | None = None,
) -> None:
    """Write a manifest folder; an existing manifest is kept until the new one is completely written.

    Rows are written in batches, so memory use does not depend on their number.

    Args:
        folder: folder to write; created with its parents if it does not exist.
        chunk_root: folder to which the stored chunk paths are relative.
        chunks: all chunk rows, sorted by (video, start).
        samples: all samples; their `first_chunk` is an index into `chunks`.
        captions: captions with their relevancy, which has one row per sample.
        classes: class table of the labels.
        info: further facts for `manifest.json`; read after the last row is written.
        index: the packet indexes, all added, which are finished here; by default those in the folder are used.

    Raises:
        UserError: when the relevancy does not fit the rows or is not in [0, 1].
        ValueError: when a label is not a class index.
    """
    folder, root = Path(folder), str(Path(chunk_root).resolve())
    with _staging(folder) as new:
        num_chunks = _write_rows(
            new / _CHUNKS_FILE, CHUNK_SCHEMA, rows=chunks, columns=lambda rows: chunk_values(rows, root)
        )
        limit = len(classes) if classes else 0
        num_samples = _write_rows(
            new / _SAMPLES_FILE, SAMPLE_SCHEMA, rows=samples, columns=lambda rows: sample_values(rows, limit)
        )
        facts = {
            **(info or {}),
            "format_version": FORMAT_VERSION,
            "chunk_root": root,
            "num_chunks": num_chunks,
            "num_samples": num_samples,
            "index_bytes": _file_size(folder / INDEX_FILE) if index is None else index.num_bytes,
            "fingerprint": tables_fingerprint(new / _CHUNKS_FILE, new / _SAMPLES_FILE),
        }
        if classes is not None:
            write_classes(new, classes)
            facts["num_classes"] = len(classes)
        if captions is not None:
            facts |= write_captions(new, captions, num_rows=num_samples)
        (new / _INFO_FILE).write_text(json.dumps(facts, indent=2) + "\n")
        _take_over(folder, new, index=index)


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """Yield an empty folder inside the manifest folder for an unfinished build; it is deleted at the end."""
    new = folder / _STAGING
    shutil.rmtree(new, ignore_errors=True)  # left by an interrupted build
    new.mkdir(parents=True)
    try:
        yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _take_over(folder: Path, new: Path, *, index: IndexWriter | None) -> None:
    """Replace the old build by a complete new one; `manifest.json` is missing while files of both are mixed."""
    (folder / _INFO_FILE).unlink(missing_ok=True)
    if index is not None:
        index.finish()
    for name in _PARTS:
        if (new / name).exists():
            put_in_place(new / name, folder / name)
        else:
            (folder / name).unlink(missing_ok=True)


def _write_rows(
    path: Path, schema: pa.Schema, *, rows: Iterable[Row], columns: Callable[[list[Row]], dict[str, Any]]
) -> int:
    return write_table(path, schema, rows=rows, columns=columns, rows_per_batch=ROWS_PER_BATCH)


def tables_fingerprint(chunks: Path, samples: Path) -> int:
    """Return the fingerprint of a manifest with these tables: the CRC-32 of their concatenated bytes.

    Args:
        chunks: path of `chunks.arrow`.
        samples: path of `samples.arrow`.
    """
    checksum = 0
    for path in (chunks, samples):
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                checksum = zlib.crc32(block, checksum)
    return checksum


def _check_index_file(path: str, num_bytes: int) -> None:
    found = _file_size(Path(path))
    if found != num_bytes:
        raise UserError(f"{path} has {found} bytes, manifest.json says {num_bytes}; build the manifest again")


def _file_size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _read_info(folder: Path) -> dict[str, Any]:
    path = folder / _INFO_FILE
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
        raise UserError(f"{path} has no {', '.join(absent)}; build the manifest again")
    return info
