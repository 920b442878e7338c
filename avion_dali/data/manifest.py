"""The manifest: lists the samples of a dataset in memory-mapped Arrow tables.

A manifest is a folder; `manifest.json` says how it was made and which files it consists of (see
`manifest_files.py`). `chunks.arrow` holds one row per chunk file with its probed facts, sorted by (video,
start); `samples.arrow` holds one row per clip with its time span, its chunks (a run of rows of the other
table), its texts with their token ids, and its label; `packets.bin` holds the chunks' packet indexes. Where
rows have labels, `classes.json` names them; where they are graded against a set of captions, `captions.arrow`
and `relevancy.npy` hold captions and grades.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from avion_dali.contracts import ChunkRef, PacketIndexRef, UserError
from avion_dali.data.classes import (
    CAPTIONS_FILE,
    CLASSES_FILE,
    RELEVANCY_FILE,
    CaptionTable,
    ClassTable,
    read_captions,
    read_classes,
    write_captions,
    write_classes,
)
from avion_dali.data.manifest_files import (
    INFO_BEFORE_REPAIR,
    INFO_FILE,
    ManifestFiles,
    file_size,
    files_of,
    new_build,
    replace_info,
    tables_fingerprint,
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
from avion_dali.data.tables import ROWS_PER_BATCH, MappedTable, TableWriter, write_table
from avion_dali.files import partial_path, put_in_place

FORMAT_VERSION = 4
_READABLE_VERSIONS = (3, FORMAT_VERSION)
INDEX_FILE, CHUNKS_FILE, SAMPLES_FILE = "packets.bin", "chunks.arrow", "samples.arrow"
# Files of a manifest of format 3, which a new build replaces.
_FLAT_FILES = (CHUNKS_FILE, SAMPLES_FILE, INDEX_FILE, CLASSES_FILE, CAPTIONS_FILE, RELEVANCY_FILE)
_REQUIRED_FACTS = {
    "chunk_root": str,
    **dict.fromkeys(("num_chunks", "num_samples", "index_bytes", "fingerprint"), int),
}


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
        self.files = ManifestFiles(self.folder, self.info)
        self._index_path = os.path.abspath(self.files.path(INDEX_FILE))
        self.files.require_size(INDEX_FILE, self.info["index_bytes"])
        self._chunks, self._samples = self.table(CHUNKS_FILE), self.table(SAMPLES_FILE)
        self._chunk_columns: dict[int, ChunkColumns] = {}
        self._sample_columns: dict[int, SampleColumns] = {}
        # Reading the timestamps of a variable-rate chunk takes milliseconds, and clips share chunks.
        self._recent_chunk = lru_cache(maxsize=1024)(self._read_chunk)
        self._fps = lru_cache(maxsize=1024)(Fraction)
        rows = (self._chunks.num_rows, self._samples.num_rows)
        if rows != (self.info["num_chunks"], self.info["num_samples"]):
            text = (
                f"{self.folder}: tables have {rows} rows, but manifest.json has other numbers; build it again"
            )
            raise UserError(text)

    def __reduce__(self) -> tuple[type[Manifest], tuple[Path], tuple[str, int]]:
        # Another process opens the folder itself, because tables are memory-mapped and caches are not shared.
        return Manifest, (self.folder.absolute(),), (self.chunk_root, self.fingerprint)

    def __setstate__(self, state: tuple[str, int]) -> None:
        self._place_chunks(state[0])
        if self.fingerprint != state[1]:
            raise UserError(f"{self.folder} was built anew while it was in use; start this program again")

    @cached_property
    def classes(self) -> ClassTable | None:
        """The classes that labels count, or None."""
        return read_classes(self.files.intact(CLASSES_FILE)) if self.info.get("num_classes") else None

    @cached_property
    def captions(self) -> CaptionTable | None:
        """The stored captions that rows are graded against, or None."""
        if not self.info.get("num_captions"):
            return None
        table, relevancy = self.table(CAPTIONS_FILE), self.files.intact(RELEVANCY_FILE)
        return read_captions(table, relevancy, num_rows=self.num_samples)

    def table(self, name: str) -> MappedTable:
        """Open one of the manifest's tables, whose batches are checked when they are read.

        Args:
            name: such as `samples.arrow`.

        Raises:
            UserError: when it is missing or damaged.
        """
        path, checksums = self.files.path(name), self.files.checksums(name)
        return MappedTable(path, rows_per_batch=ROWS_PER_BATCH, checksums=checksums)

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
        return int(columns.label[i])

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

    def finish(self, path: Path | None = None) -> None:
        """Give the file its name; runs that read the file before it keep doing so.

        Args:
            path: its name; by default `packets.bin` in the folder.
        """
        self._file.close()
        put_in_place(self._partial, path or self._path)

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
    with new_build(folder) as build:
        paths = {name: build / name for name in _FLAT_FILES}
        chunk_table = _write_chunks(paths[CHUNKS_FILE], chunks, root=root)
        sample_table = _write_samples(paths[SAMPLES_FILE], samples, num_classes=len(classes or ()))
        facts = {
            **(info or {}),
            "format_version": FORMAT_VERSION,
            "chunk_root": root,
            "num_chunks": chunk_table.num_rows,
            "num_samples": sample_table.num_rows,
            "index_bytes": file_size(folder / INDEX_FILE) if index is None else index.num_bytes,
            "fingerprint": tables_fingerprint(paths[CHUNKS_FILE], paths[SAMPLES_FILE]),
        }
        ends = {CHUNKS_FILE: chunk_table.ends, SAMPLES_FILE: sample_table.ends}
        if classes is not None:
            write_classes(paths[CLASSES_FILE], classes)
            facts["num_classes"] = len(classes)
        if captions is not None:
            facts["num_captions"] = len(captions.texts)
            ends[CAPTIONS_FILE] = write_captions(build, captions, num_rows=sample_table.num_rows)
        files = files_of(folder, build, ends=ends)
        if index is not None:
            index.finish(paths[INDEX_FILE])
            files[INDEX_FILE] = {"path": paths[INDEX_FILE].relative_to(folder).as_posix()}
        replace_info(folder, {**facts, "files": files})
        _delete_replaced(folder, keep_index=index is None)


def _write_chunks(path: Path, chunks: Iterable[Chunk], *, root: str) -> TableWriter:
    def columns(rows: list[Chunk]) -> dict[str, Any]:
        return chunk_values(rows, root)

    return write_table(path, CHUNK_SCHEMA, rows=chunks, columns=columns, rows_per_batch=ROWS_PER_BATCH)


def _write_samples(path: Path, samples: Iterable[Sample], *, num_classes: int) -> TableWriter:
    def columns(rows: list[Sample]) -> dict[str, Any]:
        return sample_values(rows, num_classes)

    return write_table(path, SAMPLE_SCHEMA, rows=samples, columns=columns, rows_per_batch=ROWS_PER_BATCH)


def _delete_replaced(folder: Path, *, keep_index: bool) -> None:
    """Delete what is left of a manifest of format 3, and of repairs of the manifest before."""
    for name in (*_FLAT_FILES, INFO_BEFORE_REPAIR):
        if name != INDEX_FILE or not keep_index:
            (folder / name).unlink(missing_ok=True)


def _read_info(folder: Path) -> dict[str, Any]:
    path = folder / INFO_FILE
    try:
        info = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder} is not a manifest: {path} is missing; make one with `avion-dali manifest`"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); build the manifest again") from error
    if not isinstance(info, dict) or info.get("format_version") not in _READABLE_VERSIONS:
        versions = " and ".join(map(str, _READABLE_VERSIONS))
        raise UserError(f"{path}: this version reads manifests of format {versions}; build it again")
    absent = [key for key, kind in _REQUIRED_FACTS.items() if not isinstance(info.get(key), kind)]
    if absent:
        raise UserError(f"{path} has no {', '.join(absent)}; build the manifest again")
    return info
