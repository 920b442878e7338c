"""Which captions say what a clip shows, and how much: stored grades, grades by classes, or equal text.

Axes: R rows of a manifest, C captions, K noun classes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from avion_dali.contracts import UserError
from avion_dali.data.manifest import Manifest, Sample


class Grades(Protocol):
    """Where the relevancy of rows to captions comes from."""

    def of(self, rows: np.ndarray, captions: np.ndarray | None) -> np.ndarray:
        """Return float32 (rows, captions) in [0, 1]; all captions when None."""


@dataclass(frozen=True)
class Captions:
    """A manifest's captions and how relevant each is to each row.

    Args:
        texts: the captions.
        tokens: their token ids.
        grades: the source of relevancy.
    """

    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    grades: Grades

    def relevancy(self, rows: np.ndarray, captions: np.ndarray | None = None) -> np.ndarray:
        """Return how relevant captions are to rows.

        Args:
            rows: int64 array (R,), rows of the manifest.
            captions: int64 array (C,), caption numbers; None for all.

        Returns:
            Float32 (R, C) in [0, 1].
        """
        return self.grades.of(rows, captions)

    def positives(self, row: int, threshold: float) -> np.ndarray:
        """Return the captions that are relevant to a row.

        Args:
            row: of the manifest.
            threshold: relevancy must exceed it.

        Returns:
            int64 array of caption numbers, increasing; possibly empty.
        """
        return np.flatnonzero(self.grades.of(np.array([row]), None)[0] > threshold)


@dataclass(frozen=True)
class StoredGrades:
    """Grades kept in the manifest.

    Args:
        grades_RC: float32 (rows, captions), mapped.
    """

    grades_RC: np.ndarray

    def of(self, rows: np.ndarray, captions: np.ndarray | None) -> np.ndarray:
        """See `Grades`."""
        # A slice stays a view of the file, so that only what is looked at is read.
        picked_RC = self.grades_RC[rows[0] : rows[0] + 1] if len(rows) == 1 else self.grades_RC[rows]
        return np.asarray(picked_RC if captions is None else picked_RC[:, captions])


@dataclass(frozen=True)
class TextGrades:
    """A caption is relevant (1) to the rows that carry its very text, and to no other (0).

    Args:
        text_R: int64 (rows,), number of each row's text.
        text_C: int64 (captions,), number of each caption's text.
    """

    text_R: np.ndarray
    text_C: np.ndarray

    def of(self, rows: np.ndarray, captions: np.ndarray | None) -> np.ndarray:
        """See `Grades`."""
        text_C = self.text_C if captions is None else self.text_C[captions]
        return np.equal.outer(self.text_R[rows], text_C).astype(np.float32)


@dataclass(frozen=True)
class ClassGrades:
    """The mean of verb equality and the overlap (intersection over union) of noun sets.

    Source: arXiv 2006.13256, multi-instance retrieval (after arXiv 1908.03477). Rows and captions of one verb
    and noun set share a meaning, and meanings are far fewer.

    Args:
        meaning_R: int64 (rows,), meaning of each row.
        meaning_C: int64 (captions,), meaning of each caption.
        verb_M: int64 (meanings,), verb of each meaning.
        has_noun_MK: float32 (meanings, nouns), 1 where a meaning has the noun.
    """

    meaning_R: np.ndarray
    meaning_C: np.ndarray
    verb_M: np.ndarray
    has_noun_MK: np.ndarray

    def of(self, rows: np.ndarray, captions: np.ndarray | None) -> np.ndarray:
        """See `Grades`."""
        queries, at_R = np.unique(self.meaning_R[rows], return_inverse=True)
        wanted = self.meaning_C if captions is None else self.meaning_C[captions]
        found, at_C = np.unique(wanted, return_inverse=True)
        has_noun_QK, has_noun_FK = self.has_noun_MK[queries], self.has_noun_MK[found]
        shared_QF = has_noun_QK @ has_noun_FK.T
        union_QF = has_noun_QK.sum(axis=1)[:, None] + has_noun_FK.sum(axis=1)[None, :] - shared_QF
        same_verb_QF = self.verb_M[queries][:, None] == self.verb_M[found][None, :]
        grades_QF = (shared_QF / union_QF + same_verb_QF) / np.float32(2)
        return grades_QF[np.ix_(at_R, at_C)]


def open_captions(manifest: Manifest) -> Captions:
    """Return a manifest's captions with their grades.

    These are the stored ones where it has such. Otherwise they are the unique first texts of its rows (told
    apart by verb and nouns, too), in order of appearance; when every row has verb and noun classes, relevancy
    is graded by them (`ClassGrades`), else only the same text is relevant (`TextGrades`).

    Args:
        manifest: the opened manifest.

    Raises:
        UserError: when a row has no text, or stored captions are damaged.
    """
    if (table := manifest.captions) is not None:
        assert isinstance(table.relevancy, np.ndarray)
        return Captions(table.texts, table.tokens, StoredGrades(table.relevancy))
    unique: dict[tuple[str, str, tuple[str, ...]], int] = {}
    tokens: list[tuple[int, ...]] = []
    caption_R = np.empty(manifest.num_samples, dtype=np.int64)
    for row, sample in enumerate(manifest.samples()):
        caption_R[row] = unique.setdefault(_key(manifest, row, sample), len(unique))
        if caption_R[row] == len(tokens):
            tokens.append(sample.tokens[0])
    texts = tuple(text for text, _, _ in unique)
    if all(verb and nouns for _, verb, nouns in unique):
        grades: Grades = _grade_by_classes([(verb, frozenset(nouns)) for _, verb, nouns in unique], caption_R)
    else:
        text_C = _numbered(texts)
        grades = TextGrades(text_C[caption_R], text_C)
    return Captions(texts, tuple(tokens), grades)


def _key(manifest: Manifest, row: int, sample: Sample) -> tuple[str, str, tuple[str, ...]]:
    if not sample.texts:
        raise UserError(
            f"{manifest.folder}: row {row} has no text, so its clip cannot be compared with captions"
        )
    return sample.texts[0], sample.verb, sample.nouns


def _grade_by_classes(classes_C: Sequence[tuple[str, frozenset[str]]], caption_R: np.ndarray) -> ClassGrades:
    meaning_C, meanings = _numbered(classes_C), list(dict.fromkeys(classes_C))
    nouns = sorted({noun for _, members in meanings for noun in members})
    has_noun_MK = np.zeros((len(meanings), len(nouns)), dtype=np.float32)
    column = {noun: k for k, noun in enumerate(nouns)}
    for meaning, (_, members) in enumerate(meanings):
        has_noun_MK[meaning, [column[noun] for noun in members]] = 1
    return ClassGrades(meaning_C[caption_R], meaning_C, _numbered([verb for verb, _ in meanings]), has_noun_MK)


def _numbered(items: Collection[object]) -> np.ndarray:
    """Number equal items alike, in order of appearance: int64 array."""
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(item, len(numbers)) for item in items], dtype=np.int64)
