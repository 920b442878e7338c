"""The plan of a read names the bytes that the reader fetches and the pictures it decodes, and no others."""

import os
from dataclasses import replace
from pathlib import Path

import make_videos
import pytest
from chunk_folders import indexed_chunk

from avion_dali.contracts import ChunkRef, ClipPart, DecodeError, PacketIndexRef, UserError
from avion_dali.decode.planned_reads import planned_reads
from avion_dali.decode.source import gather_packets


class RecordedReads:
    """Stands in for `os.pread` and keeps (offset, bytes returned) of each call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[int, int]] = []
        self._pread = os.pread
        monkeypatch.setattr(os, "pread", self)

    def __call__(self, file: int, size: int, offset: int) -> bytes:
        data = self._pread(file, size, offset)
        self.made.append((offset, len(data)))
        return data


@pytest.mark.parametrize("style", ["x264-default", "balanced", "intra", "open-gop", "hevc", "vp9", "mkv"])
@pytest.mark.parametrize("frame_ids", [(0,), (7, 20, 33, 61), (88, 89)])
def test_the_plan_names_exactly_what_the_reader_reads(
    style: str,
    frame_ids: tuple[int, ...],
    gop_videos: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    part = ClipPart(indexed_chunk(gop_videos[style], tmp_path), frame_ids)
    planned = planned_reads(part, decoder="test")
    reads = RecordedReads(monkeypatch)
    payloads = [p for run in gather_packets(part, decoder="test").runs for p in run.payloads]
    assert planned.read_sizes == tuple(size for _, size in reads.made)
    ranges = [(r.offset, r.num_bytes) for run in planned.runs for r in run.ranges]
    assert ranges == reads.made[len(planned.index_reads) :]
    assert planned.decoded == len(payloads)
    assert [size for run in planned.runs for r in run.ranges for size in r.sizes] == list(map(len, payloads))


def test_neighboring_packets_are_read_with_one_call(tmp_path: Path) -> None:
    options = {"g": "12", "bf": "0", "sc_threshold": "0", "threads": "1"}
    path = make_videos.write_video(tmp_path / "v.mp4", frames=24, size=(32, 32), options=options)
    planned = planned_reads(ClipPart(indexed_chunk(path, tmp_path), (5, 14)), decoder="test")
    assert [len(r.sizes) for run in planned.runs for r in run.ranges] == [6, 3]
    assert planned.decoded == 9


def test_a_plan_opens_no_chunk(gop_videos: dict[str, Path], tmp_path: Path) -> None:
    chunk = indexed_chunk(gop_videos["balanced"], tmp_path)
    part = ClipPart(chunk, (5, 40))
    gone = ClipPart(replace(chunk, path=str(tmp_path / "gone.mp4")), (5, 40))
    assert planned_reads(gone, decoder="test").read_sizes == planned_reads(part, decoder="test").read_sizes
    with pytest.raises(DecodeError, match="missing"):
        gather_packets(gone, decoder="test")


def test_a_chunk_without_an_index_is_named(gop_videos: dict[str, Path]) -> None:
    path = gop_videos["balanced"]
    part = ClipPart(ChunkRef(str(path), path.stat().st_size, 90, 128, 96), (0,))
    with pytest.raises(UserError, match=f"{path} has no packet index"):
        planned_reads(part, decoder="test")


def test_a_lost_index_is_named(gop_videos: dict[str, Path], tmp_path: Path) -> None:
    chunk = indexed_chunk(gop_videos["balanced"], tmp_path)
    lost = replace(chunk, index=PacketIndexRef(str(tmp_path / "lost"), 0, 100))
    with pytest.raises(DecodeError, match=r"lost cannot be read .*build the manifest again"):
        planned_reads(ClipPart(lost, (0,)), decoder="test")
