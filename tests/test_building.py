"""The frame of all readers: rows pass one by one, and what is left unfinished is no manifest."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from annotation_files import letters, rejected_rows, settings, use_light_tokenizer
from chunk_folders import contents, copy_chunks

from avion_dali.contracts import UserError
from avion_dali.data.manifest import Manifest
from avion_dali.datasets import building
from avion_dali.datasets.building import AnnotationRow, RejectedRow, Rejections, manifest_build


@pytest.fixture(autouse=True)
def light_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    use_light_tokenizer(monkeypatch)


@pytest.fixture
def chunks(tmp_path: Path, chunk_file: Path) -> Path:
    return copy_chunks(chunk_file, tmp_path / "chunks", {"v": [0, 1]})


def row(line: int, text: str = "cut") -> AnnotationRow:
    return AnnotationRow(line, "v", 0.5, 1.5, (text,))


def test_rows_are_taken_one_at_a_time(tmp_path: Path, chunks: Path) -> None:
    asked: list[int] = []

    def rows() -> Iterator[AnnotationRow]:
        for line in range(1, 4):
            asked.append(line)
            yield row(line)

    with manifest_build(settings(chunks, tmp_path / "m")) as build:
        placed = build.place(rows())
        assert asked == []
        for taken, _ in enumerate(placed, start=1):
            assert asked == list(range(1, taken + 1))


def test_positions_count_rejected_rows(tmp_path: Path, chunks: Path) -> None:
    rows = [RejectedRow(1, "v", "why"), row(2), RejectedRow(3, "v", "why"), row(4)]
    with manifest_build(settings(chunks, tmp_path / "m", skip_bad_rows=True)) as build:
        assert [number for number, _ in build.place_numbered(rows)] == [1, 3]


def test_rejections_are_on_disk_and_only_a_few_in_memory(tmp_path: Path) -> None:
    rejections = Rejections(tmp_path / "rejected.jsonl")
    assert not rejections.path.exists()
    for line in range(1000):
        rejections.add(RejectedRow(line, "v", "why", "bad times" if line % 4 else "no text"))
    rejections.close()
    assert (rejections.total, len(rejections.first)) == (1000, 5)
    assert rejections.describe() == "750 bad times, 250 no text"
    assert [r["line"] for r in rejected_rows(tmp_path)] == list(range(1000))


def test_after_a_bad_row_nothing_is_tokenized_for_nothing(
    tmp_path: Path, chunks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(building, "clip_tokenizer", lambda: lambda text: seen.append(text) or letters(text))
    rows = [row(1, "a"), RejectedRow(2, "v", "why"), row(3, "b"), RejectedRow(4, "v", "why")]
    with (
        pytest.raises(UserError, match="2 of 4 rows"),
        manifest_build(settings(chunks, tmp_path / "m")) as build,
    ):
        build.finish(build.place(rows), source="x")
    assert seen == ["a"]


def test_repeated_texts_are_tokenized_once(
    tmp_path: Path, chunks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(building, "clip_tokenizer", lambda: lambda text: seen.append(text) or letters(text))
    with manifest_build(settings(chunks, tmp_path / "m")) as build:
        build.finish(build.place([row(1), row(2), row(3, "b")]), source="x")
    assert seen == ["cut", "b"]
    assert [s.texts for s in Manifest(tmp_path / "m").samples()] == [("cut",), ("cut",), ("b",)]


def test_clips_without_text_load_no_tokenizer(
    tmp_path: Path, chunks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "clip_tokenizer", None)
    with manifest_build(settings(chunks, tmp_path / "m")) as build:
        report = build.finish(build.place([AnnotationRow(1, "v", 0.0, None)]), source="x")
    assert (report.num_samples, report.num_texts) == (1, 0)
    assert Manifest(tmp_path / "m").sample(0).end_s == 2.0


def test_an_interrupted_build_leaves_no_manifest(tmp_path: Path, chunks: Path) -> None:
    def rows() -> Iterator[AnnotationRow]:
        yield row(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), manifest_build(settings(chunks, tmp_path / "m")) as build:
        build.finish(build.place(rows()), source="x")
    with pytest.raises(UserError, match="not a manifest"):
        Manifest(tmp_path / "m")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_failed_rebuild_leaves_the_manifest_that_was_there(
    tmp_path: Path, chunks: Path, error: type[BaseException]
) -> None:
    def rows() -> Iterator[AnnotationRow]:
        yield row(1)
        raise error

    with manifest_build(settings(chunks, tmp_path / "m")) as build:
        build.finish(build.place([row(1, "old")]), source="x")
    before = contents(tmp_path / "m")
    assert "build-1/packets.bin" in before
    (chunks / "v" / "1.mp4").rename(chunks / "v" / "2.mp4")  # the new index would differ
    with pytest.raises((error, UserError)), manifest_build(settings(chunks, tmp_path / "m")) as build:
        build.finish(build.place(rows()), source="x")
    with pytest.raises(UserError), manifest_build(settings(chunks, tmp_path / "m")) as build:
        build.finish(build.place([row(1), row(2, " ")]), source="x")
    after = contents(tmp_path / "m")
    assert after.pop("rejected.jsonl")
    assert after == before
    assert [sample.text for sample in Manifest(tmp_path / "m").samples()] == ["old"]


def test_clips_of_a_lost_last_chunk_are_counted_as_such(tmp_path: Path, chunks: Path) -> None:
    (chunks / "v" / "1.mp4").write_bytes(b"")
    with manifest_build(settings(chunks, tmp_path / "m", skip_bad_rows=True)) as build:
        rows = [AnnotationRow(1, "v", 0.0, 0.5), AnnotationRow(2, "v", 1.2, 1.5), row(3)]
        report = build.finish(build.place(rows), source="x")
    assert (report.num_samples, report.rejected) == (1, {"missing chunk": 2})


def test_an_output_that_cannot_be_written_is_a_user_error(tmp_path: Path, chunks: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError), manifest_build(settings(chunks, output)):
            pass


def test_progress_counts_files_and_rows(tmp_path: Path, chunks: Path) -> None:
    files: list[int] = []
    rows: list[int] = []
    watched = settings(chunks, tmp_path / "m", skip_bad_rows=True, on_chunk=files.append, on_row=rows.append)
    with manifest_build(watched) as build:
        build.finish(build.place([row(1), RejectedRow(2, "v", "why"), row(3)]), source="x")
    assert (files, rows) == ([1, 2], [1, 2, 3])
