"""Reads the coded packets that frames need, through the packet index or, without one, through the container.

The result can be decoded without the file: `cpu-fused` feeds it to a decoder, DALI receives it as a mini clip.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import cast

import av
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from avion_dali.contracts import ClipPart, DecodeError
from avion_dali.data.bitstream import Entry, PictureTraits, nal_length_size, picture_traits, shows_picture
from avion_dali.data.delivery import with_damage
from avion_dali.data.indexing import TraitsReader, changes_settings, is_plain, packets_tell, stream_facts
from avion_dali.data.packet_index import (
    PacketPlaces,
    PacketTable,
    StreamFacts,
    table_of,
)
from avion_dali.data.probe import open_video
from avion_dali.decode.packets import PacketRun, drop_unneeded, plan_runs
from avion_dali.decode.planned_reads import RunReads, planned_reads


@dataclass(frozen=True, slots=True)
class RunPackets:
    """The packets of one run, from which a freshly flushed decoder decodes its frames.

    Args:
        payloads: coded pictures in decode order; the first is a keyframe.
        pts: presentation time of each payload; unique and increasing in presentation order within the part.
        wanted: pts of the frames to keep, ascending.
        clean: whether the keyframe is an IDR picture, so that a strict decoder accepts the run.
    """

    payloads: tuple[bytes, ...]
    pts: tuple[int, ...]
    wanted: tuple[int, ...]
    clean: bool


@dataclass(frozen=True, slots=True)
class PartPackets:
    """The packets that the frames of one clip part need.

    Args:
        stream: properties of the stream that a decoder needs.
        runs: the runs in presentation order; together, their `wanted` are the frames of the part.
    """

    stream: StreamFacts
    runs: tuple[RunPackets, ...]


Packets = Sequence[Packet] | dict[int, bytes]  # payloads by decode position


class UnorderedStreamError(ValueError):
    """The container has no usable presentation times, so frames can only be counted while decoding."""


class ChunkDamagedError(ValueError):
    """The wanted frames of a chunk cannot be decoded; the message states the reason."""


def gather_packets(part: ClipPart, *, decoder: str) -> PartPackets:
    """Read only the packets that a part needs.

    Args:
        part: the chunk and its wanted frames.
        decoder: name of the decoder in errors.

    Raises:
        DecodeError: `missing`, `changed` when the file is not that of the manifest, or `corrupt`.
        UnorderedStreamError: when there is no index and the container defines no order (H.264 in AVI).
    """
    if part.chunk.index is not None:
        return _gather_indexed(part, decoder)
    with opened(part, decoder=decoder) as (container, stream):
        facts = stream_facts(stream)
        table, packets = read_table(part, container, stream=stream)
        runs = plan_runs(table, part.frame_ids)
        runs = drop_unneeded(runs, _with_references(table, runs, packets=packets, stream=facts))
        return PartPackets(facts, tuple(run_packets(run, table, packets=packets) for run in runs))


def _gather_indexed(part: ClipPart, decoder: str) -> PartPackets:
    planned = planned_reads(part, decoder=decoder)
    with damage_as_decode_error(part, decoder=decoder), open(part.chunk.path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size != part.chunk.size_bytes:
            cause = f"has {size} bytes, the manifest says {part.chunk.size_bytes}; build the manifest again"
            raise DecodeError(part.chunk.path, part.frame_ids, decoder=decoder, kind="changed", cause=cause)
        return PartPackets(planned.stream, tuple(_read_run(file.fileno(), run) for run in planned.runs))


def _read_run(file: int, planned: RunReads) -> RunPackets:
    """Read the packets of a run and check their checksums."""
    payloads: list[bytes] = []
    for wanted in planned.ranges:
        data, end = os.pread(file, wanted.num_bytes, wanted.offset), 0
        for size in wanted.sizes:
            payloads.append(data[end : end + size])
            end += size
    positions = planned.run.positions
    _check(payloads, planned.block.places, positions)
    return run_packets(planned.run, planned.block.table, packets=dict(zip(positions, payloads, strict=True)))


def _check(payloads: Sequence[bytes], places: PacketPlaces, positions: Sequence[int]) -> None:
    for payload, position in zip(payloads, positions, strict=True):
        if zlib.crc32(payload) != places.crc[position]:
            offset = places.offset[position]
            raise ChunkDamagedError(f"its bytes from {offset} on differ from those of the manifest")


def run_packets(run: PacketRun, table: PacketTable, *, packets: Packets) -> RunPackets:
    """Collect the packets of a run.

    Args:
        run: the plan.
        table: the packets for which the run was planned.
        packets: payloads by decode position.
    """
    return RunPackets(
        payloads=tuple(bytes(packets[p]) for p in run.positions),
        pts=tuple(table.pts[list(run.positions)].tolist()),
        wanted=tuple(sorted(table.pts[list(run.wanted)].tolist())),
        clean=bool(table.entry[run.positions[0]] == Entry.CLEAN),
    )


@contextmanager
def opened(part: ClipPart, *, decoder: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open the container of a part's chunk, if it is still the file that the manifest describes.

    Args:
        part: the chunk and its wanted frames.
        decoder: name of the decoder in errors.

    Yields:
        The open container and its video stream.

    Raises:
        DecodeError: also for a `ChunkDamagedError` inside the `with` block.
    """
    chunk, ids = part.chunk, part.frame_ids
    video = open_video(chunk.path, decoder=decoder, frame_ids=ids)
    with damage_as_decode_error(part, decoder=decoder), video as (container, stream):
        size = os.path.getsize(chunk.path)
        context = stream.codec_context
        if (size, context.width, context.height) != (chunk.size_bytes, chunk.width, chunk.height):
            cause = (
                f"is {context.width}x{context.height} and {size} bytes, the manifest says "
                f"{chunk.width}x{chunk.height} and {chunk.size_bytes}; build the manifest again"
            )
            raise DecodeError(chunk.path, ids, decoder=decoder, kind="changed", cause=cause)
        yield container, stream


@contextmanager
def damage_as_decode_error(part: ClipPart, *, decoder: str) -> Iterator[None]:
    """Convert errors that a damaged chunk causes inside the `with` block to a `DecodeError`.

    Args:
        part: the chunk and its wanted frames.
        decoder: name of the decoder in errors.

    Raises:
        DecodeError: `missing` when the chunk cannot be opened, otherwise `corrupt`.
    """
    try:
        yield
    except (ChunkDamagedError, av.FFmpegError, OSError) as error:
        gone = isinstance(error, (FileNotFoundError, PermissionError, NotADirectoryError))
        cause = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DecodeError(
            part.chunk.path,
            part.frame_ids,
            decoder=decoder,
            kind="missing" if gone else "corrupt",
            cause=cause,
        ) from error


def read_table(
    part: ClipPart, container: InputContainer, *, stream: VideoStream
) -> tuple[PacketTable, Sequence[Packet]]:
    """Demux a file from its beginning until all frames up to the last wanted one are known.

    Args:
        part: the chunk and its wanted frames.
        container: the open file, at its beginning.
        stream: its video stream.

    Returns:
        The table, for which only the contents of keyframes were parsed, and its packets.

    Raises:
        ChunkDamagedError: when the file ends before the last wanted frame, or a packet is truncated.
        UnorderedStreamError: when the packets do not determine which frames the decoder delivers.
    """
    if not is_plain(container, stream):
        raise UnorderedStreamError("its kind of packets does not determine its frames")
    # A generator, although its stub says otherwise; if it is not closed when left early, 150 bytes are leaked.
    with closing(cast(Generator[Packet, None, None], container.demux(stream))) as demuxed:
        packets, pts, ended = _packets_until(demuxed, part.frame_ids[-1])
    if not packets:
        raise ChunkDamagedError("contains no frame")
    facts = stream_facts(stream)
    if not all(shows_picture(memoryview(packet), codec=facts.codec) for packet in packets):
        raise UnorderedStreamError("a packet shows no frame")
    reader = TraitsReader(facts)
    traits = [reader.read(packet) if packet.is_keyframe else _INNER for packet in packets]
    if not packets_tell(packets[0], traits[0], pts=pts, pix_fmt=stream.codec_context.pix_fmt or ""):
        raise UnorderedStreamError("its packets do not determine its frames")
    table = table_of(pts, traits, shown=[not packet.is_discard for packet in packets])
    # A file that is truncated within a reordered group misses frames that are shown before its last frames.
    if ended and len(table.order) != part.chunk.num_frames:
        raise ChunkDamagedError(f"ends after {len(table.order)} frames of {part.chunk.num_frames}")
    return table, packets


_INNER = PictureTraits(Entry.NONE, is_reference=True, layer=0)


def _packets_until(demuxed: Iterable[Packet], last_frame_id: int) -> tuple[list[Packet], list[int], bool]:
    """Take packets and their times until the first `last_frame_id + 1` frames in presentation order are known.

    The third returned value tells whether the file ended before that.
    """
    kept: list[Packet] = []
    times: list[int] = []
    visible: list[int] = []  # times of the frames that a decoder delivers
    horizon = None
    for packet in _sound_packets(demuxed):
        if packet.pts is None:
            raise UnorderedStreamError("a packet has no presentation time")
        # Decode times never decrease, and no frame is shown before it is decoded: once the decode time exceeds
        # the time of the last wanted frame, no later packet can precede that frame.
        if horizon is not None and packet.dts is not None and packet.dts > horizon:
            return kept, times, False
        kept.append(packet)
        times.append(packet.pts)
        if packet.is_discard or packet.pts < times[0]:
            continue
        visible.append(packet.pts)
        if len(visible) > last_frame_id and (horizon is None or packet.pts < horizon):
            horizon = sorted(visible)[last_frame_id]
    return kept, times, True


def _sound_packets(demuxed: Iterable[Packet]) -> Iterator[Packet]:
    """Yield packets without the demuxer's end marker; check that they start at a keyframe, in decode order."""
    decoded: int | None = None
    for number, (packet, is_damaged) in enumerate(with_damage(demuxed)):
        if not packet.size:
            continue
        if number == 0 and not packet.is_keyframe:
            raise UnorderedStreamError("it does not begin with a keyframe")
        if is_damaged:
            raise ChunkDamagedError("contains a damaged packet")
        if decoded is not None and packet.dts is not None and packet.dts < decoded:
            raise UnorderedStreamError("its times decrease")
        if changes_settings(packet):
            raise UnorderedStreamError("its settings change within the stream")
        decoded = packet.dts
        yield packet


def _with_references(
    table: PacketTable, runs: Sequence[PacketRun], *, packets: Sequence[Packet], stream: StreamFacts
) -> PacketTable:
    """Parse the packets of some runs to find out which of them may be dropped."""
    is_reference, layer = table.is_reference.copy(), table.layer.copy()
    for position in (p for run in runs for p in run.positions):
        traits = _packet_traits(packets[position], stream)
        is_reference[position], layer[position] = traits.is_reference, traits.layer
    return replace(table, is_reference=is_reference, layer=layer)


def _packet_traits(packet: Packet, stream: StreamFacts) -> PictureTraits:
    length_size = nal_length_size(stream.codec, stream.extradata)
    return picture_traits(
        bytes(packet), codec=stream.codec, length_size=length_size, is_keyframe=packet.is_keyframe
    )
