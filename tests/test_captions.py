"""Annotation files to manifests: nothing unusable is let in, nothing usable is lost, every reason is told."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import make_videos
import pytest
from chunk_folders import copy_chunks

from avion_dali.contracts import UserError
from avion_dali.data.manifest import Manifest
from avion_dali.datasets import building
from avion_dali.datasets.building import BuildReport, BuildSettings
from avion_dali.datasets.captions import build_captions_manifest, read_captions_into, read_rows

HEADER = "video,start,end,text\n"
GOOD: list[dict[str, Any]] = [
    {"video": "kitchen.mp4", "start": 0.5, "end": 1.5, "text": "cut the onion", "verb": "cut", "noun": "onion"},
    {"video": "garden", "start": 0, "end": 1, "text": 'naïve 😀, "quoted"', "verb": "", "noun": ""},
    {
        "video": "P01/P01_01.MP4",
        "start": 0.2,
        "end": 0.2,
        "text": "wait",
        "verb": "",
        "noun": "hand; left foot ;",
    },
]
BAD: list[tuple[dict[str, Any], str]] = [
    ({"video": "kitchen.mp4", "start": 2, "end": 1, "text": "x"}, "before its start"),
    ({"video": "attic.mp4", "start": 0, "end": 1, "text": "x"}, "'attic.mp4' has no chunks"),
    ({"video": "garden", "start": 5, "end": 6, "text": "x"}, "past the end"),
    ({"video": "garden", "start": -1, "end": 1, "text": "x"}, "seconds >= 0"),
    ({"video": "garden", "start": "soon", "end": 1, "text": "x"}, "'soon' is not a number"),
    ({"video": "garden", "start": 0, "end": "00:01", "text": "x"}, "'00:01' is not a number"),
    ({"video": "garden", "start": "nan", "end": 1, "text": "x"}, "seconds >= 0"),
    ({"video": "holed", "start": 1.6, "end": 1.9, "text": "x"}, "is missing"),
    ({"video": "holed", "start": 0.5, "end": 2.5, "text": "x"}, "is missing"),
]


@pytest.fixture(autouse=True)
def light_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Letters as ids: the real tokenizer takes seconds to import and has its own tests."""
    monkeypatch.setattr(
        building, "clip_tokenizer", lambda: lambda text: (49406, *(ord(c) % 1000 for c in text), 49407)
    )


@pytest.fixture(scope="module")
def chunks(tmp_path_factory: pytest.TempPathFactory, chunk_file: Path) -> Path:
    """1 s chunks of four videos; `holed` misses its second one."""
    root = tmp_path_factory.mktemp("chunks")
    return copy_chunks(
        chunk_file,
        root,
        {"kitchen.mp4": [0, 1, 2], "garden": [0], "P01/P01_01.MP4": [0, 1], "holed": [0, 2]},
    )


def write_csv(path: Path, rows: Sequence[dict[str, Any]], *, encoding: str = "utf-8") -> Path:
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, ["video", "start", "end", "text", "verb", "noun"])
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]], *, encoding: str = "utf-8") -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding=encoding)
    return path


WRITERS = {"csv": write_csv, "jsonl": write_jsonl}


def build(chunk_root: Path, annotations: Path, **options: Any) -> BuildReport:
    return build_captions_manifest(
        chunk_root, annotations, output=annotations.parent / "out", jobs=1, **options
    )


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("kind", WRITERS)
def test_good_rows_become_samples(tmp_path: Path, chunks: Path, kind: str, encoding: str) -> None:
    annotations = WRITERS[kind](tmp_path / f"rows.{kind}", GOOD, encoding=encoding)
    report = build(chunks, annotations)
    assert (report.num_samples, report.num_chunks, report.rejected, report.unusable) == (3, 8, {}, ())
    opened = Manifest(tmp_path / "out")
    first, second, third = (opened.sample(i) for i in range(3))
    assert opened.chunk(first.first_chunk).ref.path == str(chunks / "kitchen.mp4" / "0.mp4")
    assert (first.num_chunks, first.start_s, first.end_s, first.text) == (2, 0.5, 1.5, "cut the onion")
    assert (first.verb, first.nouns) == ("cut", ("onion",))
    assert first.tokens[0] == (49406, *(ord(c) % 1000 for c in "cut the onion"), 49407)
    assert (second.text, second.verb, second.nouns, second.end_s) == (GOOD[1]["text"], "", (), 1.0)
    assert opened.chunk(third.first_chunk).video == "P01/P01_01.MP4"
    assert third.nouns == ("hand", "left foot")
    assert opened.info["annotations"] == str(annotations)
    assert opened.info["rejected_rows"] == 0
    assert not (tmp_path / "out" / "rejected.jsonl").exists()


def test_both_kinds_of_file_give_the_same_samples(tmp_path: Path, chunks: Path) -> None:
    for kind, write in WRITERS.items():
        (tmp_path / kind).mkdir()
        build(chunks, write(tmp_path / kind / f"rows.{kind}", GOOD))
    both = [Manifest(tmp_path / kind / "out") for kind in WRITERS]
    assert [both[0].sample(i) for i in range(3)] == [both[1].sample(i) for i in range(3)]


def test_optional_columns_may_be_absent_and_others_present(tmp_path: Path, chunks: Path) -> None:
    path = tmp_path / "rows.CSV"
    path.write_text("note,text,end,start,video\nhm,look,1,0,garden\n")
    assert build(chunks, path).num_samples == 1
    assert Manifest(tmp_path / "out").sample(0).text == "look"


def test_nouns_may_be_a_list_in_json(tmp_path: Path, chunks: Path) -> None:
    rows = [{"video": "garden", "start": 0, "end": 1, "text": "dig", "noun": ["spade", "left; hand"]}]
    build(chunks, write_jsonl(tmp_path / "rows.jsonl", rows))
    assert Manifest(tmp_path / "out").sample(0).nouns == ("spade", "left; hand")


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(("row", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_a_bad_row_refuses_the_file_and_says_why(
    tmp_path: Path, chunks: Path, kind: str, row: dict[str, Any], reason: str
) -> None:
    annotations = WRITERS[kind](tmp_path / f"rows.{kind}", [GOOD[0], row])
    with pytest.raises(UserError) as caught:
        build(chunks, annotations)
    line = 3 if kind == "csv" else 2
    for words in (str(annotations), "1 of 2 rows", f"line {line}", row["video"], reason, "--skip-bad-rows"):
        assert words in str(caught.value)
    (rejected,) = lines_of(tmp_path / "out" / "rejected.jsonl")
    assert (rejected["line"], rejected["video"]) == (line, row["video"])
    assert reason in rejected["reason"]
    with pytest.raises(UserError, match="not a manifest"):
        Manifest(tmp_path / "out")


@pytest.mark.parametrize("kind", WRITERS)
def test_skipping_keeps_the_good_rows_and_lists_the_bad(tmp_path: Path, chunks: Path, kind: str) -> None:
    mixed = [GOOD[0], *(row for row, _ in BAD), GOOD[1], GOOD[2]]
    report = build(chunks, WRITERS[kind](tmp_path / f"rows.{kind}", mixed), skip_bad_rows=True)
    opened = Manifest(tmp_path / "out")
    assert [opened.sample(i).text for i in range(report.num_samples)] == [row["text"] for row in GOOD]
    assert opened.info["rejected_rows"] == sum(report.rejected.values()) == len(BAD)
    listed = lines_of(tmp_path / "out" / "rejected.jsonl")
    header = 1 if kind == "csv" else 0
    assert [row["line"] for row in listed] == [header + 2 + i for i in range(len(BAD))]
    for row, (_, reason) in zip(listed, BAD, strict=True):
        assert reason in row["reason"]


def test_the_message_shows_a_few_rows_and_points_to_the_rest(tmp_path: Path, chunks: Path) -> None:
    bad = [BAD[1][0]] * 12
    with pytest.raises(UserError, match="12 of 12 rows") as caught:
        build(chunks, write_csv(tmp_path / "rows.csv", bad))
    assert str(caught.value).count("line ") == 5
    assert f"7 more in {tmp_path / 'out' / 'rejected.jsonl'}" in str(caught.value)
    assert len(lines_of(tmp_path / "out" / "rejected.jsonl")) == 12


def test_nothing_usable_is_an_error_even_when_skipping(tmp_path: Path, chunks: Path) -> None:
    with pytest.raises(UserError, match=r"no annotation row can be used.*rejected\.jsonl"):
        build(chunks, write_csv(tmp_path / "rows.csv", [BAD[0][0]]), skip_bad_rows=True)
    assert len(lines_of(tmp_path / "out" / "rejected.jsonl")) == 1
    for text in ("video,start,end,text\n", "video,start,end,text"):
        (tmp_path / "empty.csv").write_text(text)
        with pytest.raises(UserError, match="the files have no rows"):
            build(chunks, tmp_path / "empty.csv", skip_bad_rows=True)


def test_a_mended_file_leaves_no_old_list_behind(tmp_path: Path, chunks: Path) -> None:
    annotations = write_csv(tmp_path / "rows.csv", [GOOD[0], BAD[0][0]])
    build(chunks, annotations, skip_bad_rows=True)
    assert (tmp_path / "out" / "rejected.jsonl").exists()
    build(chunks, write_csv(annotations, [GOOD[0]]))
    assert not (tmp_path / "out" / "rejected.jsonl").exists()


def test_a_row_that_ends_in_a_missing_chunk_is_rejected(tmp_path: Path, chunks: Path) -> None:
    row = {"video": "holed", "start": 0.4, "end": 1.9, "text": "x"}
    report = build(chunks, write_csv(tmp_path / "rows.csv", [GOOD[0], row]), skip_bad_rows=True)
    assert sum(report.rejected.values()) == 1
    assert [row["video"] for row in lines_of(tmp_path / "out" / "rejected.jsonl")] == ["holed"]


def damaged_folder(root: Path, chunk_file: Path) -> Path:
    """`v` has chunks 0-8; those of odd seconds are empty, text, cut short and rotated."""
    copy_chunks(chunk_file, root, {"v": list(range(9))})
    data = chunk_file.read_bytes()
    (root / "v" / "1.mp4").write_bytes(b"")
    (root / "v" / "3.mp4").write_text("not a video " * 100)
    (root / "v" / "5.mp4").write_bytes(data[: len(data) // 2])
    make_videos.write_video(root / "v" / "7.mp4", frames=30, size=(64, 48), rotation=180)
    return root


def test_rows_on_unusable_chunks_are_rejected_and_the_files_listed(tmp_path: Path, chunk_file: Path) -> None:
    root = damaged_folder(tmp_path / "chunks", chunk_file)
    rows = [{"video": "v", "start": s + 0.6, "end": s + 0.9, "text": f"second {s}"} for s in range(9)]
    annotations = write_csv(tmp_path / "rows.csv", rows)
    with pytest.raises(UserError, match="4 of 9 rows") as caught:
        build(root, annotations)
    for words in ("1.mp4: corrupt", "3.mp4: corrupt", "5.mp4: corrupt", "7.mp4: rotated by 180 degrees"):
        assert words in str(caught.value)
    report = build(root, annotations, skip_bad_rows=True)
    assert [Path(u.path).name for u in report.unusable] == ["1.mp4", "3.mp4", "5.mp4", "7.mp4"]
    assert [row["line"] for row in lines_of(tmp_path / "out" / "rejected.jsonl")] == [3, 5, 7, 9]
    opened = Manifest(tmp_path / "out")
    assert [opened.sample(i).text for i in range(5)] == [f"second {s}" for s in (0, 2, 4, 6, 8)]
    assert [row["path"] for row in lines_of(tmp_path / "out" / "unusable_chunks.jsonl")] == [
        u.path for u in report.unusable
    ]


def test_a_folder_of_unusable_chunks_only_tells_both(tmp_path: Path) -> None:
    (tmp_path / "chunks" / "garden").mkdir(parents=True)
    (tmp_path / "chunks" / "garden" / "0.mp4").write_bytes(b"")
    with pytest.raises(UserError, match=r"'garden' has no chunks") as caught:
        build(tmp_path / "chunks", write_csv(tmp_path / "rows.csv", [GOOD[1]]))
    assert "0.mp4: corrupt" in str(caught.value)


@pytest.mark.parametrize("column", ["video", "text"])
def test_a_missing_column_is_named(tmp_path: Path, chunks: Path, column: str) -> None:
    header = [name for name in ("video", "start", "end", "text") if name != column]
    (tmp_path / "rows.csv").write_text(",".join(header) + "\n1,2,3\n")
    with pytest.raises(UserError, match=f"column {column} is missing.*must contain video, text"):
        build(chunks, tmp_path / "rows.csv")
    write_jsonl(tmp_path / "rows.jsonl", [GOOD[0], dict.fromkeys(header, 1)])
    with pytest.raises(UserError, match=f"line 2, video .*: {column} is missing"):
        build(chunks, tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", b"", "column video, text is missing"),
        ("rows.csv", b"video,start,end,text\ngarden,0,1\n", "line 2, video .*: text is missing"),
        ("rows.csv", b"video,start,end,text\ngarden,0,1,\n", "line 2, video .*: text is missing"),
        ("rows.csv", b"video,start,end,text\n,,1,x\n", "line 2, video .*: video is missing"),
        ("rows.csv", b"video,start,end,text\ngarden,0,1,\xe9\n", "cannot be read"),
        ("rows.jsonl", b'{"video": "garden"\n', "line 1 is not JSON"),
        ("rows.jsonl", b"\n\n[1, 2]\n", "line 3 is not a JSON object"),
        (
            "rows.jsonl",
            b'{"video": "garden", "start": 0, "end": 1, "text": null}\n',
            "line 1.*text is missing",
        ),
        ("rows.txt", b"video,start,end,text\n", r"\.csv or \.jsonl"),
        ("rows.json", b"[]", r"\.csv or \.jsonl"),
    ],
)
def test_malformed_files_are_refused_by_line(
    tmp_path: Path, chunks: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        build(chunks, tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_a_missing_file_or_folder_is_refused_by_name(tmp_path: Path, chunks: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.csv cannot be read"):
        build(chunks, tmp_path / "absent.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        build(chunks, tmp_path / "folder.csv")
    with pytest.raises(UserError, match="nowhere is not a folder"):
        build(tmp_path / "nowhere", write_csv(tmp_path / "rows.csv", GOOD))


def test_blank_json_lines_are_passed_over_and_counted(tmp_path: Path) -> None:
    row = json.dumps(GOOD[0])
    (tmp_path / "rows.jsonl").write_text(f"\n{row}\n  \n{row}\n")
    assert [line for line, _ in read_rows(tmp_path / "rows.jsonl")] == [2, 4]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_line_ends_of_any_system(tmp_path: Path, newline: str) -> None:
    (tmp_path / "rows.csv").write_bytes(newline.join(["video,start,end,text", "garden,0,1,look", ""]).encode())
    assert [row["text"] for _, row in read_rows(tmp_path / "rows.csv")] == ["look"]
    text = newline.join([json.dumps(GOOD[0]), ""])
    (tmp_path / "rows.jsonl").write_bytes(text.encode())
    assert [row["text"] for _, row in read_rows(tmp_path / "rows.jsonl")] == ["cut the onion"]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_row_without_text_can_be_skipped(tmp_path: Path, chunks: Path, kind: str) -> None:
    rows = [GOOD[0], {**GOOD[1], "text": ""}]
    report = build(chunks, WRITERS[kind](tmp_path / f"rows.{kind}", rows), skip_bad_rows=True)
    assert (report.num_samples, sum(report.rejected.values())) == (1, 1)


def test_rows_after_an_unclosed_quote_are_not_lost_silently(tmp_path: Path, chunks: Path) -> None:
    (tmp_path / "rows.csv").write_text(HEADER + 'garden,0,1,"look\ngarden,0,1,dig\ngarden,0,1,rest\n')
    with pytest.raises(UserError):
        build(chunks, tmp_path / "rows.csv")


def test_a_field_beyond_the_csv_limit_is_a_user_error(tmp_path: Path, chunks: Path) -> None:
    (tmp_path / "rows.csv").write_text(HEADER + 'garden,0,1,"look\n' + "garden,0,1,dig\n" * 12_000)
    with pytest.raises(UserError):
        build(chunks, tmp_path / "rows.csv")


def test_text_that_is_no_unicode_is_a_bad_row(tmp_path: Path, chunks: Path) -> None:
    row = '{"video": "garden", "start": 0, "end": 1, "text": "cut off \\ud83d"}\n'
    (tmp_path / "rows.jsonl").write_text(row)
    with pytest.raises(UserError, match="line 1"):
        build(chunks, tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("classes", "verb", "nouns"),
    [
        ({"verb": 0}, "0", ()),
        ({"noun": 5}, "", ("5",)),
        ({"noun": 0}, "", ("0",)),
        ({"noun": [1, 2]}, "", ("1", "2")),
    ],
)
def test_numeric_classes_in_json_are_kept(
    tmp_path: Path, chunks: Path, classes: dict[str, Any], verb: str, nouns: tuple[str, ...]
) -> None:
    row = {"video": "garden", "start": 0, "end": 1, "text": "dig", **classes}
    build(chunks, write_jsonl(tmp_path / "rows.jsonl", [row]))
    sample = Manifest(tmp_path / "out").sample(0)
    assert (sample.verb, sample.nouns) == (verb, nouns)


def test_an_output_that_is_a_file_is_a_user_error(tmp_path: Path, chunks: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError):
        build(chunks, write_csv(tmp_path / "rows.csv", GOOD))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("garden,0,1,a person digs, slowly,dig,hole", "more fields than the header"),
        ("garden,0,1," + "x" * 9000 + ",dig,hole", "longer than 8000 characters"),
    ],
)
def test_rows_that_would_lose_words_are_rejected(tmp_path: Path, chunks: Path, row: str, reason: str) -> None:
    (tmp_path / "rows.csv").write_text(f"video,start,end,text,verb,noun\n{row}\n")
    with pytest.raises(UserError, match=f"line 2.*{reason}"):
        build(chunks, tmp_path / "rows.csv")


@pytest.mark.parametrize(
    "change", [{"text": {"a": 1}}, {"text": [["p"]]}, {"label": ["a"]}, {"verb": ["a"]}, {"start": True}]
)
def test_json_values_of_other_types_are_rejected(tmp_path: Path, chunks: Path, change: dict[str, Any]) -> None:
    row = {"video": "garden", "start": 0, "end": 1, "text": "dig", **change}
    with pytest.raises(UserError, match="should be a text or a number"):
        build(chunks, write_jsonl(tmp_path / "rows.jsonl", [row]))


def test_a_row_may_have_several_texts_in_json(tmp_path: Path, chunks: Path) -> None:
    rows = [{"video": "garden", "start": 0, "end": 1, "text": ["dig", " digs a hole ", ""]}]
    build(chunks, write_jsonl(tmp_path / "rows.jsonl", rows))
    sample = Manifest(tmp_path / "out").sample(0)
    assert sample.texts == ("dig", "digs a hole")
    assert [len(ids) for ids in sample.tokens] == [5, 13]


def test_a_malformed_file_is_refused_before_chunks_are_probed(tmp_path: Path, chunks: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(GOOD[0]) + "\n{\n")
    probed: list[int] = []
    with pytest.raises(UserError, match="line 2 is not JSON"):
        settings = BuildSettings(chunks, tmp_path / "out", on_chunk=probed.append)
        read_captions_into(settings, tmp_path / "rows.jsonl")
    assert probed == []


def test_an_output_that_cannot_be_written_is_a_user_error(tmp_path: Path, chunks: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "rejected.jsonl").mkdir()
    with pytest.raises(UserError, match="could not be written"):
        build(chunks, write_csv(tmp_path / "rows.csv", GOOD))
