"""Ego4D's narration pickles: every published form is read, every bad row is told, the rest is kept."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from annotation_files import letters, rejected_rows, settings, use_light_tokenizer, write_pickle
from chunk_folders import copy_chunks

from avion_dali.contracts import UserError
from avion_dali.data.manifest import Manifest
from avion_dali.datasets.building import AnnotationRow, BuildReport, RejectedRow
from avion_dali.datasets.ego4d import Narrations, build_ego4d_manifest

UID, HOLED = "0c3c1bb6-f54a", "77cc4654-4eec"
GROUND_TRUTH = [(UID, 0.25, 1.25, "#C C picks the knife"), (HOLED, 0.0, 0.5, "#O a man X walks")]
REPHRASED = [(UID, 0.5, 0.75, ["#C C takes the knife", "#C C lifts the knife"])]
GENERATED = [(UID, 0.5, 0.75, ["#C C cuts"] * 10, [-0.5] * 10)]
BAD: list[tuple[Any, str, str]] = [
    ((UID, 0.5), "is not a (video", "malformed row"),
    ("a text, not a row", "is not a (video", "malformed row"),
    (None, "is not a (video", "malformed row"),
    ((7, 0.0, 1.0, "x"), "its video is 7", "malformed row"),
    (("", 0.0, 1.0, "x"), "its video is ''", "malformed row"),
    ((UID, "0", 1.0, "x"), "not numbers of seconds", "bad times"),
    ((UID, None, 1.0, "x"), "not numbers of seconds", "bad times"),
    ((UID, 0.0, 10**400, "x"), "not numbers of seconds", "bad times"),
    ((UID, float("nan"), 1.0, "x"), "must be seconds", "bad times"),
    ((UID, 0.0, float("inf"), "x"), "must be seconds", "bad times"),
    ((UID, -0.5, 1.0, "x"), "must be seconds >= 0", "bad times"),
    ((UID, 1.5, 1.0, "x"), "before its start", "bad times"),
    (("11111111-dead", 0.0, 1.0, "x"), "has no chunks", "unknown video"),
    ((UID, 60.0, 61.0, "x"), "past the end", "past the end"),
    ((HOLED, 0.5, 2.5, "x"), "1-2 s is missing", "missing chunk"),
    ((HOLED, 1.2, 1.4, "x"), "1-2 s is missing", "missing chunk"),
    ((UID, 0.0, 1.0, None), "neither text nor a list", "malformed row"),
    ((UID, 0.0, 1.0, ["x", 5]), "neither text nor a list", "malformed row"),
    ((UID, 0.0, 1.0, b"\xff\xfe"), "neither text nor a list", "malformed row"),
    ((UID, 0.0, 1.0, ""), "is empty", "no text"),
    ((UID, 0.0, 1.0, []), "is empty", "no text"),
    ((UID, 0.0, 1.0, [" ", "\n"]), "is empty", "no text"),
    ((UID, 0.0, 1.0, "x" * 9000), "longer than 8000", "bad text"),
    ((UID, 0.0, 1.0, "cut \ud83d"), "not valid Unicode", "bad text"),
]


@pytest.fixture(autouse=True)
def light_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    use_light_tokenizer(monkeypatch)


@pytest.fixture(scope="module")
def chunks(tmp_path_factory: pytest.TempPathFactory, chunk_file: Path) -> Path:
    """AVION's layout with 1 s chunks; the second video misses one."""
    videos = {f"{UID}.mp4": [0, 1, 2], f"{HOLED}.mp4": [0, 2]}
    return copy_chunks(chunk_file, tmp_path_factory.mktemp("videos_288px_1sec"), videos)


def build(chunks: Path, output: Path, *pickles: Path, **options: Any) -> BuildReport:
    return build_ego4d_manifest(settings(chunks, output, **options), pickles)


def test_rows_become_clips_with_one_narration(tmp_path: Path, chunks: Path) -> None:
    path = write_pickle(tmp_path / "ego4d_train.pkl", GROUND_TRUTH)
    report = build(chunks, tmp_path / "m", path)
    assert (report.num_samples, report.num_texts, report.num_chunks) == (2, 2, 5)
    assert (report.rejected, report.unusable, report.notes) == ({}, (), ())
    manifest = Manifest(tmp_path / "m")
    first, second = manifest.samples()
    assert (first.start_s, first.end_s, first.num_chunks) == (0.25, 1.25, 2)
    assert (first.texts, first.tokens) == (("#C C picks the knife",), (letters("#C C picks the knife"),))
    assert (first.label, first.verb, first.nouns) == (-1, "", ())
    assert manifest.chunk(first.first_chunk).ref.path == str(chunks / f"{UID}.mp4" / "0.mp4")
    assert manifest.chunk(second.first_chunk).video == f"{HOLED}.mp4"
    assert (manifest.info["annotations"], manifest.info["rejected_rows"]) == (str(path), 0)
    assert manifest.classes is None


def test_several_files_follow_each_other_with_all_their_narrations(tmp_path: Path, chunks: Path) -> None:
    rephraser = write_pickle(tmp_path / "ego4d_train.rephraser.no_punkt_top3.pkl", REPHRASED)
    narrator = write_pickle(tmp_path / "ego4d_train.narrator_63690737.return_10.pkl", GENERATED)
    report = build(chunks, tmp_path / "m", rephraser, narrator)
    assert (report.num_samples, report.num_texts) == (2, 12)
    samples = list(Manifest(tmp_path / "m").samples())
    assert [len(s.texts) for s in samples] == [2, 10]
    assert samples[0].texts == tuple(REPHRASED[0][3])
    assert [len(s.tokens) for s in samples] == [2, 10]
    assert str(rephraser) in Manifest(tmp_path / "m").info["annotations"]


def test_other_forms_of_rows(tmp_path: Path, chunks: Path) -> None:
    """Lists for tuples, whole seconds, numpy numbers, a tuple of narrations, Python 2's bytes."""
    import numpy as np

    rows = [
        [UID, 0, 1, "a"],
        (UID, np.float32(0.5), np.float64(1.5), ("b", "c")),
        (UID.encode(), 0.0, 1.0, ["é".encode()]),
    ]
    build(chunks, tmp_path / "m", write_pickle(tmp_path / "x.pkl", rows))
    samples = list(Manifest(tmp_path / "m").samples())
    assert [s.texts for s in samples] == [("a",), ("b", "c"), ("é",)]
    assert (samples[1].start_s, samples[1].end_s) == (0.5, 1.5)


@pytest.mark.parametrize(("row", "reason", "kind"), BAD, ids=[f"{k}-{i}" for i, (_, _, k) in enumerate(BAD)])
def test_a_bad_row_refuses_the_file(tmp_path: Path, chunks: Path, row: Any, reason: str, kind: str) -> None:
    path = write_pickle(tmp_path / "x.pkl", [*GROUND_TRUTH, row])
    with pytest.raises(UserError) as caught:
        build(chunks, tmp_path / "m", path)
    for words in (str(path), "1 of 3 rows", f"1 {kind}", "line 3", reason, "--skip-bad-rows"):
        assert words in str(caught.value)
    with pytest.raises(UserError, match="not a manifest"):
        Manifest(tmp_path / "m")
    (rejected,) = rejected_rows(tmp_path / "m")
    assert (rejected["line"], rejected["kind"]) == (3, kind)
    assert reason in rejected["reason"]


def test_skipping_keeps_all_good_rows_and_counts_the_bad_by_kind(tmp_path: Path, chunks: Path) -> None:
    rows = [GROUND_TRUTH[0], *(row for row, _, _ in BAD), GROUND_TRUTH[1]]
    path = write_pickle(tmp_path / "x.pkl", rows)
    report = build(chunks, tmp_path / "m", path, skip_bad_rows=True)
    manifest = Manifest(tmp_path / "m")
    assert [s.texts[0] for s in manifest.samples()] == [row[3] for row in GROUND_TRUTH]
    assert report.rejected == dict(Counter(kind for _, _, kind in BAD))
    assert manifest.info["rejected_rows"] == len(BAD)
    rejected = rejected_rows(tmp_path / "m")
    assert [row["line"] for row in rejected] == list(range(2, 2 + len(BAD)))
    for row, (_, reason, _) in zip(rejected, BAD, strict=True):
        assert reason in row["reason"]


def test_rejected_rows_of_several_files_name_theirs(tmp_path: Path, chunks: Path) -> None:
    good = write_pickle(tmp_path / "a.pkl", GROUND_TRUTH)
    bad = write_pickle(tmp_path / "b.pkl", [BAD[0][0], GROUND_TRUTH[0]])
    with pytest.raises(UserError, match=r"b\.pkl, row 1"):
        build(chunks, tmp_path / "m", good, bad)


def test_blank_narrations_among_others_are_left_out_and_told(tmp_path: Path, chunks: Path) -> None:
    path = write_pickle(tmp_path / "x.pkl", [(UID, 0.0, 1.0, ["cuts", "", " "]), GROUND_TRUTH[0]])
    report = build(chunks, tmp_path / "m", path)
    assert Manifest(tmp_path / "m").sample(0).texts == ("cuts",)
    assert report.notes == ("2 blank narrations in rows with other narrations were dropped",)


@pytest.mark.parametrize(
    ("value", "kind"), [({"a": 1}, "dict"), ("text", "str"), (None, "NoneType"), (GROUND_TRUTH[0], "tuple")]
)
def test_another_type_than_a_list_is_refused(tmp_path: Path, chunks: Path, value: Any, kind: str) -> None:
    path = write_pickle(tmp_path / "x.pkl", value)
    with pytest.raises(UserError, match=f"contains a {kind}; narrations are a list"):
        build(chunks, tmp_path / "m", path)


def test_every_file_is_looked_at_before_any_chunk(tmp_path: Path) -> None:
    good = write_pickle(tmp_path / "a.pkl", GROUND_TRUTH)
    cut = tmp_path / "b.pkl"
    cut.write_bytes(good.read_bytes()[:-20])
    for bad in (cut, tmp_path / "absent.pkl"):
        with pytest.raises(UserError, match=bad.name):
            build(tmp_path / "no_chunks", tmp_path / "m", good, bad)


def test_an_empty_list_and_rows_that_are_all_bad_say_so(tmp_path: Path, chunks: Path) -> None:
    with pytest.raises(UserError, match=r"x\.pkl: no annotation row can be used; the files have no rows"):
        build(chunks, tmp_path / "m", write_pickle(tmp_path / "x.pkl", []))
    with pytest.raises(UserError, match=r"no annotation row can be used; the reasons are in .*rejected\.jsonl"):
        build(chunks, tmp_path / "m", write_pickle(tmp_path / "x.pkl", [BAD[0][0]]), skip_bad_rows=True)


def test_rows_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    """The second file is loaded when the first is through, so that one is in memory at a time."""
    first = write_pickle(tmp_path / "a.pkl", GROUND_TRUTH)
    second = write_pickle(tmp_path / "b.pkl", GROUND_TRUTH)
    rows = iter(Narrations([first, second]))
    assert isinstance(next(rows), AnnotationRow)
    write_pickle(second, [REPHRASED[0], ("bad",)])
    found = list(rows)
    assert [type(row) for row in found] == [AnnotationRow, AnnotationRow, RejectedRow]
    assert [row.file for row in found] == ["a.pkl", "b.pkl", "b.pkl"]
