"""Reads Ego4D narrations as EgoVLP, LaViLa and AVION use them: pickled (video, start, end, narration) lists."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from avion_dali.contracts import UserError
from avion_dali.datasets.building import (
    AnnotationRow,
    BuildReport,
    BuildSettings,
    RejectedRow,
    manifest_build,
)
from avion_dali.datasets.unpickling import check_pickle, load_pickle
from avion_dali.wording import shown

# Number of fields of a row that are read; further fields (likelihoods of generated narrations) are ignored.
_FIELDS = 4


class Narrations:
    """The rows of several pickles; only one file is in memory at a time.

    Args:
        paths: the files, whose rows are concatenated.

    Raises:
        UserError: when a file is missing or not a complete pickle.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        for path in paths:
            check_pickle(path)
        self._paths = paths
        self.blank_texts = 0

    def __iter__(self) -> Iterator[AnnotationRow | RejectedRow]:
        """Yield the rows; blank narrations within a row are dropped and counted.

        Raises:
            UserError: when a file is damaged, or does not contain a list of rows.
        """
        for path in self._paths:
            rows = load_pickle(path)
            if not isinstance(rows, list):
                raise UserError(
                    f"{path} contains a {type(rows).__name__}; narrations are a list of (video, start second, "
                    "end second, narration)"
                )
            file = path.name if len(self._paths) > 1 else ""
            for number, row in enumerate(rows, start=1):
                yield self._row(row, number, file=file)
            # Memory may suffice for one corpus but not for two.
            del rows

    def _row(self, row: Any, number: int, *, file: str) -> AnnotationRow | RejectedRow:
        if not isinstance(row, tuple | list) or len(row) < _FIELDS:
            reason = f"{shown(row)} is not a (video, start second, end second, narration)"
            return RejectedRow(number, "", reason, file=file)
        video, start_s, end_s, narration = map(_decoded, row[:_FIELDS])
        name = video if isinstance(video, str) else ""
        if not name:
            return RejectedRow(number, name, f"its video is {shown(video)}, not a name", file=file)
        if not (_is_number(start_s) and _is_number(end_s)):
            reason = f"times {shown(start_s)} and {shown(end_s)} are not numbers of seconds"
            return RejectedRow(number, name, reason, "bad times", file)
        narrations = narration if isinstance(narration, list | tuple) else [narration]
        texts = [_decoded(text) for text in narrations]
        if not all(isinstance(text, str) for text in texts):
            reason = f"its narration is {shown(narration)}, neither text nor a list of texts"
            return RejectedRow(number, name, reason, file=file)
        said = tuple(text for text in texts if text.strip())
        if not said:
            return RejectedRow(number, name, "its narration is empty", "no text", file)
        self.blank_texts += len(texts) - len(said)
        return AnnotationRow(number, name, float(start_s), float(end_s), said, file=file)


def build_ego4d_manifest(settings: BuildSettings, annotations: Sequence[Path]) -> BuildReport:
    """Build a manifest of Ego4D's chunks and narrations.

    Args:
        settings: how the manifest is built.
        annotations: pickled narration files, whose rows are concatenated.

    Returns:
        Counts of the rows that were included and rejected.

    Raises:
        UserError: when a file cannot be read, or rows are unusable and `skip_bad_rows` is False.
    """
    narrations, source = Narrations(annotations), ", ".join(map(str, annotations))
    with manifest_build(settings) as build:
        report = build.finish(build.place(narrations, source=source), source=source)
    notes = []
    if narrations.blank_texts:
        notes.append(f"{narrations.blank_texts} blank narrations in rows with other narrations were dropped")
    return report.with_notes(*notes)


def _decoded(value: Any) -> Any:
    """Decode text that Python 2 pickled as bytes, if it is UTF-8."""
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _is_number(value: Any) -> bool:
    """Return whether a value is a number that a float can represent (Python's integers may be larger)."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 53)
