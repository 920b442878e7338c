"""What readers of annotation files share: rows are put on chunks as they come, unusable ones are listed."""

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
# A record batch of the longest texts must stay below Arrow's 2 GB of strings; a narration has a few dozen.
MAX_TEXT_LENGTH = 8_000
_SHOWN, _SHOWN_NAME = 5, 200
# Annotators repeat themselves: the token ids of recent texts are kept, in about 100 MB.
_REMEMBERED_TEXTS = 1 << 18


@dataclass(frozen=True, slots=True)
class AnnotationRow:
    """One row of an annotation file, read but not yet put on chunks.

    Args:
        line: its line or position in the file, from 1.
        video: name of the video.
        start_s: start in seconds of the video.
        end_s: end in seconds of the video; None for the video's own end.
        texts: its narrations.
        verb: verb class, or empty.
        nouns: noun classes.
        label: class index, or -1.
        file: the annotation file, where there are several.
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
        video: the video it names.
        reason: why not, in words.
        kind: the class of reason that reports count by.
        file: the annotation file, where there are several.
    """

    line: int
    video: str
    reason: str
    kind: str = "malformed row"
    file: str = ""


@dataclass(frozen=True, slots=True)
class BuildSettings:
    """How a manifest is built.

    Args:
        chunk_root: folder of the chunks, or of whole videos.
        output: manifest folder to write.
        skip_bad_rows: leave unusable rows out instead of refusing the file.
        jobs: probing processes; 0 takes all cores.
        on_chunk: called with the number of files probed.
        on_row: called with the number of rows read, after each one.
        names: what the names of chunk files say.
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
    """What a manifest was made of.

    Args:
        num_samples: clips in the manifest.
        num_texts: their narrations, all counted.
        num_chunks: chunk files in the manifest.
        rejected: number of annotation rows left out for each kind of reason.
        unusable: chunk files left out.
        notes: what else the user should know.
    """

    num_samples: int
    num_texts: int
    num_chunks: int
    rejected: dict[str, int]
    unusable: tuple[UnusableChunk, ...]
    notes: tuple[str, ...] = ()

    def with_notes(self, *notes: str) -> BuildReport:
        """Return the report with notes added."""
        return replace(self, notes=(*self.notes, *notes))


class Rejections:
    """Writes rejected rows to a file as they come; keeps their counts and the first few.

    Args:
        path: the file; an old one is removed, and one is made only when a row is rejected.
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
        """Return the counts per kind in words, most frequent first."""
        return ", ".join(f"{count} {kind}" for kind, count in self.counts.most_common())

    def close(self) -> None:
        """Finish the file."""
        if self._file is not None:
            self._file.close()


@dataclass
class ManifestBuild:
    """A manifest in the making: its chunks are known, its rows are put on them as they are read.

    Args:
        settings: how it is built.
        chunks: the usable chunks, sorted by (video, start).
        unusable: the others.
        rejections: takes the rows that cannot be used.
        index: the packet indexes, written but not yet under their name.
        files: the files that were probed.
        passed_over: videos of the chunk folder whose names are no numbers.
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
        """Return a text's token ids; the tokenizer is loaded with the first text."""
        if self._tokenize is None:
            self._tokenize = lru_cache(_REMEMBERED_TEXTS)(clip_tokenizer())
        ids = self._tokenize(text)
        self._long_texts += len(ids) > CONTEXT_LENGTH
        return cut_to_context(ids)

    def unusable_reason(self, path: Path) -> str:
        """Return why a probed file is not among the chunks."""
        if self._reasons is None:
            self._reasons = {chunk.path: chunk.reason for chunk in self.unusable}
        return self._reasons.get(str(path), "cannot be used")

    def place(self, rows: Iterable[AnnotationRow | RejectedRow], *, source: str = "") -> Iterator[Sample]:
        """Yield the samples of usable rows, in order; only the row at hand is held.

        Args:
            rows: what a reader found, rows that it could not read included.
            source: what an error names: the annotation files.

        Raises:
            UserError: after the last row, when rows are unusable and not to be skipped, or none is left.
        """
        return (sample for _, sample in self.place_numbered(rows, source=source))

    def place_numbered(
        self, rows: Iterable[AnnotationRow | RejectedRow], *, source: str = ""
    ) -> Iterator[tuple[int, Sample]]:
        """Yield the samples of usable rows with their positions among `rows`, from 0; see `place`."""
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
            samples: the rows, from `place`.
            source: the annotation files, as `manifest.json` names them.
            captions: captions with graded relevancy, if the data set has them.
            classes: class names, if the data set has them.
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
            yield f"{len(self.passed_over)} videos passed over, for their names are no numbers: {first}, ..."
        if not self._long_texts:
            return
        yield (
            f"{self._long_texts} of {self._texts} texts are longer than the {CONTEXT_LENGTH} tokens that a "
            "text tower sees (fewer, if model.context_length says so): their ends are cut off"
        )

    def _counted(self, samples: Iterable[Sample], info: dict[str, Any]) -> Iterator[Sample]:
        yield from samples
        info["rejected_rows"] = self.rejections.total  # known now; `manifest.json` is written after the rows

    def _sample(self, row: AnnotationRow | RejectedRow) -> Sample | None:
        """Return a row's sample; None for a bad row, and for a good one of files that will be refused."""
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
            lines.append("correct them, or leave them out with --skip-bad-rows")
            raise UserError("\n".join(lines))
        if not self._placed:
            where = f"reasons are in {path}" if bad.total else "the files have none"
            raise UserError(f"{source}no annotation row can be used; {where}")


@contextmanager
def manifest_build(settings: BuildSettings, files: list[ChunkFile] | None = None) -> Iterator[ManifestBuild]:
    """Probe the chunks and open a manifest to be filled; an error leaves an old one in the folder as it was.

    Args:
        settings: how it is built.
        files: the files to probe, sorted; by default all chunks of the folder.

    Yields:
        The manifest in the making.

    Raises:
        UserError: when the folder holds no chunk, or the output cannot be written.
    """
    folder = settings.output
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; --output names the manifest's folder")
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
        raise SpanError(f"a text of it is longer than {MAX_TEXT_LENGTH} characters", "bad text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SpanError(f"{text!r} is not valid Unicode: {error.reason}", "bad text") from None
