"""What is written is read back, rows are found by division, and nothing is copied into memory."""

import json
import os
import weakref
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from chunk_folders import NTSC_30, chunk_row, contents, sample_row, stored_file

from avion_dali.contracts import ChunkRef, PacketIndexRef, UserError
from avion_dali.data import manifest
from avion_dali.data.classes import CaptionTable, ClassTable
from avion_dali.data.manifest import Chunk, IndexWriter, Manifest, Sample, write_manifest

CHUNKS = [
    chunk_row("P01/P01_01.MP4", 0),
    chunk_row("P01/P01_01.MP4", 15, num_frames=449, fps=NTSC_30),
    chunk_row("日本語 ビデオ.mp4", 7.5, num_frames=3, fps=Fraction(25), frame_times=np.array([0.0, 0.1, 0.35])),
]
SAMPLES = [
    Sample(0, 2, 1.25, 16.5, ("#C C picks the knife",), ((49406, 258, 49407),), "pick", ("knife", "hand")),
    Sample(2, 1, 0.0, 0.1, ('naïve 😀 \u2028 "quoted", a;b\nline', "", "é"), ((49406, 65535), (), (7,))),
    Sample(1, 1, 15.0, 15.0),
    Sample(1, 1, 15.0, 16.0, label=1),
]


CLASSES = ClassTable(("0:10", "0:9 é"), verbs=(0, 0), nouns=(10, 9))


def write(
    folder: Path, *, chunks: list[Chunk] = CHUNKS, samples: list[Sample] = SAMPLES, **info: object
) -> Path:
    write_manifest(folder, chunk_root="/chunks", chunks=chunks, samples=samples, classes=CLASSES, info=info)
    return folder


def write_every_file(folder: Path, *, grade: float, index_record: bytes) -> None:
    """Write a manifest that has every kind of file: classes, captions with relevancies, and a packet index."""
    captions = CaptionTable(("cut",), ((1,),), np.full((len(SAMPLES), 1), grade))
    with IndexWriter(folder) as index:
        index.add(index_record)
        write_manifest(
            folder,
            chunk_root="/chunks",
            chunks=CHUNKS,
            samples=SAMPLES,
            captions=captions,
            classes=CLASSES,
            index=index,
        )


def assert_same_chunk(read: Chunk, written: Chunk) -> None:
    assert (read.ref, read.video, read.start_s, read.fps, read.codec) == (
        written.ref,
        written.video,
        written.start_s,
        written.fps,
        written.codec,
    )
    if written.frame_times is None:
        assert read.frame_times is None
    else:
        assert read.frame_times is not None
        assert read.frame_times.dtype == np.float64
        np.testing.assert_array_equal(read.frame_times, written.frame_times)


def test_round_trip_keeps_every_value(tmp_path: Path) -> None:
    opened = Manifest(write(tmp_path / "deep" / "m", annotations="a.csv"))
    assert (opened.num_chunks, opened.num_samples) == (3, 4)
    assert [opened.sample(i) for i in range(4)] == list(opened.samples()) == SAMPLES
    for row, chunk in enumerate(CHUNKS):
        assert_same_chunk(opened.chunk(row), chunk)
    assert opened.info["annotations"] == "a.csv"


def test_rows_have_plain_types(tmp_path: Path) -> None:
    row = Manifest(write(tmp_path)).sample(0)
    assert [type(v) for v in (row.first_chunk, row.num_chunks, row.start_s)] == [int, int, float]
    assert {type(t) for ids in row.tokens for t in ids} == {int}


def test_single_columns_say_what_the_row_says(tmp_path: Path) -> None:
    opened = Manifest(write(tmp_path))
    for row, sample in enumerate(SAMPLES):
        span = (sample.first_chunk, sample.num_chunks, sample.start_s, sample.end_s)
        assert opened.span(row) == span
        assert opened.label(row) == sample.label
        assert opened.num_texts(row) == len(sample.texts)
        assert tuple(opened.tokens(row, k) for k in range(len(sample.texts))) == sample.tokens
    with pytest.raises(IndexError):
        opened.tokens(0, 1)


def test_the_first_text_stands_for_the_row() -> None:
    assert [sample.text for sample in SAMPLES[::2]] == ["#C C picks the knife", ""]


@pytest.mark.parametrize(("texts", "tokens"), [("x", ((1,),)), (("x",), ()), ((), ((1,),))])
def test_every_text_needs_its_tokens(texts: object, tokens: object) -> None:
    with pytest.raises(ValueError, match="one list of tokens each"):
        Sample(0, 1, 0.0, 1.0, texts, tokens)


def test_rows_are_streamed_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than a batch of rows is alive at a time."""
    monkeypatch.setattr(manifest, "ROWS_PER_BATCH", 10)
    alive = weakref.WeakSet()
    most = 0

    class Row:
        def __init__(self, sample: Sample) -> None:
            self._sample = sample

        def __getattr__(self, name: str) -> object:
            return getattr(self._sample, name)

    def rows() -> Iterator[Row]:
        nonlocal most
        for i in range(200):
            row = Row(sample_row(i, i + 1))
            alive.add(row)
            most = max(most, len(alive))
            yield row

    write(tmp_path, samples=rows())
    assert Manifest(tmp_path).num_samples == 200
    assert most <= 21


@pytest.mark.parametrize("count", [0, 1, 6, 7, 8, 20, 21, 22])
def test_rows_are_found_across_record_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(manifest, "ROWS_PER_BATCH", 7)
    samples = [sample_row(i, i + 1, text="t" * (i % 5)) for i in range(count)]
    chunks = [chunk_row("v", i) for i in range(count)]
    opened = Manifest(write(tmp_path, samples=samples, chunks=chunks))
    assert (opened.num_samples, opened.num_chunks) == (count, count)
    for i in np.random.default_rng(0).permutation(count).tolist():
        assert opened.sample(i) == samples[i]
        assert opened.chunk(i).start_s == i
    with pa.ipc.open_file(str(stored_file(tmp_path, "samples.arrow"))) as reader:
        assert reader.num_record_batches == -(-count // 7)


@pytest.mark.parametrize("row", [-1, 4, 10**9])
def test_rows_outside_the_table_are_index_errors(tmp_path: Path, row: int) -> None:
    opened = Manifest(write(tmp_path))
    for of_sample in (opened.sample, opened.span, opened.label, opened.num_texts):
        with pytest.raises(IndexError, match=r"\[0, 4\)"):
            of_sample(row)
    with pytest.raises(IndexError, match=r"\[0, 3\)"):
        opened.chunk(row)


def test_chunk_paths_follow_a_moved_root(tmp_path: Path) -> None:
    folder = write(tmp_path)
    assert Manifest(folder).chunk(1).ref.path == "/chunks/P01/P01_01.MP4/15.mp4"
    moved = Manifest(folder, chunk_root="/mnt/fast")
    assert moved.chunk(1).ref.path == "/mnt/fast/P01/P01_01.MP4/15.mp4"
    assert moved.chunk(2).ref.path == "/mnt/fast/日本語 ビデオ.mp4/7.5.mp4"
    assert Manifest(folder, chunk_root=Path("/mnt/fast")).chunk_root == "/mnt/fast"


def test_a_relative_root_is_stored_as_an_absolute_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    chunk = chunk_row("v", 0, root=str(tmp_path / "chunks"))
    write_manifest("m", chunk_root="chunks", chunks=[chunk], samples=[sample_row(0, 1)])
    monkeypatch.chdir("/")
    assert Manifest(tmp_path / "m").chunk(0).ref.path == str(tmp_path / "chunks" / "v" / "0.mp4")


def test_a_moved_relative_root_still_gives_absolute_paths(tmp_path: Path) -> None:
    assert os.path.isabs(Manifest(write(tmp_path), chunk_root="moved").chunk(0).ref.path)


def test_end_of_a_chunk() -> None:
    assert CHUNKS[0].end_s == 15.0
    assert CHUNKS[1].end_s == pytest.approx(15 + 449 * 1001 / 30_000)
    assert CHUNKS[2].end_s == pytest.approx(7.5 + 0.35 + 1 / 25)


def test_columns_are_mapped_and_not_copied(tmp_path: Path) -> None:
    samples = [sample_row(i, i + 1, text=f"{i:04d}" * 200) for i in range(5000)]
    folder = write(tmp_path, samples=samples)
    assert stored_file(folder, "samples.arrow").stat().st_size > 4_000_000
    del samples
    before = pa.total_allocated_bytes()
    opened = Manifest(folder)
    assert [opened.sample(i).start_s for i in range(5000)] == list(range(5000))
    assert pa.total_allocated_bytes() - before < 100_000


def test_rebuilding_a_folder_replaces_it(tmp_path: Path) -> None:
    write(tmp_path, annotations="old.csv")
    write(tmp_path, samples=SAMPLES[:1])
    opened = Manifest(tmp_path)
    assert opened.num_samples == 1
    assert "annotations" not in opened.info


def test_an_open_manifest_keeps_its_rows_while_the_folder_is_rebuilt(tmp_path: Path) -> None:
    opened = Manifest(write(tmp_path, samples=[sample_row(i, i + 1) for i in range(100)]))
    assert opened.sample(50).start_s == 50
    # As many rows, so that the file keeps its size: with fewer, reading ends the process with SIGBUS.
    write(tmp_path, samples=[sample_row(i + 1000, i + 1001) for i in range(100)])
    assert [opened.sample(i).start_s for i in range(100)] == list(range(100))


def broken_samples() -> Iterator[Sample]:
    yield SAMPLES[0]
    raise KeyboardInterrupt


def test_an_interrupted_build_is_not_taken_for_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_manifest(tmp_path, chunk_root="/chunks", chunks=CHUNKS, samples=broken_samples())
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        Manifest(tmp_path)


def test_an_interrupted_rebuild_leaves_the_old_manifest_as_it_was(tmp_path: Path) -> None:
    write_every_file(tmp_path, grade=1, index_record=b"old")
    before = contents(tmp_path)
    assert len(before) == 7
    with pytest.raises(KeyboardInterrupt), IndexWriter(tmp_path) as index:
        index.add(b"newer")
        write_manifest(tmp_path, chunk_root="/c", chunks=CHUNKS[:1], samples=broken_samples(), index=index)
    assert contents(tmp_path) == before
    assert list(Manifest(tmp_path).samples()) == SAMPLES


@pytest.mark.parametrize("grades", [np.ones((3, 1)), np.full((1, 1), 1.5)])
def test_grades_that_are_refused_leave_the_old_manifest_as_it_was(tmp_path: Path, grades: np.ndarray) -> None:
    before = contents(write(tmp_path))
    captions = CaptionTable(("cut",), ((1,),), grades)
    with pytest.raises(UserError, match="relevancy"):
        write_manifest(tmp_path, chunk_root="/chunks", chunks=CHUNKS, samples=SAMPLES[:1], captions=captions)
    assert contents(tmp_path) == before


def test_a_folder_without_a_manifest_names_the_command(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="avion-dali manifest"):
            Manifest(folder)


def test_naming_a_file_instead_of_the_folder_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        Manifest(write(tmp_path) / "manifest.json")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"format_version": 1}', '{"num_chunks": 3}', "\udcff"], ids=repr
)
def test_a_broken_or_foreign_manifest_json_is_refused(tmp_path: Path, text: str) -> None:
    (write(tmp_path) / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"manifest\.json.*again"):
        Manifest(tmp_path)


@pytest.mark.parametrize("key", ["chunk_root", "num_chunks", "num_samples"])
def test_a_manifest_json_that_lacks_a_key_is_refused(tmp_path: Path, key: str) -> None:
    path = write(tmp_path) / "manifest.json"
    facts = json.loads(path.read_text())
    del facts[key]
    path.write_text(json.dumps(facts))
    with pytest.raises(UserError):
        Manifest(tmp_path)


def cut(share: float) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])

    return apply


@pytest.mark.parametrize("table", ["chunks.arrow", "samples.arrow"])
@pytest.mark.parametrize(
    "harm",
    [Path.unlink, cut(0.0), cut(0.3), cut(0.9), cut(0.999), lambda p: p.write_text("hello " * 100)],
    ids=["missing", "empty", "cut-30", "cut-90", "cut-99.9", "text"],
)
def test_damaged_tables_are_refused_by_name(tmp_path: Path, table: str, harm: Callable[[Path], None]) -> None:
    harm(stored_file(write(tmp_path), table))
    with pytest.raises(UserError, match=rf"{table}.*build it again"):
        Manifest(tmp_path)


def test_tables_of_two_builds_are_noticed(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b", samples=SAMPLES[:2])
    path = stored_file(tmp_path / "a", "samples.arrow")
    path.write_bytes(stored_file(tmp_path / "b", "samples.arrow").read_bytes())
    with pytest.raises(UserError, match="build it again"):
        Manifest(tmp_path / "a")


def test_manifest_json_is_readable_and_cannot_be_overruled_by_info(tmp_path: Path) -> None:
    facts = json.loads((write(tmp_path, num_samples=99, note="é") / "manifest.json").read_text())
    assert isinstance(facts.pop("fingerprint"), int)
    assert list(facts.pop("files")) == ["chunks.arrow", "classes.json", "samples.arrow"]
    assert facts == {
        "note": "é",
        "format_version": 4,
        "index_bytes": 0,
        "chunk_root": "/chunks",
        "num_chunks": 3,
        "num_samples": 4,
        "num_classes": 2,
    }


def test_the_fingerprint_follows_the_rows_and_not_the_place(tmp_path: Path) -> None:
    first, second, third = (write(tmp_path / name) for name in "abc")
    assert Manifest(first).fingerprint == Manifest(second).fingerprint
    write(third, samples=[*SAMPLES[:-1], sample_row(1.5, 2.5)])
    assert Manifest(third).fingerprint != Manifest(first).fingerprint


def test_packet_indexes_are_found_where_the_manifest_is_now(tmp_path: Path) -> None:
    with IndexWriter(tmp_path / "m") as writer:
        places = [writer.add(record) for record in (b"first", b"", b"third")]
        writer.finish()
    refs = [ChunkRef(f"/chunks/{n}.mp4", 10, 90, 64, 48, index=place) for n, place in enumerate(places)]
    chunks = [Chunk(ref, f"{n}", 0.0, Fraction(30), "h264") for n, ref in enumerate(refs)]
    write_manifest(tmp_path / "m", chunk_root="/chunks", chunks=chunks, samples=[])
    (tmp_path / "m").rename(tmp_path / "moved")
    found = [Manifest(tmp_path / "moved").chunk(row).ref.index for row in range(3)]
    path = str(tmp_path / "moved" / "packets.bin")
    assert found == [PacketIndexRef(path, 0, 5), None, PacketIndexRef(path, 5, 5)]
    (tmp_path / "moved" / "packets.bin").write_bytes(b"short")
    with pytest.raises(UserError, match="packets.bin"):
        Manifest(tmp_path / "moved")


def test_an_unfinished_index_leaves_the_old_one(tmp_path: Path) -> None:
    with IndexWriter(tmp_path) as writer:
        writer.add(b"old")
        writer.finish()
    with pytest.raises(RuntimeError), IndexWriter(tmp_path) as writer:
        writer.add(b"new")
        raise RuntimeError("interrupted")
    assert [p.name for p in tmp_path.iterdir()] == ["packets.bin"]
    assert (tmp_path / "packets.bin").read_bytes() == b"old"
