"""EPIC-KITCHENS-100: columns by position, classes in text order, matrices that fit, every bad row told."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from annotation_files import (
    epic_row,
    letters,
    rejected_rows,
    settings,
    use_light_tokenizer,
    write_epic,
    write_lines,
    write_pickle,
    write_relevancy,
    write_sentences,
)
from chunk_folders import copy_chunks

from avion_dali.contracts import UserError
from avion_dali.data.manifest import Manifest
from avion_dali.data.relevancy import open_captions
from avion_dali.datasets import ek100
from avion_dali.datasets.building import BuildReport
from avion_dali.datasets.ek100 import Retrieval, build_recognition_manifest, build_retrieval_manifest
from avion_dali.datasets.epic_files import action_classes, load_relevancy, read_annotations, read_sentences

TRAIN = [
    epic_row("P01_01_0", verb=0, noun=9, nouns="[9, 4]", narration="open the door"),
    epic_row("P01_01_1", "00:00:01.10", "00:00:02.30", verb=10, noun=2),
    epic_row("P01_101_0", video="P01_101", verb=2, noun=1),
]
VALIDATION = [epic_row("P01_01_9", verb=0, noun=10), epic_row("P01_01_10", verb=2, noun=1)]
BAD: list[tuple[list[Any], str, str]] = [
    (epic_row("b0", "0:61:00.00"), "are not HH:MM:SS.ss", "bad times"),
    (epic_row("b1", "12.5", "13.5"), "are not HH:MM:SS.ss", "bad times"),
    (epic_row("b2", "", ""), "are not HH:MM:SS.ss", "bad times"),
    (epic_row("b3", "-00:00:01.0"), "are not HH:MM:SS.ss", "bad times"),
    (epic_row("b4", "00:00:02.00", "00:00:01.00"), "before its start", "bad times"),
    (epic_row("b5", "01:00:00.00", "01:00:01.00"), "past the end", "past the end"),
    (epic_row("b6", video="P09_01"), "'P09_01' has no chunks", "unknown video"),
    (epic_row("b7", video="P02_01", start="00:00:00.50", stop="00:00:02.50"), "1-2 s", "missing chunk"),
    (epic_row("b8", verb="wash"), "'wash' and noun class", "unknown class"),
    (epic_row("b9", noun=""), "are not numbers", "unknown class"),
    (epic_row("b10", nouns="[1, two]"), "are no list", "unknown class"),
    (epic_row("P01_01_0"), "already occurs in line 2", "duplicate"),
    (epic_row("b11", narration=" "), "its text is empty", "no text"),
    (epic_row("b12")[:9], "has 9 fields", "malformed row"),
    (["b13", "", "", *epic_row("")[3:]], "participant or video is missing", "malformed row"),
]


@pytest.fixture(autouse=True)
def light_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    use_light_tokenizer(monkeypatch)


@pytest.fixture(scope="module")
def chunks(tmp_path_factory: pytest.TempPathFactory, chunk_file: Path) -> Path:
    """AVION's layout: folders of participants and endings in capitals; a video of the extension, too."""
    root = tmp_path_factory.mktemp("EK100_320p_1sec")
    videos = {"P01/P01_01.MP4": [0, 1, 2], "P01/P01_101.MP4": [0, 1], "P02/P02_01.MP4": [0, 2]}
    copy_chunks(chunk_file, root, videos)
    for path in list(root.rglob("*.mp4")):
        path.rename(path.with_suffix(".MP4"))
    return root


@pytest.fixture
def csvs(tmp_path: Path) -> Path:
    """The folder of the published files of recognition."""
    write_epic(tmp_path / "EPIC_100_train.csv", TRAIN)
    write_epic(tmp_path / "EPIC_100_validation.csv", VALIDATION)
    return tmp_path


def recognize(chunks: Path, csv: Path, **options: Any) -> BuildReport:
    return build_recognition_manifest(settings(chunks, csv.parent / "m", **options), csv)


def test_rows_are_labelled_by_their_place_among_all_actions(csvs: Path, chunks: Path) -> None:
    report = recognize(chunks, csvs / "EPIC_100_train.csv")
    manifest = Manifest(csvs / "m")
    assert manifest.classes is not None
    assert manifest.classes.names == ("0:10", "0:9", "10:2", "2:1")  # sorted as text, validation's included
    assert (manifest.classes.verbs, manifest.classes.nouns) == ((0, 0, 10, 2), (10, 9, 2, 1))
    first, second, third = manifest.samples()
    assert [s.label for s in (first, second, third)] == [1, 2, 3]
    assert (first.verb, first.nouns, first.texts) == ("0", ("9", "4"), ("open the door",))
    assert first.tokens == (letters("open the door"),)
    assert (second.start_s, second.end_s, second.num_chunks) == (1.1, 2.3, 2)
    paths = [manifest.chunk(s.first_chunk).ref.path for s in (first, second, third)]
    expected = [("P01_01", 0), ("P01_01", 1), ("P01_101", 0)]
    assert paths == [str(chunks / "P01" / f"{video}.MP4" / f"{n}.MP4") for video, n in expected]
    assert report.notes == (
        "4 actions, but the published annotations have 3806: labels do not match published weights",
    )


def test_validation_has_the_same_classes(csvs: Path, chunks: Path) -> None:
    recognize(chunks, csvs / "EPIC_100_validation.csv")
    assert [s.label for s in Manifest(csvs / "m").samples()] == [0, 3]


def test_the_published_number_of_actions_needs_no_note(
    csvs: Path, chunks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ek100, "PUBLISHED_CLASSES", 4)
    assert recognize(chunks, csvs / "EPIC_100_train.csv").notes == ()


def test_class_order_is_that_of_text_not_of_numbers(tmp_path: Path) -> None:
    pairs = [(v, n) for v in range(12) for n in range(12)]
    rows = [epic_row(f"r{v}_{n}", verb=v, noun=n) for v, n in reversed(pairs)]
    classes = action_classes(
        [write_epic(tmp_path / "a.csv", rows[:70]), write_epic(tmp_path / "b.csv", rows[70:])]
    )
    assert list(classes.names) == sorted(f"{v}:{n}" for v, n in pairs)
    assert classes.names[:4] == ("0:0", "0:1", "0:10", "0:11")
    assert classes.names.index("10:2") < classes.names.index("2:1")
    assert [f"{v}:{n}" for v, n in zip(classes.verbs, classes.nouns, strict=True)] == list(classes.names)


def test_classes_may_come_from_files_elsewhere(csvs: Path, tmp_path: Path, chunks: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    csv = write_epic(folder / "subset.csv", TRAIN[:1])
    with pytest.raises(UserError, match=r"EPIC_100_train\.csv.*not found.*--classes-from"):
        recognize(chunks, csv)
    names = [csvs / "EPIC_100_train.csv", csvs / "EPIC_100_validation.csv"]
    build_recognition_manifest(settings(chunks, folder / "m"), csv, classes_from=names)
    assert Manifest(folder / "m").sample(0).label == 1
    build = settings(chunks, folder / "m")
    with pytest.raises(UserError, match="action 0:9 is not among the classes"):
        build_recognition_manifest(build, csv, classes_from=names[1:])


@pytest.mark.parametrize(("row", "reason", "kind"), BAD, ids=[row[0] for row, _, _ in BAD])
def test_bad_rows_are_told(tmp_path: Path, chunks: Path, row: list[Any], reason: str, kind: str) -> None:
    csv = write_epic(tmp_path / "x.csv", [TRAIN[0], row, TRAIN[1]])
    build = settings(chunks, tmp_path / "m")
    with pytest.raises(UserError) as caught:
        build_retrieval_manifest(build, csv)
    for words in (str(csv), "1 of 3 rows", f"1 {kind}", "line 3", reason, "--skip-bad-rows"):
        assert words in str(caught.value)
    report = build_retrieval_manifest(settings(chunks, tmp_path / "m", skip_bad_rows=True), csv)
    assert (report.num_samples, report.rejected) == (2, {kind: 1})
    assert rejected_rows(tmp_path / "m")[0]["kind"] == kind


def test_a_chunk_folder_without_participants_is_found_by_video(tmp_path: Path, chunk_file: Path) -> None:
    root = copy_chunks(chunk_file, tmp_path / "flat", {"P01_01.MP4": [0, 1, 2], "P01_101.MP4": [0]})
    build_retrieval_manifest(settings(root, tmp_path / "m"), write_epic(tmp_path / "x.csv", TRAIN))
    manifest = Manifest(tmp_path / "m")
    assert [manifest.chunk(s.first_chunk).video for s in manifest.samples()] == ["P01_01.MP4"] * 2 + [
        "P01_101.MP4"
    ]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("00:00:00.14", 0.14), ("00:01:02", 62.0), ("01:00:59.999", 3659.999), ("0:0:3.5", 3.5)],
)
def test_times(tmp_path: Path, text: str, seconds: float) -> None:
    (row,) = read_annotations(write_epic(tmp_path / "x.csv", [epic_row("a", text, text)])).rows
    assert row.start_s == pytest.approx(seconds)


def test_column_names_do_not_matter_and_quotes_and_marks_are_read(tmp_path: Path) -> None:
    header = ",".join(f"c{i}" for i in range(15))
    rows = [epic_row("a", narration='put "it", slowly'), epic_row("b")[:13]]
    csv = write_epic(tmp_path / "x.csv", rows, header="\ufeff" + header)
    first, second = read_annotations(csv).rows
    assert first.texts == ('put "it", slowly',)
    assert second.nouns == ("13",)  # without a list of all nouns, the main one


SENTENCES = [("P01_01_0", "open the door"), ("P01_101_0", "wash cup"), ("elsewhere", "cut carrot")]
GRADES = np.array([[1, 0.25, 0.5], [0, 0.5, 0.125], [0.25, 1, 0.0]])


@pytest.fixture
def retrieval(tmp_path: Path) -> tuple[Path, Retrieval]:
    csv = write_epic(tmp_path / "EPIC_100_retrieval_train.csv", TRAIN)
    sentences = write_sentences(tmp_path / "EPIC_100_retrieval_train_sentence.csv", SENTENCES)
    return csv, Retrieval(sentences, write_relevancy(tmp_path / "relevancy.pkl", GRADES))


def test_captions_and_their_relevancy_are_stored(
    tmp_path: Path, chunks: Path, retrieval: tuple[Path, Retrieval]
) -> None:
    build_retrieval_manifest(settings(chunks, tmp_path / "m"), *retrieval)
    manifest = Manifest(tmp_path / "m")
    captions = open_captions(manifest)
    assert captions.texts == tuple(text for _, text in SENTENCES)
    assert captions.tokens == tuple(letters(text) for _, text in SENTENCES)
    grades = captions.relevancy(np.arange(3))
    assert grades.dtype == np.float32
    np.testing.assert_array_equal(grades, GRADES.astype(np.float32))
    assert captions.positives(2, 0.1).tolist() == [0, 1]
    assert [s.texts for s in manifest.samples()] == [("open the door",), ("wash cup",), ("wash cup",)]
    assert manifest.files.checksums("relevancy.npy")


def test_relevancy_keeps_to_its_rows_when_some_are_left_out(tmp_path: Path, chunks: Path) -> None:
    rows = [BAD[6][0], TRAIN[0], BAD[0][0], TRAIN[1], TRAIN[2], BAD[13][0]]
    grades = np.concatenate([[GRADES[0] / 3], GRADES[:1], [GRADES[1] / 3], GRADES[1:], [GRADES[2] / 3]])
    csv = write_epic(tmp_path / "x.csv", rows)
    files = Retrieval(
        write_sentences(tmp_path / "s.csv", SENTENCES), write_relevancy(tmp_path / "r.pkl", grades, "float32")
    )
    report = build_retrieval_manifest(settings(chunks, tmp_path / "m", skip_bad_rows=True), csv, files)
    assert report.rejected == {"unknown video": 1, "bad times": 1, "malformed row": 1}
    captions = open_captions(Manifest(tmp_path / "m"))
    np.testing.assert_array_equal(captions.relevancy(np.arange(3)), GRADES.astype(np.float32))


def test_without_a_matrix_captions_are_graded_by_classes(tmp_path: Path, chunks: Path) -> None:
    """Mean of verb equality and overlap of noun sets (all nouns, not the main one alone)."""
    rows = [
        epic_row("a", verb=0, noun=9, nouns="[9, 4]", narration="x"),
        epic_row("b", verb=0, noun=4, narration="y"),
    ]
    build_retrieval_manifest(settings(chunks, tmp_path / "m"), write_epic(tmp_path / "x.csv", rows))
    captions = open_captions(Manifest(tmp_path / "m"))
    np.testing.assert_allclose(captions.relevancy(np.arange(2)), [[1, 0.75], [0.75, 1]])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (GRADES[:2], r"shape \(2, 3\).*annotations have 3 rows and the sentences 3"),
        (GRADES.T[:, :2], "do not belong together"),
        (np.where(GRADES == 0.125, np.nan, GRADES), "relevancy nan of row 1, column 2"),
        (GRADES * 2, "relevancy 2.0 of row 0, column 0"),
        (-GRADES, r"row 0, column 0 is not in \[0, 1\]"),
        (GRADES[0], "float64 array of shape"),
        (GRADES.astype(str), "<U32 array"),
        (GRADES.tolist(), "contains a list"),
        ({"relevancy": 1}, "contains a dict"),
        (GRADES[::-1].copy(), "only 0 of 2 sentences"),
        (GRADES[:, [1, 2, 0]].copy(), "only 0 of 2 sentences"),
    ],
)
def test_a_matrix_that_does_not_fit_is_refused(
    tmp_path: Path, retrieval: tuple[Path, Retrieval], value: Any, message: str
) -> None:
    csv, files = retrieval
    write_pickle(files.relevancy, value)
    with pytest.raises(UserError, match=message) as caught:
        build_retrieval_manifest(settings(tmp_path / "no_chunks_are_read", tmp_path / "m"), csv, files)
    assert str(files.relevancy) in str(caught.value)


def test_matrices_of_other_number_types_are_read(tmp_path: Path) -> None:
    for dtype in ("float16", "float32", "int64", "bool"):
        path = write_relevancy(tmp_path / "r.pkl", np.eye(3), dtype)
        np.testing.assert_array_equal(load_relevancy(path, shape=(3, 3)), np.eye(3))


def test_sentences_numbered_instead_of_named_cannot_be_compared(tmp_path: Path, chunks: Path) -> None:
    csv = write_epic(tmp_path / "x.csv", TRAIN)
    sentences = write_epic(
        tmp_path / "s.csv", [(i, text) for i, (_, text) in enumerate(SENTENCES)], "index,sentence"
    )
    files = Retrieval(sentences, write_relevancy(tmp_path / "r.pkl", GRADES[::-1]))
    assert build_retrieval_manifest(settings(chunks, tmp_path / "m"), csv, files).num_samples == 3


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["id,text", "a,x", "b,y", "a,z"], "line 4: id a already occurs in line 2"),
        (["id,text", "a,x", "b, "], "line 3: needs an id and a sentence"),
        (["id,text", "a,x", "b"], "line 3: needs an id and a sentence"),
        (["id,text"], "no rows after its header"),
        (["text"], "1 columns in its first line"),
    ],
)
def test_bad_sentence_files_are_refused(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_sentences(write_lines(tmp_path / "s.csv", *lines))


def test_files_that_are_no_annotations_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_annotations(path)
    for content, message in (
        (b"", "0 columns"),
        (b"a;b;c\n1;2;3\n", "1 columns.*13"),
        (b"\xff\xfe\x00\x01" * 9, "save it as UTF-8"),
        (",".join("c" * 15).encode() + b"\n", "no rows after its header"),
        (",".join("c" * 15).encode() + b'\n"unclosed,1,2\n', "cannot be read as CSV"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            read_annotations(path)
        assert str(path) in str(caught.value)


def test_classes_need_numbers_in_every_row(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line 2: verb_class and noun_class"):
        action_classes([write_epic(tmp_path / "x.csv", [epic_row("a", verb="take")])])
