"""Creates the packet index of a chunk during demuxing, and decoders that need no container.

Decode workers use this module, so it imports only numpy and PyAV.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import replace

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream

from avion_dali.data.bitstream import (
    Entry,
    PictureTraits,
    brings_parameter_sets,
    nal_length_size,
    picture_traits,
    shows_picture,
)
from avion_dali.data.packet_index import PacketPlaces, StreamFacts, pack_index, table_of
from avion_dali.data.picture_order import OrderReader

# Codecs whose decoders accept packets as stored in the file, with one picture each.
INDEXED_CODECS = frozenset({"h264", "hevc", "vp8", "vp9", "av1", "mjpeg"})
# Damaged slices raise an error instead of being concealed.
STRICT = {"err_detect": "explode"}
# H.264 streams need not state how far their pictures are reordered. FFmpeg then guesses, and loses frames until
# the guess is large enough; in strict mode, it uses the limit of the level instead.
_ORDERED = {"strict": "1"}
# FFmpeg's built-in AV1 decoder only supports hardware decoding.
_DECODER_NAMES = {"av1": "libdav1d"}
_PROGRESSIVE = 1  # AV_FIELD_PROGRESSIVE; 0 is unknown, more is interlaced
_HEADERS_WITHIN = 4096  # information about a stream precedes its first picture
_X264_BUILD = re.compile(rb"x264 - core *(\d{1,4})")
# In Matroska and AVI, packet positions refer to a small header before the payload.
_PAYLOAD_WITHIN = 64


def stream_facts(stream: VideoStream) -> StreamFacts:
    """Return the properties of a stream that a decoder needs.

    Args:
        stream: stream of an open container.
    """
    context = stream.codec_context
    return StreamFacts(
        codec=context.codec.canonical_name,
        extradata=context.extradata or b"",
        width=context.width,
        height=context.height,
        colorspace=int(context.colorspace),
        color_range=int(context.color_range),
    )


def tells_order(container: InputContainer, stream: VideoStream) -> bool:
    """Return whether packets have the times at which their pictures are shown.

    AVI does not store them; if a codec reorders pictures, the times from FFmpeg are guesses.

    Args:
        container: an open file.
        stream: its video stream.
    """
    return container.format.name != "avi" or not stream.codec_context.codec.reorder


def is_plain(container: InputContainer, stream: VideoStream) -> bool:
    """Return whether packets can determine the pictures that the decoder delivers: one each, at its own time.

    Other codecs have packets without a picture, pictures that replace others, or decoders that deliver more or
    fewer pictures than the keyframe flags indicate.

    Args:
        container: an open file.
        stream: its video stream.
    """
    codec = stream.codec_context.codec
    if codec.canonical_name == "h264" and int(stream.codec_context.field_order) > _PROGRESSIVE:
        return False  # a packet may contain one field or two
    if stream.codec_context.pix_fmt == "pal8":
        return False  # the palette may be only in the first packet
    return (codec.canonical_name in INDEXED_CODECS or codec.intra_only) and tells_order(container, stream)


def packets_tell(first: Packet, traits: PictureTraits, *, pts: Sequence[int | None], pix_fmt: str) -> bool:
    """Return whether the packets of a plain stream, from its first one on, determine what its decoder delivers.

    Args:
        first: the file's first packet.
        traits: traits of this packet.
        pts: times of the packets read so far, in decode order.
        pix_fmt: FFmpeg's name of the pixel format.
    """
    if traits.entry == Entry.NONE or any(time is None or time < (pts[0] or 0) for time in pts):
        return False  # it begins inside a group, or shows pictures before its first one
    return len(set(pts)) == len(pts) and not is_of_old_build(first, pix_fmt=pix_fmt)


def changes_settings(packet: Packet) -> bool:
    """Return whether the container attaches new settings for all further packets to a packet.

    Args:
        packet: packet of any stream.
    """
    return packet.has_sidedata("new_extradata") or packet.has_sidedata("param_change")


def is_of_old_build(first: Packet, *, pix_fmt: str) -> bool:
    """Return whether FFmpeg decodes a stream differently because an old build of x264 wrote it.

    FFmpeg reads this information only from the first packet, so decoding cannot start anywhere else.

    Args:
        first: the file's first packet.
        pix_fmt: FFmpeg's name of the pixel format.
    """
    build = _X264_BUILD.search(bytes(memoryview(first)[:_HEADERS_WITHIN]))
    oldest = 151 if pix_fmt.startswith(("yuv444", "gbr")) else 34
    return build is not None and int(build[1]) < oldest


def make_decoder(stream: StreamFacts, *, strict: bool) -> VideoCodecContext:
    """Create a decoder that runs on the caller's thread.

    Args:
        stream: properties of the stream to decode.
        strict: whether to fail on damaged slices instead of concealing them.
    """
    name = _DECODER_NAMES.get(stream.codec, stream.codec)
    context = av.CodecContext.create(name, "r")
    assert isinstance(context, VideoCodecContext)
    context.extradata = stream.extradata or None
    context.width, context.height = stream.width, stream.height
    context.colorspace, context.color_range = stream.colorspace, stream.color_range
    context.thread_count = 1
    context.options = (STRICT if strict else {}) | (_ORDERED if stream.codec == "h264" else {})
    return context


def make_packet(payload: bytes, pts: int) -> Packet:
    """Create a packet that a decoder can read safely.

    Decoders read some bytes beyond the end of a packet and expect zeros. PyAV's `Packet(payload)` ends with the
    bytes object; a packet that is created by its size has additional space.

    Args:
        payload: a coded picture.
        pts: its presentation time or rank.
    """
    packet = Packet(len(payload))
    packet.update(payload)
    packet.pts = pts
    return packet


class TraitsReader:
    """Reads the traits of a stream's packets in decode order.

    If packets contain parameter sets that are not in the stream's header (files joined without encoding), later
    keyframes that do not repeat these sets are not entries, because a decoder that starts there has no access
    to them.

    Args:
        stream: the stream.
    """

    def __init__(self, stream: StreamFacts) -> None:
        self._codec, self._known = stream.codec, stream.extradata
        self._length_size = nal_length_size(stream.codec, stream.extradata)
        self._replaced = False

    def read(self, packet: Packet) -> PictureTraits:
        """Read the traits of one packet.

        Args:
            packet: the next packet; not empty.
        """
        data, codec, length_size = bytes(packet), self._codec, self._length_size
        traits = picture_traits(data, codec=codec, length_size=length_size, is_keyframe=packet.is_keyframe)
        brings = brings_parameter_sets(data, codec=codec, length_size=length_size, known=self._known)
        self._replaced |= brings
        return replace(traits, entry=Entry.NONE) if self._replaced and not brings else traits


class PacketCollector:
    """Collects the packets of one file for its index.

    Args:
        file: descriptor of the file; it must contain every packet exactly as the demuxer returns it.
        container: the same file, opened.
        stream: the stream whose packets are collected.
    """

    def __init__(self, file: int, container: InputContainer, stream: VideoStream) -> None:
        self._file = file
        self._tells_order = tells_order(container, stream)
        self._stream = stream_facts(stream)
        self._reader = TraitsReader(self._stream)
        self._usable = self._stream.codec in INDEXED_CODECS
        self._pix_fmt = stream.codec_context.pix_fmt or ""
        self._traits: list[PictureTraits] = []
        self._pts: list[int | None] = []
        self._shown: list[bool] = []
        self._places: list[tuple[int, int, int]] = []
        length_size = nal_length_size(self._stream.codec, self._stream.extradata)
        self._order = OrderReader(self._stream.codec, self._stream.extradata, length_size=length_size)
        self._coded_order: list[tuple[int, int]] = []

    def add(self, packet: Packet) -> None:
        """Add the next packet in decode order.

        Args:
            packet: a packet that is not empty; the first one is a keyframe.
        """
        if not self._usable:
            return
        data = bytes(packet)
        offset = self._find(packet.pos, data)
        shows = shows_picture(data, codec=self._stream.codec)
        is_old = not self._places and is_of_old_build(packet, pix_fmt=self._pix_fmt)
        if offset is None or not shows or is_old or changes_settings(packet):
            self._usable = False
            return
        self._traits.append(self._reader.read(packet))
        self._pts.append(packet.pts)
        self._shown.append(not packet.is_discard)
        self._places.append((offset, len(data), zlib.crc32(data)))
        if self._order.tells:
            self._coded_order.append(self._order.read(data))

    def is_ordered(self) -> bool:
        """Return whether the container shows the pictures in the order that is coded in them.

        If headers of pictures say otherwise, the decoder decides. Streams whose times do not tell an order are
        not examined, such as joined recordings, where times repeat.
        """
        pts = [time for time in self._pts if time is not None]
        examined = self._usable and self._order.tells and self._tells_order
        if not examined or len(set(pts)) != len(self._places):
            return True
        ranks = np.argsort(np.argsort(pts, kind="stable"), kind="stable").tolist()
        if [rank for _, rank in sorted(zip(self._coded_order, ranks, strict=True))] == list(range(len(ranks))):
            return True
        decoded = self._ranks_by_decoding()
        return not decoded or decoded == ranks

    def record(self, shown: np.ndarray) -> bytes:
        """Return the packed index; empty if this file cannot have one.

        Args:
            shown: ascending times in ticks of the frames that decoding the file delivers.
        """
        if not self._usable or not self._places:
            return b""
        pts = [p for p in self._pts if p is not None]
        by_time = self._tells_order and len(set(pts)) == len(self._pts)
        if not by_time:
            pts = self._ranks_by_decoding()
        if not pts:
            return b""
        table = table_of(pts, self._traits, shown=self._shown)
        times = table.pts[table.order]
        if len(times) != len(shown) or (by_time and not np.array_equal(times, shown)):
            return b""
        offset, size, crc = (np.array(column) for column in zip(*self._places, strict=True))
        return pack_index(self._stream, table, places=PacketPlaces(offset, size, crc))

    def _find(self, position: int | None, data: bytes) -> int | None:
        """Return the position of a packet's bytes in the file, or None if they are not stored as they are."""
        if position is None or position < 0:
            return None
        found = os.pread(self._file, len(data) + _PAYLOAD_WITHIN, position).find(data)
        return position + found if found >= 0 else None

    def _ranks_by_decoding(self) -> list[int]:
        """Return each packet's rank in presentation order, found by decoding; empty if any is dropped."""
        decoder = make_decoder(self._stream, strict=False)
        delivered: list[int] = []
        for number, (offset, size, _) in enumerate(self._places):
            packet = make_packet(os.pread(self._file, size, offset), number)
            delivered += [int(frame.pts or 0) for frame in decoder.decode(packet)]
        delivered += [int(frame.pts or 0) for frame in decoder.decode(None)]
        if sorted(delivered) != list(range(len(self._places))):
            return []
        return np.argsort(delivered).tolist()
