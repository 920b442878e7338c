"""Which columns of an annotation file are read, and what is said of the others."""

import json
from pathlib import Path
from typing import Any

import pytest
from annotation_files import use_light_tokenizer
from chunk_folders import copy_chunks

from avion_dali.contracts import UserError
from avion_dali.data.manifest import Manifest
from avion_dali.datasets.building import BuildReport
from avion_dali.datasets.captions import build_captions_manifest

ROW = {"video": "garden", "start": 0, "end": 1, "text": "dig", "verb": "dig", "noun": "hole"}


@pytest.fixture(autouse=True)
def light_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    use_light_tokenizer(monkeypatch)


@pytest.fixture
def chunks(tmp_path: Path, chunk_file: Path) -> Path:
    return copy_chunks(chunk_file, tmp_path / "chunks", {"garden": [0]})


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def build(chunk_root: Path, annotations: Path) -> BuildReport:
    return build_captions_manifest(chunk_root, annotations, output=annotations.parent / "out", jobs=1)


def test_columns_that_are_not_read_are_named(tmp_path: Path, chunks: Path) -> None:
    """A misspelt column changes how an evaluation grades."""
    (tmp_path / "rows.csv").write_text("video,start,end,text,verbs,nouns,\ngarden,0,1,dig,dig,hole,\n")
    rows = [{"video": "garden", "start": 0, "end": 1, "text": "dig", name: "x"} for name in ("verbs", "nouns")]
    for path in (tmp_path / "rows.csv", write_jsonl(tmp_path / "rows.jsonl", rows)):
        unread, ungraded = build(chunks, path).notes
        assert unread.startswith(
            "ignored columns: verbs, nouns; known columns are video, start, end, text, verb, noun"
        )
        assert ungraded.startswith("all clips have no verb")
    extra = [{**ROW, **{f"c{i}": 1 for i in range(12)}}]
    (unread,) = build(chunks, write_jsonl(tmp_path / "rows.jsonl", extra)).notes
    assert "c9 and 2 more;" in unread


def test_a_header_may_have_blanks_and_capitals(tmp_path: Path, chunks: Path) -> None:
    (tmp_path / "rows.csv").write_text(
        'Video, START , end, "Text", Verb, noun\ngarden, 0, 1, "a person digs, slowly", dig, "hole; hand"\n'
    )
    assert build(chunks, tmp_path / "rows.csv").notes == ()
    sample = Manifest(tmp_path / "out").sample(0)
    assert (sample.text, sample.verb, sample.nouns) == ("a person digs, slowly", "dig", ("hole", "hand"))


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path, chunks: Path) -> None:
    (tmp_path / "rows.csv").write_text("video,start,end,text,Text\ngarden,0,1,dig,cut\n")
    with pytest.raises(UserError, match="column text occurs twice"):
        build(chunks, tmp_path / "rows.csv")


def test_clips_without_classes_are_told(tmp_path: Path, chunks: Path) -> None:
    plain = {"video": "garden", "start": 0, "end": 1, "text": "dig"}
    rows = [{**plain, "verb": "dig", "noun": "hole"}, {**plain, "verb": "dig"}, plain]
    (note,) = build(chunks, write_jsonl(tmp_path / "rows.jsonl", rows)).notes
    assert note.startswith("2 clips have no verb or no noun")
    (note,) = build(chunks, write_jsonl(tmp_path / "none.jsonl", [plain, plain])).notes
    assert note.startswith("all clips have no verb or no noun")
    assert build(chunks, write_jsonl(tmp_path / "all.jsonl", rows[:1])).notes == ()
    labelled = {"video": "garden", "start": 0, "end": 1, "label": "dig"}
    assert build(chunks, write_jsonl(tmp_path / "labels.jsonl", [labelled])).notes == ()
