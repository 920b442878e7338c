"""Relevancy of captions to clips: stored, computed from classes, or by equal text.

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
    """A source of the relevancy of captions to rows."""

    def of(self, rows: np.ndarray, captions: np.ndarray | None) -> np.ndarray:
        """Return float32 (rows, captions) in [0, 1]; of all captions if `captions` is None."""


@dataclass(frozen=True)
class Captions:
    """The captions of a manifest and their relevancy to its rows.

    Args:
        texts: the captions.
        tokens: token ids of each caption.
        grades: the source of relevancy.
    """

    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    grades: Grades

    def relevancy(self, rows: np.ndarray, captions: np.ndarray | None = None) -> np.ndarray:
        """Return the relevancy of captions to rows.

        Args:
            rows: int64 array (R,), rows of the manifest.
            captions: int64 array (C,) of caption ids; None for all captions.

        Returns:
            float32 (R, C) in [0, 1].
        """
        return self.grades.of(rows, captions)

    def positives(self, row: int, threshold: float) -> np.ndarray:
        """Return the captions whose relevancy to a row exceeds a threshold.

        Args:
            row: row of the manifest.
            threshold: the threshold.

        Returns:
            int64 array of caption ids, increasing; may be empty.
        """
        return np.flatnonzero(self.grades.of(np.array([row]), None)[0] > threshold)


@dataclass(frozen=True)
class StoredGrades:
    """Relevancy that is stored in the manifest.

    Args:
        grades_RC: float32 (rows, captions), memory-mapped.
    """

    grades_RC: np.ndarray

    def of(self, rows: np.ndarray, captions: np.ndarray | None) -> np.ndarray:
        """See `Grades`."""
        # A slice is a view of the file, so that only the requested values are read.
        picked_RC = self.grades_RC[rows[0] : rows[0] + 1] if len(rows) == 1 else self.grades_RC[rows]
        return np.asarray(picked_RC if captions is None else picked_RC[:, captions])


@dataclass(frozen=True)
class TextGrades:
    """Relevancy by equal text: 1 for rows with the text of the caption, 0 for all others.

    Args:
        text_R: int64 (rows,), text number of each row.
        text_C: int64 (captions,), text number of each caption.
    """

    text_R: np.ndarray
    text_C: np.ndarray

    def of(self, rows: np.ndarray, captions: np.ndarray | None) -> np.ndarray:
        """See `Grades`."""
        text_C = self.text_C if captions is None else self.text_C[captions]
        return np.equal.outer(self.text_R[rows], text_C).astype(np.float32)


@dataclass(frozen=True)
class ClassGrades:
    """Relevancy by classes: the mean of verb equality and the intersection over union of the noun sets.

    Source: arXiv 2006.13256, multi-instance retrieval (after arXiv 1908.03477). Rows and captions with the same
    verb and noun set share a meaning; there are far fewer meanings than captions.

    Args:
        meaning_R: int64 (rows,), meaning of each row.
        meaning_C: int64 (captions,), meaning of each caption.
        verb_M: int64 (meanings,), verb of each meaning.
        has_noun_MK: float32 (meanings, nouns), 1 if the meaning has the noun.
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
    """Return the captions of a manifest and their relevancy.

    If the manifest stores captions, these are returned. Otherwise, the captions are the unique first texts of
    its rows, in order of appearance; equal texts with different verb or nouns are different captions. If every
    row has verb and noun classes, relevancy is computed from them (`ClassGrades`), otherwise from equal text
    (`TextGrades`).

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
    """Assign equal numbers to equal items, in order of appearance; returns an int64 array."""
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(item, len(numbers)) for item in items], dtype=np.int64)
