"""The packet index gives back what the container says, for any codec and container, and notices damage."""

import zlib
from pathlib import Path

import av
import make_videos
import numpy as np
import pytest

from avion_dali.data.bitstream import Entry
from avion_dali.data.packet_index import (
    _OLD_DIRECTORY,
    PACKETS_PER_BLOCK,
    IndexDamagedError,
    PacketIndex,
    PacketPlaces,
    PacketTable,
    StreamFacts,
    pack_index,
)
from avion_dali.data.probe import probe_chunk

STREAM = StreamFacts("h264", b"extra", 512, 288, 6, 1)


def opened(record: bytes) -> PacketIndex:
    return PacketIndex(lambda start, count: record[start : start + count])


def made_up(gops: int, *, gop: int = 30) -> tuple[PacketTable, PacketPlaces]:
    """Closed GOPs of I P B B P B B ..., with a hole in the file after every GOP."""
    rng = np.random.default_rng(gops)
    inner = np.arange(gop)
    threes = (gop - 1) // 3
    inner[1 : 1 + 3 * threes] = (np.array([3, 1, 2]) + 3 * np.arange(threes)[:, None]).ravel()
    pts = np.concatenate([inner + gop * g for g in range(gops)]) * 512 + 77
    entry = np.where(np.arange(len(pts)) % gop == 0, Entry.CLEAN, Entry.NONE).astype(np.uint8)
    size = rng.integers(30, 90_000, len(pts))
    offset = np.cumsum(size) - size + np.repeat(np.arange(gops), gop) * 1000 + 5_000_000_000
    table = PacketTable(
        pts, entry, rng.random(len(pts)) < 0.5, rng.integers(0, 7, len(pts)).astype(np.uint8), np.argsort(pts)
    )
    return table, PacketPlaces(offset, size, rng.integers(0, 2**32, len(pts)).astype(np.uint32))


@pytest.mark.parametrize("gops", [1, 9, 40])
def test_columns_survive_packing(gops: int) -> None:
    table, places = made_up(gops)
    index = opened(pack_index(STREAM, table, places=places))
    assert index.stream == STREAM
    starts = range(0, len(table.pts))
    numbers = sorted({index.block_of(frame_id) for frame_id in starts})
    blocks = [index.block(number) for number in numbers]
    for name in ("offset", "size", "crc"):
        np.testing.assert_array_equal(
            np.concatenate([getattr(b.places, name) for b in blocks]), getattr(places, name)
        )
    for name in ("entry", "is_reference", "layer"):
        np.testing.assert_array_equal(
            np.concatenate([getattr(b.table, name) for b in blocks]), getattr(table, name)
        )
    ranks = np.concatenate([b.table.pts for b in blocks])
    np.testing.assert_array_equal(np.argsort(ranks), table.order)
    firsts = [b.first_frame for b in blocks]
    assert firsts == np.cumsum([0, *(len(b.table.order) for b in blocks[:-1])]).tolist()
    if gops == 40:
        assert all(len(b.table.pts) >= PACKETS_PER_BLOCK for b in blocks[:-1]) and len(blocks) > 2
        assert [index.block_of(first) for first in firsts] == numbers
        assert [index.block_of(first - 1) for first in firsts[1:]] == numbers[:-1]


def test_blocks_never_part_an_open_gop() -> None:
    table, places = made_up(40)
    pts = table.pts.copy()
    # The frame before every keyframe is shown after it: no border is clean.
    keys = np.flatnonzero(table.entry)[1:]
    pts[keys], pts[keys + 1] = table.pts[keys + 1], table.pts[keys]
    opened_gops = PacketTable(pts, table.entry, table.is_reference, table.layer, np.argsort(pts))
    index = opened(pack_index(STREAM, opened_gops, places=places))
    assert index.block_of(len(pts) - 1) == 0


@pytest.mark.parametrize(
    "style", ["x264-default", "balanced", "open-gop", "vp9", "vp9-mp4", "mjpeg", "hevc", "mkv"]
)
def test_places_hold_the_packets(gop_videos: dict[str, Path], style: str) -> None:
    path = gop_videos[style]
    facts = probe_chunk(path, index=True)
    index = opened(facts.packet_index)
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        packets = [p for p in container.demux(stream) if p.size]
        assert index.stream.extradata == (stream.codec_context.extradata or b"")
    block = index.block(0)
    data = path.read_bytes()
    for i, packet in enumerate(packets[: len(block.table.pts)]):
        found = data[block.places.offset[i] :][: block.places.size[i]]
        assert found == bytes(packet)
        assert zlib.crc32(found) == block.places.crc[i]
    assert len(facts.packet_index) < 20 * len(packets) + len(index.stream.extradata) + 100


def test_h264_in_avi_is_ordered_by_decoding(gop_videos: dict[str, Path]) -> None:
    facts = probe_chunk(gop_videos["avi"], index=True)
    table = opened(facts.packet_index).block(0).table
    assert len(table.order) == facts.num_frames == 90


def test_transport_streams_have_no_index(tmp_path: Path) -> None:
    """Their packets do not lie in the file in one piece."""
    path = make_videos.write_video(tmp_path / "a.ts", frames=20, gop=10)
    assert probe_chunk(path, index=True).packet_index == b""


def test_a_record_that_is_cut_short_is_noticed() -> None:
    table, places = made_up(9)
    record = pack_index(STREAM, table, places=places)
    for length in (0, 20, 60, len(record) // 2, len(record) - 1):
        with pytest.raises(IndexDamagedError):
            opened(record[:length]).block(0)


def test_index_is_deterministic(gop_videos: dict[str, Path]) -> None:
    first, second = (probe_chunk(gop_videos["balanced"], index=True).packet_index for _ in range(2))
    assert first == second != b""


def packed(pictures: int) -> bytes:
    table, places = made_up(pictures)
    return pack_index(STREAM, table, places=places)


def test_every_changed_byte_is_noticed_where_it_is_read() -> None:
    record = packed(9)
    last = opened(record).block_of(2**40)
    for at in range(len(record)):
        damaged = record[:at] + bytes([record[at] ^ 1 << at % 8]) + record[at + 1 :]
        with pytest.raises(IndexDamagedError):
            [opened(damaged).block(number) for number in range(last + 1)]


def test_records_without_checksums_of_blocks_are_read() -> None:
    table, places = made_up(40)
    record = pack_index(STREAM, table, places=places)
    index = opened(record)
    names_end = index._blocks_start - index._directory.nbytes
    directory = np.zeros(len(index._directory), _OLD_DIRECTORY)
    for name in _OLD_DIRECTORY.names:
        directory[name] = index._directory[name]
    checked = record[8:names_end] + directory.tobytes()
    old = opened(b"PKT1" + zlib.crc32(checked).to_bytes(4, "little") + checked + record[index._blocks_start :])
    for number in range(len(directory)):
        np.testing.assert_array_equal(old.block(number).places.crc, index.block(number).places.crc)
        np.testing.assert_array_equal(old.block(number).table.pts, index.block(number).table.pts)
