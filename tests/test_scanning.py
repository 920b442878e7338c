"""What counts as a chunk, what is read of it, and which files are put aside with a reason."""

import os
from pathlib import Path

import make_videos
import pytest
from chunk_folders import copy_chunks

from avion_dali.contracts import PacketIndexRef, UserError
from avion_dali.data import scanning
from avion_dali.data.manifest import IndexWriter
from avion_dali.data.probe import probe_chunk
from avion_dali.data.scanning import find_chunk_files, scan_chunks


def names(folder: Path) -> list[tuple[str, float]]:
    return [(video, start) for video, start, _ in find_chunk_files(folder)]


def touch(folder: Path, *paths: str) -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()


def test_chunks_are_sorted_by_video_and_by_second_not_by_text(tmp_path: Path) -> None:
    touch(tmp_path, "b.mp4/0.mp4", "a.mp4/100.mp4", "a.mp4/15.mp4", "a.mp4/0.mp4", "a.mp4/7.5.mp4")
    assert names(tmp_path) == [("a.mp4", 0), ("a.mp4", 7.5), ("a.mp4", 15), ("a.mp4", 100), ("b.mp4", 0)]


def test_videos_may_lie_deeper_and_endings_may_be_large(tmp_path: Path) -> None:
    touch(tmp_path, "P01/P01_01.MP4/15.MP4", "P01/P01_02/0.mkv", "日本/é.mov/0.webm")
    assert names(tmp_path) == [("P01/P01_01.MP4", 15), ("P01/P01_02", 0), ("日本/é.mov", 0)]


def test_other_files_are_not_chunks(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "a/0.mp4",
        "a/0.txt",
        "a/cover.mp4",
        "a/-1.mp4",
        "a/1.2.3.mp4",
        "a/._0.mp4",
        "a/.mp4",
        "a/١.mp4",
    )
    touch(tmp_path, "a/.0.mp4.partial", "a/1e3.mp4", "readme.md", "a/nan.mp4", "a/inf.mp4")
    (tmp_path / "b" / "15.mp4").mkdir(parents=True)
    assert names(tmp_path) == [("a", 0)]


def test_a_missing_folder_and_one_without_chunks_name_the_way_out(tmp_path: Path) -> None:
    for folder in (tmp_path / "absent", tmp_path):
        with pytest.raises(UserError, match="avion-dali chunk") as caught:
            find_chunk_files(folder)
        assert str(folder) in str(caught.value)


def test_the_root_may_be_relative_or_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "real/a/0.mp4")
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    for root in ("real", "link"):
        ((video, start, path),) = find_chunk_files(root)
        assert (video, start) == ("a", 0)
        assert path.is_absolute()


def test_video_folders_may_be_links_to_other_disks(tmp_path: Path) -> None:
    touch(tmp_path, "disk2/b/0.mp4", "chunks/a/0.mp4")
    (tmp_path / "chunks" / "b").symlink_to(tmp_path / "disk2" / "b")
    assert names(tmp_path / "chunks") == [("a", 0), ("b", 0)]


def test_facts_of_usable_chunks(tmp_path: Path, chunk_file: Path) -> None:
    copy_chunks(chunk_file, tmp_path, {"b.mp4": [0], "a.mp4": [1, 0]})
    chunks, unusable = scan_chunks(tmp_path, jobs=1)
    assert unusable == []
    assert [(c.video, c.start_s) for c in chunks] == [("a.mp4", 0), ("a.mp4", 1), ("b.mp4", 0)]
    for chunk in chunks:
        assert (chunk.ref.num_frames, chunk.ref.width, chunk.ref.height) == (30, 64, 48)
        assert (chunk.fps, chunk.codec, chunk.frame_times) == (30, "h264", None)
        assert chunk.ref.size_bytes == os.path.getsize(chunk.ref.path) == chunk_file.stat().st_size


def test_variable_rate_chunks_keep_their_timestamps(tmp_path: Path) -> None:
    times = [0.0, 0.1, 0.15, 0.4, 0.9]
    (tmp_path / "v").mkdir()
    make_videos.write_video(tmp_path / "v" / "0.mp4", frames=5, times=times, size=(64, 48))
    ((chunk,), unusable) = scan_chunks(tmp_path, jobs=1)
    assert unusable == []
    assert chunk.frame_times is not None
    assert chunk.frame_times.tolist() == pytest.approx(times, abs=1e-3)


def test_files_that_cannot_be_used_are_listed_with_reasons(tmp_path: Path, chunk_file: Path) -> None:
    copy_chunks(chunk_file, tmp_path, {"good": [0], "bad": [1, 2, 3, 4]})
    data = chunk_file.read_bytes()
    (tmp_path / "bad" / "1.mp4").write_bytes(b"")
    (tmp_path / "bad" / "2.mp4").write_text("this is no video\n" * 50)
    (tmp_path / "bad" / "3.mp4").write_bytes(data[: len(data) * 2 // 3])
    make_videos.write_video(tmp_path / "bad" / "4.mp4", frames=30, size=(64, 48), rotation=90)
    chunks, unusable = scan_chunks(tmp_path, jobs=1)
    assert [c.video for c in chunks] == ["good"]
    reasons = {Path(u.path).name: u.reason for u in unusable}
    assert set(reasons) == {"1.mp4", "2.mp4", "3.mp4", "4.mp4"}
    assert all(reasons[name].startswith("corrupt: ") for name in ("1.mp4", "2.mp4", "3.mp4"))
    assert "truncated" in reasons["3.mp4"]
    assert reasons["4.mp4"].startswith("rotated by 90 degrees")
    assert "avion-dali chunk" in reasons["4.mp4"]


def test_processes_give_the_same_as_one(
    tmp_path: Path, chunk_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_chunks(chunk_file, tmp_path, {f"v{i}": [0, 1, 2] for i in range(6)})
    (tmp_path / "v3" / "1.mp4").write_bytes(b"")
    alone = scan_chunks(tmp_path, jobs=1)
    monkeypatch.setattr(scanning, "_SERIAL_LIMIT", 1)
    assert scan_chunks(tmp_path, jobs=2) == alone
    assert (len(alone[0]), len(alone[1])) == (17, 1)


def test_progress_counts_every_file(tmp_path: Path, chunk_file: Path) -> None:
    copy_chunks(chunk_file, tmp_path, {"a": [0, 1]})
    (tmp_path / "a" / "2.mp4").write_bytes(b"")
    counts: list[int] = []
    scan_chunks(tmp_path, jobs=1, on_progress=counts.append)
    assert counts == [1, 2, 3]


def test_progress_is_told_while_probing(
    tmp_path: Path, chunk_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_chunks(chunk_file, tmp_path, {"a": [0, 1, 2]})
    happened: list[str] = []
    probe = scanning.probe_chunk

    def noting(path: Path, *, index: bool) -> object:
        happened.append("probe")
        return probe(path, index=index)

    monkeypatch.setattr(scanning, "probe_chunk", noting)
    scan_chunks(tmp_path, jobs=1, on_progress=lambda _: happened.append("report"))
    assert happened == ["probe", "report"] * 3


def test_a_chunk_of_an_unknown_codec_is_listed_and_not_fatal(tmp_path: Path, chunk_file: Path) -> None:
    copy_chunks(chunk_file, tmp_path, {"v": [0, 1]})
    path = tmp_path / "v" / "1.mp4"
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzz9"))
    chunks, unusable = scan_chunks(tmp_path, jobs=1)
    assert len(chunks) == 1
    assert [Path(u.path).name for u in unusable] == ["1.mp4"]
    assert unusable[0].reason.startswith("corrupt")


def test_indexes_of_usable_chunks_go_to_the_writer(tmp_path: Path, chunk_file: Path) -> None:
    copy_chunks(chunk_file, tmp_path / "chunks", {"a": [0, 1], "b": [0]})
    (tmp_path / "chunks" / "a" / "1.mp4").write_bytes(b"no video")
    with IndexWriter(tmp_path / "m") as writer:
        chunks, _ = scan_chunks(tmp_path / "chunks", jobs=1, index=writer)
        writer.finish()
    record = probe_chunk(chunk_file, index=True).packet_index
    assert (tmp_path / "m" / "packets.bin").read_bytes() == 2 * record
    path = str(tmp_path / "m" / "packets.bin")
    assert [c.ref.index for c in chunks] == [PacketIndexRef(path, n * len(record), len(record)) for n in (0, 1)]
