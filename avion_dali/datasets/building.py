"""Shared code of the annotation readers: assigns annotation rows to chunks and lists unusable rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

from avion_dali.contracts import UserError
from avion_dali.cores import available_cores
from avion_dali.data.classes import CaptionTable, ClassTable
from avion_dali.data.manifest import Chunk, IndexWriter, Sample, write_manifest
from avion_dali.data.scanning import (
    ChunkFile,
    ChunkNames,
    UnusableChunk,
    check_names,
    find_chunk_files,
    probe_files,
)
from avion_dali.data.tokens import CONTEXT_LENGTH, clip_tokenizer, cut_to_context
from avion_dali.datasets.spans import ChunkLookup, SpanError, damaged_parts
from avion_dali.locks import folder_lock

REJECTED_FILE = "rejected.jsonl"
UNUSABLE_FILE = "unusable_chunks.jsonl"
# A record batch of the longest texts must stay below Arrow's 2 GB of strings; most texts are a few dozen long.
MAX_TEXT_LENGTH = 8_000
_SHOWN, _SHOWN_NAME = 5, 200
# Annotations repeat texts, so the token ids of recent texts are cached, in about 100 MB.
_REMEMBERED_TEXTS = 1 << 18


@dataclass(frozen=True, slots=True)
class AnnotationRow:
    """One row of an annotation file, before it is assigned to chunks.

    Args:
        line: its line or position in the file, from 1.
        video: name of the video.
        start_s: start in seconds of the video.
        end_s: end in seconds of the video; None for the end of the video.
        texts: its texts.
        verb: verb class, or empty.
        nouns: noun classes.
        label: class index, or -1.
        file: the annotation file, if there are several.
    """

    line: int
    video: str
    start_s: float
    end_s: float | None
    texts: tuple[str, ...] = ()
    verb: str = ""
    nouns: tuple[str, ...] = ()
    label: int = -1
    file: str = ""


@dataclass(frozen=True, slots=True)
class RejectedRow:
    """An annotation row that cannot be used.

    Args:
        line: its line or position in the file, from 1.
        video: name of its video.
        reason: description of the reason.
        kind: short category of the reason, by which reports count.
        file: the annotation file, if there are several.
    """

    line: int
    video: str
    reason: str
    kind: str = "malformed row"
    file: str = ""


@dataclass(frozen=True, slots=True)
class BuildSettings:
    """Settings for building a manifest.

    Args:
        chunk_root: folder of the chunks, or of whole videos.
        output: manifest folder to write.
        skip_bad_rows: whether to skip unusable rows instead of raising an error.
        jobs: number of probing processes; 0 uses all cores.
        on_chunk: called with the number of files probed.
        on_row: called after each row with the number of rows read.
        names: meaning of the names of chunk files.
    """

    chunk_root: Path
    output: Path
    skip_bad_rows: bool = False
    jobs: int = 0
    on_chunk: Callable[[int], object] | None = None
    on_row: Callable[[int], object] | None = None
    names: ChunkNames = ChunkNames()


@dataclass(frozen=True, slots=True)
class BuildReport:
    """Summary of a built manifest.

    Args:
        num_samples: samples in the manifest.
        num_texts: number of their texts, repeated ones included.
        num_chunks: chunk files in the manifest.
        rejected: number of skipped annotation rows by kind of reason.
        unusable: chunk files that were left out.
        notes: further messages for the user.
    """

    num_samples: int
    num_texts: int
    num_chunks: int
    rejected: dict[str, int]
    unusable: tuple[UnusableChunk, ...]
    notes: tuple[str, ...] = ()

    def with_notes(self, *notes: str) -> BuildReport:
        """Return a copy of the report with additional notes."""
        return replace(self, notes=(*self.notes, *notes))


class Rejections:
    """Writes rejected rows to a file as they occur, and keeps their counts and the first few of them.

    Args:
        path: the file; an existing one is removed, and a new one is created only when a row is rejected.
    """

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self.path, self.counts, self.first = path, Counter[str](), list[RejectedRow]()
        self._file: TextIO | None = None

    def add(self, row: RejectedRow) -> None:
        """Record one row."""
        if self._file is None:
            self._file = self.path.open("w", encoding="utf-8")
        self._file.write(json.dumps(asdict(row)) + "\n")
        self.counts[row.kind] += 1
        if len(self.first) < _SHOWN:
            self.first.append(row)

    @property
    def total(self) -> int:
        """Number of rejected rows."""
        return self.counts.total()

    def describe(self) -> str:
        """Return the counts per kind as text, most frequent first."""
        return ", ".join(f"{count} {kind}" for kind, count in self.counts.most_common())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


@dataclass
class ManifestBuild:
    """A manifest under construction: its chunks are known, and rows are assigned to them as they are read.

    Args:
        settings: how the manifest is built.
        chunks: the usable chunks, sorted by (video, start).
        unusable: the unusable chunks.
        rejections: records the rows that cannot be used.
        index: the packet indexes, still under a temporary name.
        files: the files that were probed.
        passed_over: skipped videos of the chunk folder, whose names are not numbers.
    """

    settings: BuildSettings
    chunks: list[Chunk]
    unusable: list[UnusableChunk]
    rejections: Rejections
    index: IndexWriter
    files: Sequence[ChunkFile] = ()
    passed_over: Sequence[Path] = ()
    lookup: ChunkLookup = field(init=False)
    _tokenize: Callable[[str], tuple[int, ...]] | None = field(init=False, default=None)
    _reasons: dict[str, str] | None = field(init=False, default=None)
    _placed: int = field(init=False, default=0)
    _texts: int = field(init=False, default=0)
    _long_texts: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        bad = {chunk.path for chunk in self.unusable}
        lost = [(video, start_s) for video, start_s, path in self.files if str(path) in bad]
        self.lookup = ChunkLookup(self.chunks, lost, damage=damaged_parts(self.files))

    def tokens(self, text: str) -> tuple[int, ...]:
        """Return a text's token ids; the tokenizer is loaded when the first text is encoded."""
        if self._tokenize is None:
            self._tokenize = lru_cache(_REMEMBERED_TEXTS)(clip_tokenizer())
        ids = self._tokenize(text)
        self._long_texts += len(ids) > CONTEXT_LENGTH
        return cut_to_context(ids)

    def unusable_reason(self, path: Path) -> str:
        """Return the reason why a probed file is not among the chunks."""
        if self._reasons is None:
            self._reasons = {chunk.path: chunk.reason for chunk in self.unusable}
        return self._reasons.get(str(path), "cannot be used")

    def place(self, rows: Iterable[AnnotationRow | RejectedRow], *, source: str = "") -> Iterator[Sample]:
        """Yield the samples of usable rows in order; only the current row is in memory.

        Args:
            rows: the rows from a reader, including those that it could not parse.
            source: the annotation files, for error messages.

        Raises:
            UserError: after the last row, when rows are unusable and `skip_bad_rows` is False, or no row is
                usable.
        """
        return (sample for _, sample in self.place_numbered(rows, source=source))

    def place_numbered(
        self, rows: Iterable[AnnotationRow | RejectedRow], *, source: str = ""
    ) -> Iterator[tuple[int, Sample]]:
        """Yield each usable row's sample with its position in `rows`, from 0; see `place`."""
        total = 0
        for total, row in enumerate(rows, start=1):
            sample = self._sample(row)
            if sample is not None:
                self._placed += 1
                self._texts += len(sample.texts)
                yield total - 1, sample
            if self.settings.on_row is not None:
                self.settings.on_row(total)
        self._refuse(total, f"{source}: " if source else "")

    def finish(
        self,
        samples: Iterable[Sample],
        *,
        source: str,
        captions: CaptionTable | None = None,
        classes: ClassTable | None = None,
    ) -> BuildReport:
        """Write the manifest.

        Args:
            samples: the samples from `place`.
            source: the annotation files, as recorded in `manifest.json`.
            captions: the captions with relevancy, if the data set has them.
            classes: the class names, if the data set has them.
        """
        info: dict[str, Any] = {"annotations": source}
        write_manifest(
            self.settings.output,
            chunk_root=self.settings.chunk_root,
            chunks=self.chunks,
            samples=self._counted(samples, info),
            captions=captions,
            classes=classes,
            info=info,
            index=self.index,
        )
        rejected = dict(self.rejections.counts.most_common())
        sizes = (self._placed, self._texts, len(self.chunks))
        return BuildReport(*sizes, rejected, tuple(self.unusable), tuple(self._notes()))

    def _notes(self) -> Iterator[str]:
        if self.passed_over:
            first = self.passed_over[0].name.encode(errors="backslashreplace").decode()
            yield f"{len(self.passed_over)} videos skipped because their names are not numbers: {first}, ..."
        if not self._long_texts:
            return
        yield (
            f"{self._long_texts} of {self._texts} texts are longer than the {CONTEXT_LENGTH} tokens that a "
            "text tower reads (or fewer, see model.context_length): they are truncated"
        )

    def _counted(self, samples: Iterable[Sample], info: dict[str, Any]) -> Iterator[Sample]:
        yield from samples
        info["rejected_rows"] = self.rejections.total  # final count; `manifest.json` is written after the rows

    def _sample(self, row: AnnotationRow | RejectedRow) -> Sample | None:
        """Return a row's sample; None if it is unusable, or if earlier rows already make the build fail."""
        if isinstance(row, RejectedRow):
            self.rejections.add(row)
            return None
        try:
            if row.end_s is None:
                first, count, end_s = self.lookup.locate_whole(row.video, start_s=row.start_s)
            else:
                first, count, end_s = self.lookup.locate(row.video, row.start_s, row.end_s)
            for text in row.texts:
                _check_text(text)
        except SpanError as error:
            self.rejections.add(RejectedRow(row.line, row.video, str(error), error.kind, row.file))
            return None
        if self.rejections.total and not self.settings.skip_bad_rows:
            return None
        return Sample(
            first_chunk=first,
            num_chunks=count,
            start_s=row.start_s,
            end_s=end_s,
            texts=row.texts,
            tokens=tuple(self.tokens(text) for text in row.texts),
            verb=row.verb,
            nouns=row.nouns,
            label=row.label,
        )

    def _refuse(self, total: int, source: str) -> None:
        bad, path = self.rejections, self.rejections.path
        if bad.total and not self.settings.skip_bad_rows:
            lines = [f"{source}{bad.total} of {total} rows cannot be used ({bad.describe()}):"]
            lines += [
                f"  {_place_of(row)}, video {row.video[:_SHOWN_NAME]!r}: {row.reason}" for row in bad.first
            ]
            if bad.total > _SHOWN:
                lines.append(f"  and {bad.total - _SHOWN} more in {path}")
            lines += [f"  chunk {u.path}: {u.reason}" for u in self.unusable[:_SHOWN]]
            lines.append("correct them, or skip them with --skip-bad-rows")
            raise UserError("\n".join(lines))
        if not self._placed:
            where = f"the reasons are in {path}" if bad.total else "the files have no rows"
            raise UserError(f"{source}no annotation row can be used; {where}")


@contextmanager
def manifest_build(settings: BuildSettings, files: list[ChunkFile] | None = None) -> Iterator[ManifestBuild]:
    """Probe the chunks and start a manifest; if an error occurs, an existing manifest in the folder is kept.

    Args:
        settings: how the manifest is built.
        files: the files to probe, sorted; by default all chunks of the chunk folder.

    Yields:
        The manifest under construction.

    Raises:
        UserError: when the folder contains no chunk, or the output cannot be written.
    """
    folder = settings.output
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; --output must name the folder of the manifest")
    passed_over: list[Path] = []
    found = files
    if found is None:
        found = find_chunk_files(settings.chunk_root, names=settings.names, passed_over=passed_over)
    try:
        with folder_lock(folder, "building a manifest"), IndexWriter(folder) as index:
            jobs = settings.jobs or available_cores()
            chunks, unusable = probe_files(found, jobs=jobs, index=index, on_progress=settings.on_chunk)
            check_names(found, chunks, names=settings.names)
            _write_unusable(folder / UNUSABLE_FILE, unusable)
            rejections = Rejections(folder / REJECTED_FILE)
            try:
                yield ManifestBuild(settings, chunks, unusable, rejections, index, found, passed_over)
            finally:
                rejections.close()
    except OSError as error:
        raise UserError(f"the manifest could not be written to {folder}: {error}") from error


def _write_unusable(path: Path, unusable: list[UnusableChunk]) -> None:
    path.unlink(missing_ok=True)
    if unusable:
        path.write_text("".join(json.dumps(asdict(chunk)) + "\n" for chunk in unusable), encoding="utf-8")


def _place_of(row: RejectedRow) -> str:
    return f"{row.file}, row {row.line}" if row.file else f"line {row.line}"


def _check_text(text: str) -> None:
    if not text.strip():
        raise SpanError("its text is empty", "no text")
    if len(text) > MAX_TEXT_LENGTH:
        raise SpanError(f"one of its texts is longer than {MAX_TEXT_LENGTH} characters", "bad text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SpanError(f"{text!r} is not valid Unicode: {error.reason}", "bad text") from None
