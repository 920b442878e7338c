"""Relevancy of captions to rows: stored, by classes, or by equal text."""

from pathlib import Path

import numpy as np
import pytest
from chunk_folders import chunk_row, stored_file

from avion_dali.contracts import UserError
from avion_dali.data.classes import CaptionTable, read_captions
from avion_dali.data.manifest import Manifest, Sample, write_manifest
from avion_dali.data.relevancy import open_captions

Row = tuple[tuple[str, ...], str, tuple[str, ...]]
ROWS: list[Row] = [
    (("cut the carrot",), "cut", ("carrot",)),
    (("wash the knife",), "wash", ("knife",)),
    (("cut the carrot", "slice"), "cut", ("carrot",)),
    (("cut carrot with knife",), "cut", ("carrot", "knife")),
    (("cut the carrot",), "cut", ("carrot", "root")),  # the same words of another meaning
]


def manifest_of(folder: Path, rows: list[Row], *, captions: CaptionTable | None = None) -> Manifest:
    samples = [
        Sample(0, 1, i, i + 1.0, texts, tuple((1, len(text), 99) for text in texts), verb, nouns)
        for i, (texts, verb, nouns) in enumerate(rows)
    ]
    write_manifest(folder, chunk_root="/chunks", chunks=[chunk_row("a", 0)], samples=samples, captions=captions)
    return Manifest(folder)


def test_captions_are_the_unique_first_texts_in_order(tmp_path: Path) -> None:
    captions = open_captions(manifest_of(tmp_path, ROWS))
    assert captions.texts == ("cut the carrot", "wash the knife", "cut carrot with knife", "cut the carrot")
    assert captions.tokens == ((1, 14, 99), (1, 14, 99), (1, 21, 99), (1, 14, 99))


def test_classes_grade_by_verb_and_noun_overlap(tmp_path: Path) -> None:
    relevancy = open_captions(manifest_of(tmp_path, ROWS)).relevancy(np.arange(5))
    assert relevancy.dtype == np.float32
    expected = [
        [1, 0, 0.75, 0.75],
        [0, 1, 0.25, 0],
        [1, 0, 0.75, 0.75],
        [0.75, 0.25, 1, (1 + 1 / 3) / 2],
        [0.75, 0, (1 + 1 / 3) / 2, 1],
    ]
    np.testing.assert_allclose(relevancy, expected, rtol=1e-6)


def test_grades_equal_the_definition_on_random_classes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(120):
        nouns = tuple(f"n{k}" for k in rng.choice(9, size=rng.integers(1, 4), replace=False))
        rows.append(((f"text {i % 50}",), f"v{rng.integers(5)}", nouns))
    captions = open_captions(manifest_of(tmp_path, rows))
    first = list(dict.fromkeys((texts[0], verb, nouns) for texts, verb, nouns in rows))
    expected = np.zeros((120, len(first)))
    for r, (_, verb, nouns) in enumerate(rows):
        for c, (_, other_verb, other_nouns) in enumerate(first):
            shared, either = set(nouns) & set(other_nouns), set(nouns) | set(other_nouns)
            expected[r, c] = ((verb == other_verb) + len(shared) / len(either)) / 2
    np.testing.assert_allclose(captions.relevancy(np.arange(120)), expected, rtol=1e-6)
    picked, some = rng.integers(0, 120, 17), rng.integers(0, len(first), 23)
    np.testing.assert_allclose(captions.relevancy(picked, some), expected[np.ix_(picked, some)], rtol=1e-6)
    for row in picked.tolist():
        np.testing.assert_array_equal(captions.positives(row, 0.3), np.flatnonzero(expected[row] > 0.3))


@pytest.mark.parametrize("nouns", [(), ("carrot",)])
def test_without_all_classes_only_the_same_text_is_relevant(tmp_path: Path, nouns: tuple[str, ...]) -> None:
    rows: list[Row] = [(texts, "", nouns if i == 2 else ()) for i, (texts, _, _) in enumerate(ROWS[:4])]
    captions = open_captions(manifest_of(tmp_path, rows))
    text = [row[0][0] for row in rows]
    expected = [[float(a == b) for b in captions.texts] for a in text]
    np.testing.assert_array_equal(captions.relevancy(np.arange(4)), expected)
    np.testing.assert_array_equal(captions.relevancy(np.array([3, 0]), np.array([1, 0])), [[0, 0], [0, 1]])
    assert captions.positives(1, 0.1).tolist() == [1]


def test_rows_without_text_cannot_be_compared(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="row 1 has no text"):
        open_captions(manifest_of(tmp_path, [ROWS[0], ((), "cut", ("carrot",))]))


def stored(folder: Path) -> tuple[Manifest, np.ndarray]:
    grades = np.random.default_rng(1).random((5, 3)).astype(np.float32)
    grades[2] = 0
    table = CaptionTable(("a", "b", "c"), ((1, 2), (3,), ()), grades)
    return manifest_of(folder, ROWS, captions=table), grades


def test_stored_captions_and_grades_come_before_classes(tmp_path: Path) -> None:
    manifest, grades = stored(tmp_path)
    captions = open_captions(manifest)
    assert (captions.texts, captions.tokens) == (("a", "b", "c"), ((1, 2), (3,), ()))
    np.testing.assert_array_equal(captions.relevancy(np.arange(5)), grades)
    np.testing.assert_array_equal(captions.relevancy(np.array([4])), grades[4:])
    picked, some = np.array([3, 1, 3]), np.array([2, 0])
    np.testing.assert_array_equal(captions.relevancy(picked, some), grades[np.ix_(picked, some)])
    np.testing.assert_array_equal(captions.relevancy(np.array([1]), some), grades[np.ix_([1], some)])


def test_positives_exceed_the_threshold(tmp_path: Path) -> None:
    manifest, grades = stored(tmp_path)
    captions = open_captions(manifest)
    threshold = float(grades[0, 1])
    assert captions.positives(0, threshold).tolist() == np.flatnonzero(grades[0] > threshold).tolist()
    assert captions.positives(2, 0.0).tolist() == []
    assert captions.positives(0, 0.1).dtype == np.int64


def test_stored_grades_stay_on_disk(tmp_path: Path) -> None:
    assert isinstance(open_captions(stored(tmp_path)[0]).grades.grades_RC, np.memmap)


@pytest.mark.parametrize("name", ["captions.arrow", "relevancy.npy"])
def test_damaged_captions_are_a_user_error(tmp_path: Path, name: str) -> None:
    manifest, _ = stored(tmp_path)
    stored_file(tmp_path, name).write_bytes(b"damaged")
    with pytest.raises(UserError, match=rf"{name}.*again"):
        open_captions(manifest)
    stored_file(tmp_path, name).unlink()
    with pytest.raises(UserError, match=rf"{name}.*again"):
        open_captions(manifest)


@pytest.mark.parametrize("grades", [np.zeros((4, 3), np.float32), np.zeros((5, 3))])
def test_grades_of_another_manifest_are_refused(tmp_path: Path, grades: np.ndarray) -> None:
    manifest, _ = stored(tmp_path)
    np.save(stored_file(tmp_path, "relevancy.npy"), grades)
    with pytest.raises(UserError, match=r"relevancy\.npy is damaged"):
        open_captions(manifest)
    with pytest.raises(UserError, match=r"relevancy\.npy contains .*5 rows and 3 captions"):
        read_captions(manifest.table("captions.arrow"), stored_file(tmp_path, "relevancy.npy"), num_rows=5)


def test_captions_need_their_tokens() -> None:
    with pytest.raises(ValueError, match="2 captions"):
        CaptionTable(("a", "b"), ((1,),), np.zeros((1, 2)))
