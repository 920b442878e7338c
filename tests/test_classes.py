"""Classes, captions and grades: stored beside the rows, checked against them."""

import zlib
from pathlib import Path

import numpy as np
import pytest
from chunk_folders import chunk_row, sample_row, stored_file

from avion_dali.contracts import UserError
from avion_dali.data import classes as module
from avion_dali.data.classes import CaptionTable, ClassTable
from avion_dali.data.manifest import Manifest, Sample, write_manifest

CHUNKS = [chunk_row("v", 0)]
SAMPLES = [sample_row(0, 1), sample_row(1, 2), Sample(0, 1, 2.0, 3.0), Sample(0, 1, 2.0, 3.0, label=1)]
CLASSES = ClassTable(("0:10", "0:9 é"), verbs=(0, 0), nouns=(10, 9))


def write(folder: Path, *, samples: list[Sample] = SAMPLES) -> Path:
    write_manifest(folder, chunk_root="/chunks", chunks=CHUNKS, samples=samples, classes=CLASSES)
    return folder


def test_classes_are_read_back_and_absent_where_there_are_none(tmp_path: Path) -> None:
    folder = write(tmp_path)
    assert Manifest(folder).classes == CLASSES
    write_manifest(folder, chunk_root="/chunks", chunks=CHUNKS, samples=SAMPLES[:1])
    assert Manifest(folder).classes is None
    assert not list(folder.rglob("classes.json"))


@pytest.mark.parametrize("text", [None, "{", "[]", '{"names": ["a", "a"], "verbs": [], "nouns": []}'])
def test_damaged_classes_are_a_user_error(tmp_path: Path, text: str | None) -> None:
    path = stored_file(write(tmp_path), "classes.json")
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match=r"classes\.json.*again"):
        _ = Manifest(tmp_path).classes


@pytest.mark.parametrize("arguments", [(("a", "a"),), (("a", "b"), (1,), (2, 3)), (("a",), (1,))])
def test_class_tables_that_do_not_fit_are_refused(arguments: tuple[tuple[object, ...], ...]) -> None:
    with pytest.raises(ValueError, match="class"):
        ClassTable(*arguments)


@pytest.mark.parametrize("label", [2, -2])
def test_a_label_outside_the_classes_is_refused(tmp_path: Path, label: int) -> None:
    with pytest.raises(ValueError, match=f"label {label} is none of the 2 classes"):
        write(tmp_path, samples=[Sample(0, 1, 0.0, 1.0, label=label)])
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        Manifest(tmp_path)


def captions_of(relevancy: object) -> CaptionTable:
    return CaptionTable(("cut", "wash é"), ((1, 2), ()), relevancy)


@pytest.mark.parametrize("as_file", [True, False])
def test_grades_are_stored_as_float32_with_their_checksum(tmp_path: Path, as_file: bool) -> None:
    grades = np.random.default_rng(0).random((4, 2))
    if as_file:
        np.save(tmp_path / "grades.npy", grades)
    captions = captions_of(tmp_path / "grades.npy" if as_file else grades)
    write_manifest(
        tmp_path / "m",
        chunk_root="/chunks",
        chunks=CHUNKS,
        samples=SAMPLES[:3] + SAMPLES[:1],
        captions=captions,
    )
    stored = np.load(stored_file(tmp_path / "m", "relevancy.npy"))
    assert stored.dtype == np.float32
    np.testing.assert_array_equal(stored, grades.astype(np.float32))
    manifest = Manifest(tmp_path / "m")
    assert manifest.info["num_captions"] == 2
    data = stored_file(tmp_path / "m", "relevancy.npy").read_bytes()
    assert manifest.files.checksums("relevancy.npy") == [(len(data), zlib.crc32(data))]
    write(tmp_path / "m")  # built again without captions
    assert not {"captions.arrow", "relevancy.npy"} & {path.name for path in (tmp_path / "m").rglob("*")}


def test_grades_are_written_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_GRADES", 5)
    grades = np.random.default_rng(0).random((3, 2))
    write_manifest(
        tmp_path, chunk_root="/chunks", chunks=CHUNKS, samples=SAMPLES[:3], captions=captions_of(grades)
    )
    np.testing.assert_array_equal(np.load(stored_file(tmp_path, "relevancy.npy")), grades.astype(np.float32))


@pytest.mark.parametrize(
    ("grades", "message"),
    [
        (np.zeros((2, 2)), r"shape \(2, 2\) does not fit 3 rows and 2 captions"),
        (np.zeros((3, 3)), "does not fit"),
        (np.full((3, 2), 1.5), r"not in \[0, 1\]"),
        (np.full((3, 2), -0.1), r"not in \[0, 1\]"),
        (np.full((3, 2), np.nan), r"not in \[0, 1\]"),
    ],
)
def test_grades_that_do_not_fit_are_refused(tmp_path: Path, grades: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_manifest(
            tmp_path, chunk_root="/chunks", chunks=CHUNKS, samples=SAMPLES[:3], captions=captions_of(grades)
        )
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        Manifest(tmp_path)
