"""Reads the files of EPIC-KITCHENS-100: annotations, actions as classes, sentences and relevancy matrices.

Columns are read by position: their names differ between releases, but their order does not. Frame numbers are
not used, because they refer to the original frame rate, which some videos do not have; times are always valid.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from avion_dali.contracts import UserError
from avion_dali.data.classes import ClassTable
from avion_dali.datasets.annotation_text import opened_text
from avion_dali.datasets.building import AnnotationRow, RejectedRow
from avion_dali.datasets.unpickling import load_pickle

_ID, _PARTICIPANT, _VIDEO, _START, _STOP, _NARRATION, _VERB, _NOUN, _ALL_NOUNS = 0, 1, 2, 4, 5, 8, 10, 12, 14
_TIME = re.compile(r"(\d{1,3}):([0-5]?\d):([0-5]?\d(?:\.\d+)?)", re.ASCII)
_MAX_DIGITS = 9  # Python refuses to read numbers of thousands of digits
_NUMBERS = re.compile(r"\[\s*\d+(?:\s*,\s*\d+)*\s*,?\s*\]", re.ASCII)
_BLOCK_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Annotations:
    """The rows of an annotation file, in file order.

    Args:
        ids: narration id of each row.
        rows: the rows; those that cannot be parsed are `RejectedRow`s.
    """

    ids: tuple[str, ...]
    rows: tuple[AnnotationRow | RejectedRow, ...]


def read_annotations(path: Path) -> Annotations:
    """Read a file of actions; verbs and nouns are class numbers, videos are named `<participant>/<video>`.

    Rows that repeat an earlier narration id are rejected.

    Args:
        path: the CSV file.

    Raises:
        UserError: when the file cannot be read, is not CSV, or has no row.
    """
    lines_of: dict[str, int] = {}
    ids, rows = [], []
    for line, fields in _csv_rows(path, min_columns=_NOUN + 1):
        row, name = _annotation_row(line, fields), fields[_ID].strip()
        if name in lines_of:
            reason = f"narration id {name} already occurs in line {lines_of[name]}"
            row = RejectedRow(line, row.video, reason, "duplicate")
        lines_of.setdefault(name, line)
        ids.append(name)
        rows.append(row)
    return Annotations(tuple(ids), tuple(rows))


def action_classes(paths: Iterable[Path]) -> ClassTable:
    """Return the actions of several files in label order: `verb:noun` pairs of class numbers, sorted as text.

    Sorted as text, `0:10` precedes `0:9`. This is the order of AVION's and LaViLa's recognition weights.

    Args:
        paths: train and validation CSV files.

    Raises:
        UserError: when a file cannot be read, or a row has no classes.
    """
    found: set[str] = set()
    for path in paths:
        for line, fields in _csv_rows(path, min_columns=_NOUN + 1):
            verb, noun = (_class_number(fields, column) for column in (_VERB, _NOUN))
            if not verb or not noun:
                raise UserError(f"{path}, line {line}: verb_class and noun_class must be numbers")
            found.add(f"{verb}:{noun}")
    names = tuple(sorted(found))
    pairs = [name.split(":") for name in names]
    return ClassTable(names, tuple(int(verb) for verb, _ in pairs), tuple(int(noun) for _, noun in pairs))


def read_sentences(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the ids and texts of a sentence file, in the order of the relevancy matrix's columns.

    Args:
        path: the CSV file with the id of a clip that has the sentence (or a number), and the sentence.

    Raises:
        UserError: when the file cannot be read, a sentence is empty, or an id repeats.
    """
    lines_of: dict[str, int] = {}
    texts = []
    for line, fields in _csv_rows(path, min_columns=2):
        if len(fields) < 2 or not fields[0].strip() or not fields[1].strip():
            raise UserError(f"{path}, line {line}: needs an id and a sentence")
        if fields[0] in lines_of:
            raise UserError(f"{path}, line {line}: id {fields[0]} already occurs in line {lines_of[fields[0]]}")
        lines_of[fields[0]] = line
        texts.append(fields[1].strip())
    return tuple(lines_of), tuple(texts)


def load_relevancy(path: Path, *, shape: tuple[int, int]) -> np.ndarray:
    """Read a pickled relevancy matrix.

    Args:
        path: the pickle.
        shape: (rows of the annotation file, rows of the sentence file).

    Returns:
        Array of this shape with numbers in [0, 1] and the stored dtype.

    Raises:
        UserError: when it is not a matrix of finite numbers in [0, 1], or has another shape.
    """
    grades_RC = load_pickle(path)
    if not isinstance(grades_RC, np.ndarray) or grades_RC.ndim != 2 or grades_RC.dtype.kind not in "fiub":
        kind = type(grades_RC).__name__
        if isinstance(grades_RC, np.ndarray):
            kind = f"{grades_RC.dtype} array of shape {grades_RC.shape}"
        raise UserError(f"{path} contains a {kind}; a relevancy matrix is a 2-D array of numbers")
    if grades_RC.shape != shape:
        raise UserError(
            f"{path} has shape {grades_RC.shape}, but the annotations have {shape[0]} rows and the sentences "
            f"{shape[1]}: these files do not belong together (train and test files may be mixed)"
        )
    for start in range(0, len(grades_RC), _BLOCK_ROWS):
        block_RC = grades_RC[start : start + _BLOCK_ROWS]
        bad = ~((block_RC >= 0) & (block_RC <= 1))  # also finds NaN
        if bad.any():
            row, column = np.argwhere(bad)[0]
            value = block_RC[row, column]
            raise UserError(f"{path}: relevancy {value} of row {start + row}, column {column} is not in [0, 1]")
    return grades_RC


def _annotation_row(line: int, fields: Sequence[str]) -> AnnotationRow | RejectedRow:
    if len(fields) <= _NOUN:
        return RejectedRow(line, "", f"has {len(fields)} fields, not {_NOUN + 1} or more")
    participant, video = fields[_PARTICIPANT].strip(), fields[_VIDEO].strip()
    name = f"{participant}/{video}"
    if not participant or not video:
        return RejectedRow(line, name, "participant or video is missing")
    times = [_seconds(fields[column]) for column in (_START, _STOP)]
    if None in times:
        reason = f"times {fields[_START]!r} and {fields[_STOP]!r} are not HH:MM:SS.ss"
        return RejectedRow(line, name, reason, "bad times")
    verb, noun = (_class_number(fields, column) for column in (_VERB, _NOUN))
    if not verb or not noun:
        reason = f"verb class {fields[_VERB]!r} and noun class {fields[_NOUN]!r} are not numbers"
        return RejectedRow(line, name, reason, "unknown class")
    nouns = _all_nouns(fields, noun)
    if not nouns:
        return RejectedRow(line, name, f"noun classes {fields[_ALL_NOUNS]!r} are no list", "unknown class")
    start_s, stop_s = times
    assert start_s is not None
    return AnnotationRow(line, name, start_s, stop_s, (fields[_NARRATION].strip(),), verb, nouns)


def _csv_rows(path: Path, *, min_columns: int) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, fields) of all rows except the header and blank lines."""
    has_rows = False
    try:
        with opened_text(path) as file:
            reader = csv.reader(file, strict=True)
            _check_header(path, next(reader, []), min_columns=min_columns)
            for fields in filter(None, reader):
                has_rows = True
                yield reader.line_num, fields
    except csv.Error as error:
        raise UserError(f"{path} cannot be read as CSV: {error}") from error
    if not has_rows:
        raise UserError(f"{path} has no rows after its header")


def _check_header(path: Path, header: Sequence[str], *, min_columns: int) -> None:
    if len(header) < min_columns:
        raise UserError(
            f"{path} has {len(header)} columns in its first line; the published file has {min_columns} or "
            "more, separated by commas"
        )


def _seconds(text: str) -> float | None:
    """Convert `HH:MM:SS.ss` to seconds; return None for any other text."""
    parts = _TIME.fullmatch(text.strip())
    return parts and int(parts[1]) * 3600 + int(parts[2]) * 60 + float(parts[3])


def _class_number(fields: Sequence[str], column: int) -> str:
    """Return a class number as text without leading zeros; empty if the field is not a number."""
    text = fields[column].strip() if column < len(fields) else ""
    return str(int(text)) if text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS else ""


def _all_nouns(fields: Sequence[str], noun: str) -> tuple[str, ...]:
    """Return all noun classes, the main one first; empty if the field is not a list of numbers."""
    text = fields[_ALL_NOUNS].strip() if len(fields) > _ALL_NOUNS else ""
    if not text:
        return (noun,)
    if not _NUMBERS.fullmatch(text):
        return ()
    numbers = re.findall(r"\d+", text)
    if max(map(len, numbers)) > _MAX_DIGITS:
        return ()
    return tuple(dict.fromkeys([noun, *(str(int(number)) for number in numbers)]))
