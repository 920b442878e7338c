"""Mini clips: the coded packets of one clip as a small mp4 in memory, which DALI decodes as a whole video.

DALI decodes a file from its first frame, so a clip from the middle of a chunk must become a file that starts
there. Packets are copied unchanged, so the frames are bit-identical to those of the chunk.

This module runs in decode workers, so it does not import DALI. The mp4 is written without a muxer (ISO/IEC
14496-12; parameter sets: ISO/IEC 14496-15): a muxer copies the description of the stream from an open file,
which clips read through the packet index do not have, and takes six times as long (0.14 instead of 0.023 ms for
35 packets).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from avion_dali.data.bitstream import brings_parameter_sets, nal_length_size
from avion_dali.data.packet_index import StreamFacts
from avion_dali.decode.source import PartPackets, RunPackets

# NVDEC delivers pictures to DALI in decode order. DALI buffers 8 of them and outputs the earliest (DALI 2.4,
# frames_decoder_gpu.cc), so a picture may be decoded at most this many places after its place in display order.
MAX_REORDER_FRAMES = 7

# Sample entry and configuration record of each codec; None where packets need no configuration record.
_ENTRIES: dict[str, tuple[bytes, bytes | None]] = {
    "h264": (b"avc1", b"avcC"),
    "hevc": (b"hvc1", b"hvcC"),
    "vp8": (b"vp08", None),
    "vp9": (b"vp09", None),
    "mjpeg": (b"jpeg", None),
}
_TIMESCALE = 30  # ticks per second, one per frame; DALI does not use the seconds
_UNITY_MATRIX = struct.pack(">9I", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)


class UnfitForMiniClipError(ValueError):
    """A new decoder would not reproduce the frames of these packets from one file; the message says why."""


@dataclass(frozen=True, slots=True)
class MiniClip:
    """One clip as a file for DALI.

    Args:
        data: the mp4; bytes, or a uint8 view of shared memory.
        frame_ids: place of each requested frame in the mp4's display order, ascending: first the frames of the
            first part, then those of the next part.
        colorspace: FFmpeg's AVColorSpace number of its stream, which DALI ignores.
    """

    data: bytes | np.ndarray
    frame_ids: tuple[int, ...]
    colorspace: int


def build_mini_clip(parts: Sequence[PartPackets]) -> MiniClip:
    """Write the runs of a clip one after another into one mp4.

    Args:
        parts: packets of the clip's parts, at least one.

    Raises:
        UnfitForMiniClipError: when the parts' streams differ, a run starts inside an open GOP, or DALI cannot
            decode such packets.
    """
    stream, runs = parts[0].stream, [run for part in parts for run in part.runs]
    _check(stream, parts, runs)
    timeline = _Timeline()
    for run in runs:
        timeline.append(run)
    if timeline.delay > MAX_REORDER_FRAMES:
        raise UnfitForMiniClipError(
            f"pictures are decoded up to {timeline.delay} places late, but DALI reorders {MAX_REORDER_FRAMES}"
        )
    payloads = [payload for run in runs for payload in run.payloads]
    return MiniClip(_mp4(stream, payloads, timeline=timeline), tuple(timeline.wanted), stream.colorspace)


def _check(stream: StreamFacts, parts: Sequence[PartPackets], runs: Sequence[RunPackets]) -> None:
    if stream.codec not in _ENTRIES:
        raise UnfitForMiniClipError(f"codec {stream.codec} is not one of {', '.join(_ENTRIES)}")
    if any(part.stream != stream for part in parts):
        raise UnfitForMiniClipError("its chunks differ in codec, size, color or parameter sets")
    if _ENTRIES[stream.codec][1] and not nal_length_size(stream.codec, stream.extradata):
        raise UnfitForMiniClipError("its parameter sets are not stored as mp4 and Matroska store them")
    # Outside its GOP, such a keyframe continues the picture order counts of the previously decoded pictures, so
    # frames are output in another order.
    if not all(run.clean for run in runs):
        raise UnfitForMiniClipError("it starts at a keyframe inside an open GOP")
    if len(runs) > 1 and any(_brings_parameter_sets(stream, run) for run in runs):
        raise UnfitForMiniClipError("its keyframes contain their own parameter sets")


def _brings_parameter_sets(stream: StreamFacts, run: RunPackets) -> bool:
    """Return whether a run leaves a decoder with other parameter sets than the stream's."""
    length_size = nal_length_size(stream.codec, stream.extradata)
    return brings_parameter_sets(
        run.payloads[0], codec=stream.codec, length_size=length_size, known=stream.extradata
    )


class _Timeline:
    """The decode and display time of each packet, in frames; runs follow one another without a gap."""

    def __init__(self) -> None:
        self.shown: list[int] = []  # place of each packet in presentation order
        self.keyframes: list[int] = []  # place of each run's first packet in decode order
        self.wanted: list[int] = []
        self.delay = 0  # largest number of places by which a packet is decoded after its display place

    def append(self, run: RunPackets) -> None:
        start = len(self.shown)
        place = {pts: start + i for i, pts in enumerate(sorted(run.pts))}
        self.keyframes.append(start)
        self.shown += [place[pts] for pts in run.pts]
        self.wanted += [place[pts] for pts in run.wanted]
        late = (decoded - shown for decoded, shown in enumerate(self.shown[start:], start))
        self.delay = max(self.delay, *late)

    def composition_offsets(self) -> Iterator[int]:
        """Yield the time from decoding to display of each packet.

        The delay is added to all offsets so that none is negative. The first frame is then shown at time
        `delay` instead of 0, which does not affect decoders; an edit list could correct this, but DALI ignores
        edit lists.
        """
        return (shown - decoded + self.delay for decoded, shown in enumerate(self.shown))


def _box(kind: bytes, *content: bytes) -> bytes:
    body = b"".join(content)
    return struct.pack(">I4s", 8 + len(body), kind) + body


def _full_box(kind: bytes, *content: bytes, flags: int = 0) -> bytes:
    return _box(kind, struct.pack(">I", flags), *content)


def _table(kind: bytes, *numbers: int) -> bytes:
    """Return a full box of 32-bit numbers."""
    return _full_box(kind, struct.pack(f">{len(numbers)}I", *numbers))


def _mp4(stream: StreamFacts, payloads: Sequence[bytes], *, timeline: _Timeline) -> bytes:
    moov = _moov(stream, [len(payload) for payload in payloads], timeline=timeline)
    # The last number of the last table is the offset of the packets, which is known only now.
    start = len(_FILE_TYPE) + len(moov) + 8
    mdat = struct.pack(">I4s", 8 + sum(map(len, payloads)), b"mdat")
    return b"".join([_FILE_TYPE, moov[:-4], struct.pack(">I", start), mdat, *payloads])


def _moov(stream: StreamFacts, sizes: Sequence[int], *, timeline: _Timeline) -> bytes:
    duration = len(sizes) + timeline.delay
    size = struct.pack(">II", stream.width << 16, stream.height << 16)
    movie_header = struct.pack(">6IQ", 0, 0, _TIMESCALE, duration, 1 << 16, 1 << 24, 0)
    track_header = struct.pack(">5I16x", 0, 0, 1, 0, duration)
    media_header = struct.pack(">4II", 0, 0, _TIMESCALE, duration, 0x55C40000)  # language undetermined
    stbl = _box(b"stbl", _sample_description(stream), *_sample_tables(sizes, timeline))
    minf = _box(b"minf", _VIDEO_HEADER, _DATA_HERE, stbl)
    mdia = _box(b"mdia", _full_box(b"mdhd", media_header), _HANDLER, minf)
    trak = _box(b"trak", _full_box(b"tkhd", track_header, _UNITY_MATRIX, size, flags=3), mdia)
    return _box(b"moov", _full_box(b"mvhd", movie_header, _UNITY_MATRIX, bytes(24), b"\0\0\0\2"), trak)


def _sample_tables(sizes: Sequence[int], timeline: _Timeline) -> Iterator[bytes]:
    """Yield the tables of times, keyframes, sizes and offsets; all packets are contiguous."""
    count = len(sizes)
    yield _table(b"stts", 1, count, 1)
    if timeline.delay:
        yield _table(b"ctts", count, *(n for offset in timeline.composition_offsets() for n in (1, offset)))
    yield _table(b"stss", len(timeline.keyframes), *(place + 1 for place in timeline.keyframes))
    yield _table(b"stsc", 1, 1, count, 1)
    yield _table(b"stsz", 0, count, *sizes)
    yield _table(b"stco", 1, 0)


def _sample_description(stream: StreamFacts) -> bytes:
    kind, record = _ENTRIES[stream.codec]
    resolution, frames_per_sample, depth, no_color_table = 72 << 16, 1, 24, 0xFFFF
    entry = struct.pack(
        ">6xH16xHHII4xH32xHH",
        *(1, stream.width, stream.height, resolution, resolution, frames_per_sample, depth, no_color_table),
    )
    return _full_box(b"stsd", b"\0\0\0\1", _box(kind, entry, _box(record, stream.extradata) if record else b""))


_FILE_TYPE = _box(b"ftyp", b"isom\0\0\0\0isom")
_HANDLER = _full_box(b"hdlr", bytes(4), b"vide", bytes(13))
_VIDEO_HEADER = _full_box(b"vmhd", bytes(8), flags=1)
_DATA_HERE = _box(b"dinf", _full_box(b"dref", b"\0\0\0\1", _full_box(b"url ", flags=1)))
