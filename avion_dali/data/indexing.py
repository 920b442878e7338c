"""Make a chunk's packet index while its packets pass by, and decoders that need no container.

Imports numpy and PyAV alone, since decode workers share it.
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

# Codecs whose packets a decoder takes as they lie in the file, one picture each.
INDEXED_CODECS = frozenset({"h264", "hevc", "vp8", "vp9", "av1", "mjpeg"})
# Damaged slices are an error, not something to paint over.
STRICT = {"err_detect": "explode"}
# H.264 need not say how far its pictures are reordered. Then FFmpeg guesses, and loses frames until it has
# guessed enough; asked to be compliant, it goes by what the level allows.
_ORDERED = {"strict": "1"}
# FFmpeg's own AV1 decoder only drives hardware.
_DECODER_NAMES = {"av1": "libdav1d"}
_PROGRESSIVE = 1  # AV_FIELD_PROGRESSIVE; 0 is unknown, more is interlaced
_HEADERS_WITHIN = 4096  # what is said of a stream comes ahead of its first picture
_X264_BUILD = re.compile(rb"x264 - core *(\d{1,4})")
# Matroska and AVI point at a small header before the payload.
_PAYLOAD_WITHIN = 64


def stream_facts(stream: VideoStream) -> StreamFacts:
    """Return what a decoder must be told of a stream.

    Args:
        stream: of an open container.
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
    """Tell whether packets carry the times at which their pictures are shown.

    AVI stores none; where a codec reorders pictures, what FFmpeg gives in their place is a guess.

    Args:
        container: an open file.
        stream: its video stream.
    """
    return container.format.name != "avi" or not stream.codec_context.codec.reorder


def is_plain(container: InputContainer, stream: VideoStream) -> bool:
    """Tell whether packets can tell which pictures the decoder delivers: one each, at its own time.

    Other codecs have packets without a picture of their own, pictures that replace others, or decoders that
    deliver more or less than the keyframe flags promise.

    Args:
        container: an open file.
        stream: its video stream.
    """
    codec = stream.codec_context.codec
    if codec.canonical_name == "h264" and int(stream.codec_context.field_order) > _PROGRESSIVE:
        return False  # a packet may hold one field or two
    if stream.codec_context.pix_fmt == "pal8":
        return False  # only the first packet may bring the palette
    return (codec.canonical_name in INDEXED_CODECS or codec.intra_only) and tells_order(container, stream)


def packets_tell(first: Packet, traits: PictureTraits, *, pts: Sequence[int | None], pix_fmt: str) -> bool:
    """Tell whether the packets of a plain stream, from its first one on, settle what its decoder delivers.

    Args:
        first: the file's first packet.
        traits: of that packet.
        pts: times of the packets so far, in decode order.
        pix_fmt: FFmpeg's name of the pixel format.
    """
    if traits.entry == Entry.NONE or any(time is None or time < (pts[0] or 0) for time in pts):
        return False  # it begins inside a group, or shows pictures ahead of its first one
    return len(set(pts)) == len(pts) and not is_of_old_build(first, pix_fmt=pix_fmt)


def changes_settings(packet: Packet) -> bool:
    """Tell whether the container hands new settings to the decoder beside a packet, for all that follow.

    Args:
        packet: of any stream.
    """
    return packet.has_sidedata("new_extradata") or packet.has_sidedata("param_change")


def is_of_old_build(first: Packet, *, pix_fmt: str) -> bool:
    """Tell whether FFmpeg decodes a stream in another way because an old build of x264 wrote it.

    It learns that from the first packet alone: decoding cannot start anywhere else.

    Args:
        first: the file's first packet.
        pix_fmt: FFmpeg's name of the pixel format.
    """
    build = _X264_BUILD.search(bytes(memoryview(first)[:_HEADERS_WITHIN]))
    oldest = 151 if pix_fmt.startswith(("yuv444", "gbr")) else 34
    return build is not None and int(build[1]) < oldest


def make_decoder(stream: StreamFacts, *, strict: bool) -> VideoCodecContext:
    """Make a decoder that runs on the caller's thread.

    Args:
        stream: what it will decode.
        strict: fail on damaged slices instead of painting over them.
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
    """Make a packet that a decoder may safely read.

    Decoders read some bytes beyond a packet's end and take them for zeros. PyAV's `Packet(payload)` ends where
    the bytes object ends; a packet made by its size is longer than it says.

    Args:
        payload: a coded picture.
        pts: its presentation time or rank.
    """
    packet = Packet(len(payload))
    packet.update(payload)
    packet.pts = pts
    return packet


class TraitsReader:
    """Reads the traits of a stream's packets, met in decode order.

    Where packets bring parameter sets that the stream's header lacks (files joined without encoding), later
    keyframes that do not repeat them are no entries: a decoder that starts there lacks them, too.

    Args:
        stream: the stream.
    """

    def __init__(self, stream: StreamFacts) -> None:
        self._codec, self._known = stream.codec, stream.extradata
        self._length_size = nal_length_size(stream.codec, stream.extradata)
        self._replaced = False

    def read(self, packet: Packet) -> PictureTraits:
        """Read one packet.

        Args:
            packet: not empty.
        """
        data, codec, length_size = bytes(packet), self._codec, self._length_size
        traits = picture_traits(data, codec=codec, length_size=length_size, is_keyframe=packet.is_keyframe)
        brings = brings_parameter_sets(data, codec=codec, length_size=length_size, known=self._known)
        self._replaced |= brings
        return replace(traits, entry=Entry.NONE) if self._replaced and not brings else traits


class PacketCollector:
    """Gathers the packets of one file for its index.

    Args:
        file: descriptor of the file; every packet must lie in it just as the demuxer gives it.
        container: the same file, opened.
        stream: the stream whose packets come.
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

    def add(self, packet: Packet) -> None:
        """Take the next packet in decode order.

        Args:
            packet: not empty; the first is a keyframe.
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

    def record(self, shown: np.ndarray) -> bytes:
        """Return the packed index, or nothing where this file cannot have one.

        Args:
            shown: times in ticks, ascending, of the frames that decoding the file gives.
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
        """Return where a packet's bytes begin in the file, or None when they do not lie there as they are."""
        if position is None or position < 0:
            return None
        found = os.pread(self._file, len(data) + _PAYLOAD_WITHIN, position).find(data)
        return position + found if found >= 0 else None

    def _ranks_by_decoding(self) -> list[int]:
        """Return each packet's place in presentation order as a decoder gives it; empty when it drops any."""
        decoder = make_decoder(self._stream, strict=False)
        delivered: list[int] = []
        for number, (offset, size, _) in enumerate(self._places):
            packet = make_packet(os.pread(self._file, size, offset), number)
            delivered += [int(frame.pts or 0) for frame in decoder.decode(packet)]
        delivered += [int(frame.pts or 0) for frame in decoder.decode(None)]
        if sorted(delivered) != list(range(len(self._places))):
            return []
        return np.argsort(delivered).tolist()
