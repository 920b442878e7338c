"""Builds manifests of EPIC-KITCHENS-100 for action recognition and multi-instance retrieval."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from avion_dali.contracts import UserError
from avion_dali.data.classes import CaptionTable
from avion_dali.datasets.building import (
    AnnotationRow,
    BuildReport,
    BuildSettings,
    RejectedRow,
    manifest_build,
)
from avion_dali.datasets.epic_files import (
    Annotations,
    action_classes,
    load_relevancy,
    read_annotations,
    read_sentences,
)
from avion_dali.datasets.spans import ChunkLookup

CLASS_FILES = ("EPIC_100_train.csv", "EPIC_100_validation.csv")
# Distinct pairs of verb and noun class in both published files; weights depend on their number and order.
PUBLISHED_CLASSES = 3806
# A sentence has relevancy 1 to the clip from which it was taken; this is rare in a matrix of other files.
_EXACT, _MIN_EXACT_SHARE = 0.999, 0.5
_BLOCK_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Retrieval:
    """The unique sentences of a retrieval set and their relevancy to clips.

    Args:
        sentences: `..._sentence.csv`.
        relevancy: `caption_relevancy_....pkl`, (rows of the annotations, rows of `sentences`).
    """

    sentences: Path
    relevancy: Path


def build_recognition_manifest(
    settings: BuildSettings, annotations: Path, *, classes_from: Sequence[Path] = ()
) -> BuildReport:
    """Build a manifest whose rows have actions as labels.

    Args:
        settings: how the manifest is built.
        annotations: `EPIC_100_train.csv` or `EPIC_100_validation.csv`.
        classes_from: the train and validation files whose actions are the classes; by default the two files in
            the folder of `annotations`.

    Returns:
        Counts of the rows that were included and rejected.

    Raises:
        UserError: when a file cannot be read, or rows are unusable and `skip_bad_rows` is False.
    """
    sources = tuple(classes_from) or tuple(annotations.parent / name for name in CLASS_FILES)
    missing = [str(path) for path in sources if not path.is_file()]
    if missing:
        raise UserError(
            f"{', '.join(missing)} not found: the label of an action is its index among the actions of the "
            "train and the validation file; name both with --classes-from"
        )
    classes = action_classes(sources)
    label_of = {name: label for label, name in enumerate(classes.names)}
    rows, source = read_annotations(annotations).rows, str(annotations)
    with manifest_build(settings) as build:
        labelled = (_labelled(row, label_of) for row in _on_videos(rows, build.lookup))
        placed = build.place(labelled, source=source)
        report = build.finish(placed, source=source, classes=classes)
    if len(classes) == PUBLISHED_CLASSES:
        return report
    return report.with_notes(
        f"{len(classes)} actions, but the published annotations have {PUBLISHED_CLASSES}: labels do not match "
        "published weights"
    )


def build_retrieval_manifest(
    settings: BuildSettings, annotations: Path, retrieval: Retrieval | None = None
) -> BuildReport:
    """Build a manifest for video-text retrieval.

    Args:
        settings: how the manifest is built.
        annotations: `EPIC_100_retrieval_train.csv` or `..._test.csv`.
        retrieval: the captions to retrieve and their relevancy; by default, the captions are the unique
            narrations, and their relevancy is computed from verb and noun classes.

    Returns:
        Counts of the rows that were included and rejected.

    Raises:
        UserError: when a file cannot be read, the matrix does not fit, or rows are unusable and
            `skip_bad_rows` is False.
    """
    found, source = read_annotations(annotations), str(annotations)
    if retrieval is None:
        with manifest_build(settings) as build:
            placed = build.place(_on_videos(found.rows, build.lookup), source=source)
            return build.finish(placed, source=source)
    ids, texts = read_sentences(retrieval.sentences)
    grades_RC = load_relevancy(retrieval.relevancy, shape=(len(found.rows), len(texts)))
    _check_alignment(found, ids, grades_RC=grades_RC, retrieval=retrieval)
    with manifest_build(settings) as build:
        numbered = list(build.place_numbered(_on_videos(found.rows, build.lookup), source=source))
        kept = np.array([number for number, _ in numbered], dtype=np.int64)
        tokens = tuple(build.tokens(text) for text in texts)
        captions = CaptionTable(texts, tokens, _picked_rows(grades_RC, kept))
        return build.finish((sample for _, sample in numbered), source=source, captions=captions)


def _on_videos(
    rows: Iterable[AnnotationRow | RejectedRow], lookup: ChunkLookup
) -> Iterator[AnnotationRow | RejectedRow]:
    """Yield rows with the video names of the chunk folder: participant and video, or only the video."""
    for row in rows:
        known = isinstance(row, RejectedRow) or lookup.knows(row.video)
        yield row if known else replace(row, video=row.video.partition("/")[2])


def _labelled(row: AnnotationRow | RejectedRow, label_of: dict[str, int]) -> AnnotationRow | RejectedRow:
    if isinstance(row, RejectedRow):
        return row
    action = f"{row.verb}:{row.nouns[0]}"
    if action not in label_of:
        return RejectedRow(row.line, row.video, f"action {action} is not among the classes", "unknown class")
    return replace(row, label=label_of[action])


def _picked_rows(grades_RC: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return some rows as float32, copied by blocks: the training set's matrix fits into memory only once."""
    if len(kept) == len(grades_RC):
        return grades_RC
    picked_RC = np.empty((len(kept), grades_RC.shape[1]), np.float32)
    for start in range(0, len(kept), _BLOCK_ROWS):
        picked_RC[start : start + _BLOCK_ROWS] = grades_RC[kept[start : start + _BLOCK_ROWS]]
    return picked_RC


def _check_alignment(
    found: Annotations, ids: Sequence[str], *, grades_RC: np.ndarray, retrieval: Retrieval
) -> None:
    """Reject a matrix whose rows or columns are in another order.

    In some releases, sentence ids are plain numbers; then nothing can be compared.
    """
    row_of = {name: row for row, name in reversed(list(enumerate(found.ids)))}
    pairs = [(row_of[name], column) for column, name in enumerate(ids) if name in row_of]
    exact = sum(bool(grades_RC[row, column] > _EXACT) for row, column in pairs)
    if exact < _MIN_EXACT_SHARE * len(pairs):
        raise UserError(
            f"{retrieval.relevancy}: only {exact} of {len(pairs)} sentences of {retrieval.sentences} have "
            "relevancy 1 to the clip they were taken from: its rows or columns belong to other files"
        )
