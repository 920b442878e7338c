"""Reads generic annotation files: CSV or JSON lines with video, start, end, text, and optional classes."""

from __future__ import annotations

import ast
import csv
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, TypeVar

from avion_dali.contracts import UserError
from avion_dali.data.classes import ClassTable
from avion_dali.data.manifest import Manifest, Sample
from avion_dali.datasets.annotation_text import opened_text
from avion_dali.datasets.building import (
    AnnotationRow,
    BuildReport,
    BuildSettings,
    ManifestBuild,
    RejectedRow,
    manifest_build,
)
from avion_dali.datasets.spans import SpanError
from avion_dali.wording import few, shown

SPAN_COLUMNS = ("video", "start", "end")
_COLUMNS = (*SPAN_COLUMNS, "text", "verb", "noun", "label")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(inf|nan)", re.IGNORECASE)
_MAX_LIST_LENGTH = 100_000
Default = TypeVar("Default", float, None)


def build_captions_manifest(
    chunk_root: str | Path,
    annotations: str | Path,
    *,
    output: str | Path,
    skip_bad_rows: bool = False,
    jobs: int = 0,
    classes_from: str | Path | None = None,
) -> BuildReport:
    """Build a manifest of chunks and annotated spans; see `read_captions_into`.

    Args:
        chunk_root: folder of `<video>/<start second>.mp4` chunks.
        annotations: `.csv` or `.jsonl` file.
        output: manifest folder to write.
        skip_bad_rows: whether to skip unusable rows instead of raising an error.
        jobs: number of probing processes; 0 uses all cores.
        classes_from: a manifest whose class table numbers the labels.

    Returns:
        Counts of the rows that were included and rejected.
    """
    settings = BuildSettings(Path(chunk_root), Path(output), skip_bad_rows, jobs)
    return read_captions_into(settings, annotations, classes_from=classes_from)


def read_captions_into(
    settings: BuildSettings, annotations: str | Path, *, classes_from: str | Path | None = None
) -> BuildReport:
    """Build a manifest of chunks and annotated spans.

    Rows that cannot be used are listed in `<output>/rejected.jsonl`. The file is read twice, one row at a time:
    the first pass rejects malformed files before any chunk is probed and collects the labels; the second
    pass assigns the rows to chunks.

    Args:
        settings: how the manifest is built.
        annotations: `.csv` (with a header) or `.jsonl` file. `noun` may contain several nouns separated by `;`;
            in JSON, `noun` and `text` may be lists. A row needs a `text` or a `label`, which is the name of its
            class; a row without `start` and `end` refers to the whole video.
        classes_from: a manifest whose class table numbers the labels: the training manifest, for held-out rows.
            By default, all labels of the file are the classes, sorted as strings.

    Returns:
        Counts of the rows that were included and rejected.

    Raises:
        UserError: when a file or column is missing, or rows are unusable and `skip_bad_rows` is False.
    """
    path = Path(annotations)
    survey = _survey(path)
    classes = ClassTable(tuple(sorted(survey.labels))) if survey.labels else None
    if classes_from is not None:
        classes = Manifest(classes_from).classes
        if classes is None:
            raise UserError(f"{classes_from} has no classes; name the training manifest of labeled clips")
    with manifest_build(settings) as build:
        counts = _Counts()
        samples = counts.seen(_placed(build, annotation_rows(path, classes), path))
        report = build.finish(samples, source=str(annotations), classes=classes)
    return report.with_notes(*survey.notes(), *counts.notes())


@dataclass
class _Counts:
    """Counts samples without verb or noun while they are written: classes give them no relevancy."""

    samples: int = 0
    ungraded: int = 0
    texts: int = 0

    def seen(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        for sample in samples:
            self.samples += 1
            self.ungraded += not (sample.verb and sample.nouns)
            self.texts += len(sample.texts)
            yield sample

    def notes(self) -> tuple[str, ...]:
        if not self.ungraded or not self.texts:
            return ()
        number = "all" if self.ungraded == self.samples else str(self.ungraded)
        return (
            f"{number} clips have no verb or no noun: an evaluation on this manifest treats a caption as "
            "relevant only to clips with the same text",
        )


def _placed(build: ManifestBuild, rows: Iterator[AnnotationRow | RejectedRow], path: Path) -> Iterator[Sample]:
    try:
        yield from build.place(rows)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


@dataclass
class _Survey:
    """Results of the first pass through an annotation file."""

    labels: set[str] = field(default_factory=set)
    columns: dict[str, None] = field(default_factory=dict)
    rows: int = 0
    whole: int = 0  # rows without times
    lists: int = 0  # text cells that contain a list

    def notes(self) -> Iterator[str]:
        """Yield notes on input that may have been meant differently."""
        yield from _unread_note([name for name in self.columns if name and name not in _COLUMNS])
        if self.whole:
            count = "all" if self.whole == self.rows else str(self.whole)
            yield f"{count} rows have neither start nor end: each refers to its whole video"
        if self.lists:
            yield f"{self.lists} text cells contain a list: each is read as several texts of one clip"


def _survey(path: Path) -> _Survey:
    """Read and check a file; labels of rows that will be rejected are included."""
    survey = _Survey()
    for _, row in read_rows(path):
        survey.rows += 1
        survey.columns.update(dict.fromkeys(row))
        survey.lists += list_in_cell(row.get("text")) is not None
        with suppress(SpanError):  # reported with the row
            survey.labels.add(_words(row.get("label")))
            survey.whole += not (_words(row.get("start")) or _words(row.get("end")))
    survey.labels.discard("")
    return survey


def _unread_note(columns: Sequence[str]) -> tuple[str, ...]:
    """Return a note on columns that are not read, because one of them may be misspelled."""
    if not columns:
        return ()
    return (f"ignored columns: {few(columns, 10)}; known columns are {', '.join(_COLUMNS)}",)


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, row) of an annotation file.

    Args:
        path: `.csv` or `.jsonl` file.

    Raises:
        UserError: when the file is missing, of an unknown type, malformed, or has no column that is required.
    """
    readers = {".csv": _csv_rows, ".jsonl": _json_rows}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: annotations must be a .csv or .jsonl file")
    with opened_text(path) as file:
        yield from readers[path.suffix.lower()](file, path)


def _csv_rows(file: TextIO, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    # Strict: an unclosed quote is an error; otherwise all following rows would become part of one text.
    # Spaces after commas do not belong to a field, so that a quote may follow them.
    reader = csv.DictReader(file, strict=True, skipinitialspace=True)
    try:
        header = list(map(_column_name, reader.fieldnames or ()))
        absent = ["video"] if "video" not in header else []
        if "text" not in header and "label" not in header:
            absent.append("text")
        if absent:
            raise UserError(
                f"{path}: column {', '.join(absent)} is missing; the header must contain video, text (or "
                "label), and start and end unless clips are whole videos, separated by commas, but it is "
                f"{','.join(header)!r}"
            )
        twice = [name for name in _COLUMNS if header.count(name) > 1]
        if twice:
            raise UserError(f"{path}: column {', '.join(twice)} occurs twice; keep one")
        reader.fieldnames = header
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{path}, near line {reader.line_num}: not valid CSV: {error}") from error


def _column_name(field: str) -> str:
    """Return the name of a column; known names may have surrounding spaces and upper-case letters."""
    name = field.strip()
    return name.lower() if name.lower() in _COLUMNS else name


def _json_rows(file: TextIO, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in enumerate(file, start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {line} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {line} is not a JSON object")
        yield line, row


def annotation_rows(path: Path, classes: ClassTable | None) -> Iterator[AnnotationRow | RejectedRow]:
    """Yield the rows of an annotation file, one at a time.

    Args:
        path: `.csv` or `.jsonl` file.
        classes: the classes that its labels name; None for a file without labels.

    Raises:
        UserError: when the file is missing, of an unknown type, malformed, or has no column that is required.
    """
    labels = {name: label for label, name in enumerate(classes.names)} if classes else {}
    for line, row in read_rows(path):
        try:
            yield _annotation_row(line, row, labels)
        except SpanError as error:
            yield RejectedRow(line, str(row.get("video") or ""), str(error), error.kind)


def _annotation_row(line: int, row: dict[str, Any], labels: dict[str, int]) -> AnnotationRow:
    texts = _listed(list_in_cell(row.get("text")) or row.get("text"))
    label = _words(row.get("label"))
    missing = [] if _words(row.get("video")) else ["video"]
    if not any(texts) and not label:
        missing.append("text")
    if missing:
        raise SpanError(f"{', '.join(missing)} is missing")
    if None in row:
        raise SpanError("has more fields than the header; a text with commas needs quotes")
    if label and label not in labels:
        raise SpanError(f"label {shown(label, 200)} is not a class of the training manifest", "unknown class")
    noun = row.get("noun")
    return AnnotationRow(
        line=line,
        video=_words(row["video"]),
        start_s=_seconds(row.get("start"), default=0.0),
        end_s=_seconds(row.get("end"), default=None),
        texts=texts,
        verb=_words(row.get("verb")),
        nouns=_listed(noun if isinstance(noun, list) else _words(noun).split(";")),
        label=labels[label] if label else -1,
    )


def _listed(value: Any) -> tuple[str, ...]:
    """Return the texts of a field that is one text or a list of texts, without empty ones."""
    return tuple(filter(None, map(_words, value if isinstance(value, list) else [value])))


def list_in_cell(value: Any) -> list[str] | None:
    """Return the texts of a cell that contains a list in Python or JSON syntax; None for any other cell.

    Args:
        value: the cell.
    """
    text = value.strip() if isinstance(value, str) else ""
    if not (text.startswith("[") and text.endswith("]")) or len(text) > _MAX_LIST_LENGTH:
        return None
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            items = read(text)
            if items and all(isinstance(item, str) for item in items):
                return list(items)
    return None


def _words(value: Any) -> str:
    """Return a field as text without surrounding spaces; empty if it is absent, `0` for the class 0."""
    if isinstance(value, dict | list | bool):
        raise SpanError(f"{shown(value)} should be a text or a number")
    text = "" if value is None else str(value).strip()
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SpanError(f"{text!r} is not valid Unicode: {error.reason}") from None
    return text


def _seconds(value: Any, *, default: Default) -> float | Default:
    """Return a time in seconds; the default if it is absent."""
    words = _words(value)
    if not words:
        return default
    if not _NUMBER.fullmatch(words):  # Python would read digits of other scripts and with underscores too
        raise SpanError(f"{shown(value)} is not a number of seconds")
    return float(words)
