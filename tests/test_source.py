"""Packets come the same through the index and through the container, and no damaged byte passes the index."""

from dataclasses import replace
from pathlib import Path

import make_videos
import pytest

from avion_dali.contracts import ChunkRef, ClipPart, DecodeError, PacketIndexRef
from avion_dali.data.probe import probe_chunk
from avion_dali.decode.reading import read_planned
from avion_dali.decode.source import UnorderedStreamError, gather_packets

STYLES = ["x264-default", "balanced", "intra", "open-gop", "vp9", "vp9-mp4", "mjpeg", "hevc", "mkv", "mov"]


def indexed_ref(path: Path, folder: Path) -> ChunkRef:
    """A chunk with its packet index in a file of its own."""
    facts = probe_chunk(path, index=True)
    index = folder / f"{path.name}.packets"
    index.write_bytes(b"before" + facts.packet_index + b"after")
    place = PacketIndexRef(str(index), len("before"), len(facts.packet_index))
    return ChunkRef(str(path), facts.size_bytes, facts.num_frames, facts.width, facts.height, place)


@pytest.mark.parametrize("style", STYLES)
def test_index_and_container_give_the_same_packets(
    gop_videos: dict[str, Path], tmp_path: Path, style: str
) -> None:
    ref = indexed_ref(gop_videos[style], tmp_path)
    for ids in [(0,), (89,), (3, 40, 41, 77), (28, 29, 30, 31), tuple(range(90))]:
        with_index = gather_packets(ClipPart(ref, ids), decoder="x")
        without = gather_packets(ClipPart(replace(ref, index=None), ids), decoder="x")
        assert with_index.stream == without.stream
        assert [run.payloads for run in with_index.runs] == [run.payloads for run in without.runs]
        assert [run.clean for run in with_index.runs] == [run.clean for run in without.runs]
        for a, b in zip(with_index.runs, without.runs, strict=True):
            assert [a.pts.index(w) for w in a.wanted] == [b.pts.index(w) for w in b.wanted]


def test_long_files_are_read_in_blocks(tmp_path: Path) -> None:
    path = make_videos.write_video(tmp_path / "long.mp4", frames=900, size=(32, 32), gop=30)
    ref = indexed_ref(path, tmp_path)
    for ids in [(0, 899), (255, 256, 257, 300), tuple(range(0, 900, 97))]:
        frames = read_planned(ClipPart(ref, ids))
        alone = [read_planned(ClipPart(replace(ref, index=None), (i,)))[0] for i in ids]
        assert [f.to_ndarray().tobytes() for f in frames] == [f.to_ndarray().tobytes() for f in alone]
    assert len(gather_packets(ClipPart(ref, (0, 899)), decoder="x").runs) == 2


def test_h264_with_b_frames_in_avi_needs_its_index(tmp_path: Path) -> None:
    """Its container tells no order of presentation; building the index finds it by decoding once."""
    options = {"preset": "superfast", "g": "30", "bf": "3", "threads": "1"}
    ref = indexed_ref(make_videos.write_video(tmp_path / "a.avi", frames=90, options=options), tmp_path)
    assert ref.num_frames == 90
    part = ClipPart(ref, (5, 44, 80))
    numbers = [make_videos.read_frame_number(f.to_ndarray(format="rgb24")) for f in read_planned(part)]
    assert numbers == [5, 44, 80]
    with pytest.raises(UnorderedStreamError):
        gather_packets(ClipPart(replace(ref, index=None), (5, 44, 80)), decoder="x")


@pytest.mark.parametrize("damage", ["payload", "index", "index gone", "gone", "grown", "directory"])
def test_damage_is_typed(gop_videos: dict[str, Path], tmp_path: Path, damage: str) -> None:
    path = tmp_path / "chunk.mp4"
    path.write_bytes(gop_videos["balanced"].read_bytes())
    ref = indexed_ref(path, tmp_path)
    part = ClipPart(ref, (40, 44))
    assert ref.index is not None
    index = Path(ref.index.path)
    payload = gather_packets(part, decoder="x").runs[0].payloads[1]
    data = bytearray(path.read_bytes())
    kind = {"gone": "missing", "grown": "changed"}.get(damage, "corrupt")
    if damage == "payload":
        data[data.index(payload) + len(payload) - 1] ^= 1
        path.write_bytes(data)
    elif damage == "index":
        index.write_bytes(index.read_bytes()[:40])
    elif damage == "index gone":
        index.unlink()
        part = ClipPart(replace(ref, index=replace(ref.index, path=str(tmp_path / "other"))), (40, 44))
    elif damage == "grown":
        path.write_bytes(data + b"\0")
    else:
        path.unlink()
        if damage == "directory":
            path.mkdir()
    with pytest.raises(DecodeError) as caught:
        gather_packets(part, decoder="cpu-fused")
    error = caught.value
    assert (error.path, error.frame_ids, error.decoder) == (str(path), (40, 44), "cpu-fused")
    assert error.kind == kind


def test_untouched_packets_may_be_damaged(gop_videos: dict[str, Path], tmp_path: Path) -> None:
    """Only what a clip needs is read."""
    path = tmp_path / "chunk.mp4"
    path.write_bytes(gop_videos["balanced"].read_bytes())
    ref = indexed_ref(path, tmp_path)
    last = gather_packets(ClipPart(ref, (88,)), decoder="x").runs[0].payloads[-1]
    data = path.read_bytes()
    path.write_bytes(data.replace(last, bytes(len(last))))
    (frame,) = read_planned(ClipPart(ref, (3,)))
    assert make_videos.read_frame_number(frame.to_ndarray(format="rgb24")) == 3
    with pytest.raises(DecodeError, match="differ from those of the manifest"):
        read_planned(ClipPart(ref, (88,)))
