"""The packet index of a chunk: position, checksum and role of each coded picture in the file.

With the index, a clip is read by a few `pread`s, without opening a container, and all bytes are verified before
they reach a decoder. There is one record per chunk; the manifest's `packets.bin` is their concatenation. A
record consists of a head (stream facts and a directory, with a checksum) and blocks of packets. A block starts
at a keyframe that divides the file cleanly: all packets after it in the file are also shown after it. A clip
therefore reads only the blocks of its frames, regardless of the length of the file.

The numbers of a block are stored in byte planes and deflated, except the checksums, which do not compress.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from avion_dali.data.bitstream import Entry, PictureTraits

# Large enough for deflating (a 15 s chunk has one or two blocks), small enough to unpack in 50 us.
PACKETS_PER_BLOCK = 256

_MAGIC, _MAGIC_WITHOUT_CHECKSUMS = b"PKT2", b"PKT1"
_CHECKED_FROM = 8  # magic and checksum come first
_HEAD = struct.Struct("<4sIIHHBBBxI")
_OLD_DIRECTORY = np.dtype(
    [("first_frame", "<u4"), ("packets", "<u4"), ("start", "<u4"), ("num_bytes", "<u4"), ("offset", "<u8")]
)
_DIRECTORY = np.dtype([*_OLD_DIRECTORY.descr, ("crc", "<u4")])  # of the block's bytes
_FIRST_READ = 2048  # covers the head of any but very long files, and all of a 15 s chunk's record or nearly


class IndexDamagedError(ValueError):
    """A record of the packet index is damaged; the message states how."""


@dataclass(frozen=True, slots=True)
class StreamFacts:
    """Properties of a stream that a decoder needs besides its packets.

    Args:
        codec: FFmpeg's codec name, such as `h264`.
        extradata: parameter sets as the container stores them.
        width: coded width in pixels.
        height: coded height in pixels.
        colorspace: FFmpeg's AVColorSpace number, as stated by the container.
        color_range: FFmpeg's AVColorRange number, as stated by the container.
    """

    codec: str
    extradata: bytes
    width: int
    height: int
    colorspace: int
    color_range: int


@dataclass(frozen=True, slots=True)
class PacketTable:
    """Packets of a file, or of a separately decodable part of it, in decode order.

    Args:
        pts: int64 (P,), presentation times or ranks; unique.
        entry: uint8 (P,), an `Entry`: whether decoding can start here.
        is_reference: bool (P,), False for pictures to which no other picture of the same layer refers.
        layer: uint8 (P,), temporal layer.
        order: int64 (F,), decode position of the f-th frame in presentation order. Pictures that an edit list
            hides, or that cannot be decoded, are not frames.
    """

    pts: np.ndarray
    entry: np.ndarray
    is_reference: np.ndarray
    layer: np.ndarray
    order: np.ndarray


@dataclass(frozen=True, slots=True)
class PacketPlaces:
    """Positions of packets in their file.

    Args:
        offset: int64 (P,), position of the first byte.
        size: int64 (P,), size in bytes.
        crc: uint32 (P,), CRC-32 of the bytes.
    """

    offset: np.ndarray
    size: np.ndarray
    crc: np.ndarray


@dataclass(frozen=True, slots=True)
class IndexBlock:
    """The packets of consecutive frames, which can be decoded without other packets.

    Args:
        first_frame: frame id of the first frame.
        table: the packets; `pts` are ranks over the whole file.
        places: their positions in the file.
    """

    first_frame: int
    table: PacketTable
    places: PacketPlaces


def table_of(pts: Sequence[int], traits: Sequence[PictureTraits], *, shown: Sequence[bool]) -> PacketTable:
    """Create a table of packets in decode order.

    Args:
        pts: presentation times; unique.
        traits: traits of each packet.
        shown: False for pictures that an edit list hides.
    """
    times = np.array(pts, dtype=np.int64)
    entry = np.array([t.entry for t in traits], dtype=np.uint8)
    visible = np.array(shown, dtype=bool)
    if len(entry):
        # Nothing precedes the first picture, so frames that are shown before it cannot be decoded.
        entry[0] = entry[0] or Entry.OPEN
        visible &= times >= times[0]
    positions = np.flatnonzero(visible)
    return PacketTable(
        pts=times,
        entry=entry,
        is_reference=np.array([t.is_reference for t in traits], dtype=bool),
        layer=np.array([t.layer for t in traits], dtype=np.uint8),
        order=positions[np.argsort(times[positions])],
    )


def pack_index(stream: StreamFacts, table: PacketTable, *, places: PacketPlaces) -> bytes:
    """Create the record of a file.

    Args:
        stream: facts of the stream.
        table: all packets of the file.
        places: their positions in the file.

    Returns:
        The record.
    """
    shown = np.zeros(len(table.pts), dtype=bool)
    shown[table.order] = True
    rank = np.empty(len(table.pts), dtype=np.int64)
    rank[np.argsort(table.pts)] = np.arange(len(rank))
    flags = (
        table.entry | table.is_reference.astype(np.uint8) << 2 | shown.astype(np.uint8) << 3 | table.layer << 4
    )
    borders = [*_block_starts(rank, table.entry), len(rank)]
    blocks, directory = [], np.zeros(len(borders) - 1, dtype=_DIRECTORY)
    for i, (start, end) in enumerate(zip(borders, borders[1:], strict=False)):
        offset, size = places.offset[start:end], places.size[start:end]
        gap = offset - np.concatenate([offset[:1], offset[:-1] + size[:-1]])
        moved = rank[start:end] - np.arange(start, end)
        planes = [_planes(size), _planes(gap), _planes(moved), flags[start:end].tobytes()]
        blocks.append(places.crc[start:end].astype("<u4").tobytes() + zlib.compress(b"".join(planes), 9))
        block = (int(shown[:start].sum()), end - start, 0, len(blocks[-1]), offset[0], zlib.crc32(blocks[-1]))
        directory[i] = block
    directory["start"] = np.cumsum([0, *directory["num_bytes"][:-1]])
    return _pack_head(stream, directory) + b"".join(blocks)


def _pack_head(stream: StreamFacts, directory: np.ndarray) -> bytes:
    codec = stream.codec.encode()
    numbers = (stream.width, stream.height, stream.colorspace, stream.color_range)
    sizes = (len(codec), len(stream.extradata))
    head = _HEAD.pack(b"", 0, len(directory), *numbers, *sizes) + codec + stream.extradata + directory.tobytes()
    checked = head[_CHECKED_FROM:]
    return _MAGIC + struct.pack("<I", zlib.crc32(checked)) + checked


def _block_starts(rank: np.ndarray, entry: np.ndarray) -> list[int]:
    """Return the decode positions where blocks begin: clean borders at distances >= `PACKETS_PER_BLOCK`."""
    positions = np.arange(len(rank))
    # All packets before a clean border are shown before it, so its rank equals its position.
    shown_before = np.concatenate([[-1], np.maximum.accumulate(rank)[:-1]])
    clean = np.flatnonzero((entry != Entry.NONE) & (rank == positions) & (shown_before < positions))
    starts = [0]
    for position in clean.tolist():
        if position - starts[-1] >= PACKETS_PER_BLOCK:
            starts.append(position)
    return starts


def _planes(numbers: np.ndarray) -> bytes:
    """Store int32 numbers by byte planes: the high planes are nearly constant and compress well."""
    return np.ascontiguousarray(numbers.astype("<i4").view(np.uint8).reshape(-1, 4).T).tobytes()


def _from_planes(planes: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(planes.reshape(4, -1).T).view("<i4")[:, 0].astype(np.int64)


class PacketIndex:
    """The opened record of one chunk.

    Args:
        read: returns `n` bytes of the record from byte `i` on, fewer at its end.

    Raises:
        IndexDamagedError: when the head is damaged.
    """

    def __init__(self, read: Callable[[int, int], bytes]) -> None:
        self._read = read
        self._begin = read(0, _FIRST_READ)
        if len(self._begin) < _HEAD.size:
            raise IndexDamagedError("ends inside its head")
        magic, crc, blocks, *numbers, codec_size, extra_size = _HEAD.unpack_from(self._begin)
        if magic not in (_MAGIC, _MAGIC_WITHOUT_CHECKSUMS):
            raise IndexDamagedError("does not begin as a packet index does")
        names_end = _HEAD.size + codec_size + extra_size
        directory = _DIRECTORY if magic == _MAGIC else _OLD_DIRECTORY
        self._blocks_start = names_end + blocks * directory.itemsize
        head = self._bytes(0, self._blocks_start)
        if zlib.crc32(head[_CHECKED_FROM:]) != crc:
            raise IndexDamagedError("has a damaged head")
        codec, extradata = head[_HEAD.size :][:codec_size], head[:names_end][_HEAD.size + codec_size :]
        self.stream = StreamFacts(codec.decode(), extradata, *numbers)
        self._directory = np.frombuffer(head[names_end:], dtype=directory)

    def block_of(self, frame_id: int) -> int:
        """Return the index of the block that contains a frame.

        Args:
            frame_id: frame index in presentation order, from 0.
        """
        return int(np.searchsorted(self._directory["first_frame"], frame_id, side="right")) - 1

    def block(self, number: int) -> IndexBlock:
        """Read one block.

        Args:
            number: block index, from `block_of`.

        Raises:
            IndexDamagedError: when the block is damaged.
        """
        first_frame, packets, start, num_bytes, offset, *checksum = self._directory[number].tolist()
        start += self._blocks_start
        data = self._bytes(start, start + num_bytes)
        if checksum and checksum != [zlib.crc32(data)]:
            raise IndexDamagedError("has a damaged block")
        try:
            numbers = np.frombuffer(zlib.decompress(data[4 * packets :]), dtype=np.uint8)
        except zlib.error as error:
            raise IndexDamagedError(f"has a damaged block ({error})") from error
        if len(numbers) != 13 * packets:
            raise IndexDamagedError("has a block of the wrong length")
        size, gap, moved = (_from_planes(part) for part in numbers[: 12 * packets].reshape(3, -1))
        flags = numbers[12 * packets :]
        first_packet = int(self._directory["packets"][:number].sum())
        pts = moved + np.arange(first_packet, first_packet + packets)
        shown = np.flatnonzero(flags & 8)
        table = PacketTable(
            pts=pts,
            entry=flags & 3,
            is_reference=(flags & 4) != 0,
            layer=flags >> 4,
            order=shown[np.argsort(pts[shown])],
        )
        ends = np.cumsum(gap + size) + offset
        places = PacketPlaces(ends - size, size, np.frombuffer(data, dtype="<u4", count=packets))
        return IndexBlock(first_frame, table, places)

    def _bytes(self, start: int, end: int) -> bytes:
        data = self._begin[start:end] if end <= len(self._begin) else self._read(start, end - start)
        if len(data) != end - start:
            raise IndexDamagedError("is truncated")
        return data
