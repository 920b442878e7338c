"""Labels of annotation files: numbered alike for training and held-out rows, whatever chunks are there."""

from pathlib import Path
from typing import Any

import pytest
from chunk_folders import copy_chunks

from avion_dali.contracts import UserError
from avion_dali.data.manifest import Manifest
from avion_dali.datasets import building
from avion_dali.datasets.building import BuildReport
from avion_dali.datasets.captions import build_captions_manifest


@pytest.fixture(autouse=True)
def light_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "clip_tokenizer", lambda: lambda text: (1, len(text), 2))


@pytest.fixture(scope="module")
def chunks(tmp_path_factory: pytest.TempPathFactory, chunk_file: Path) -> Path:
    """One second of one video."""
    return copy_chunks(chunk_file, tmp_path_factory.mktemp("chunks"), {"garden": [0]})


def build(chunk_root: Path, annotations: Path, **options: Any) -> BuildReport:
    return build_captions_manifest(
        chunk_root, annotations, output=annotations.parent / "out", jobs=1, **options
    )


LABELLED = "video,start,end,label\ngarden,0,1,10:2\ngarden,0,1,2:1\ngarden,0,1,0:9\ngarden,0,1,0:10\n"


def test_labels_are_numbered_as_sorted_strings_and_need_no_text(tmp_path: Path, chunks: Path) -> None:
    (tmp_path / "rows.csv").write_text(LABELLED)
    build(chunks, tmp_path / "rows.csv")
    opened = Manifest(tmp_path / "out")
    assert opened.classes.names == ("0:10", "0:9", "10:2", "2:1")
    assert [sample.label for sample in opened.samples()] == [2, 3, 1, 0]
    assert {sample.texts for sample in opened.samples()} == {()}


def test_labels_of_rejected_rows_are_classes_too(tmp_path: Path, chunks: Path) -> None:
    """So that what is missing from a chunk folder does not renumber the classes."""
    (tmp_path / "rows.csv").write_text(LABELLED + "attic,0,1,0:1\n")
    build(chunks, tmp_path / "rows.csv", skip_bad_rows=True)
    opened = Manifest(tmp_path / "out")
    assert opened.classes.names == ("0:1", "0:10", "0:9", "10:2", "2:1")
    assert [sample.label for sample in opened.samples()] == [3, 4, 2, 1]


def test_held_out_rows_take_the_classes_of_the_training_rows(tmp_path: Path, chunks: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
    (tmp_path / "train" / "rows.csv").write_text(LABELLED)
    build(chunks, tmp_path / "train" / "rows.csv")
    held_out = tmp_path / "test" / "rows.csv"
    held_out.write_text("video,start,end,label\ngarden,0,1,2:1\ngarden,0,1,7:7\n")
    with pytest.raises(UserError, match="line 3.*label '7:7' is not a class of the training manifest"):
        build(chunks, held_out, classes_from=tmp_path / "train" / "out")
    report = build(chunks, held_out, classes_from=tmp_path / "train" / "out", skip_bad_rows=True)
    assert report.rejected == {"unknown class": 1}
    opened = Manifest(tmp_path / "test" / "out")
    assert opened.classes == Manifest(tmp_path / "train" / "out").classes
    assert [sample.label for sample in opened.samples()] == [3]


def test_classes_from_a_manifest_without_any_is_a_user_error(tmp_path: Path, chunks: Path) -> None:
    (tmp_path / "rows.csv").write_text("video,start,end,text\ngarden,0,1,dig\n")
    build(chunks, tmp_path / "rows.csv")
    assert Manifest(tmp_path / "out").classes is None
    with pytest.raises(UserError, match="out has no classes"):
        build(chunks, tmp_path / "rows.csv", classes_from=tmp_path / "out")
