"""From wanted frames to the coded packets they need: through the packet index, or else through the container.

What comes out decodes without the file: `cpu-fused` feeds it to a decoder, DALI gets it as a mini clip.
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
    """The packets of one run; a freshly flushed decoder gives its frames from them alone.

    Args:
        payloads: coded pictures in decode order, the first a keyframe.
        pts: one for each payload, in the order of presentation, different over the whole part.
        wanted: pts of the frames to keep, ascending.
        clean: the keyframe is an IDR picture, so a strict decoder has nothing to complain of.
    """

    payloads: tuple[bytes, ...]
    pts: tuple[int, ...]
    wanted: tuple[int, ...]
    clean: bool


@dataclass(frozen=True, slots=True)
class PartPackets:
    """The packets that the frames of one clip part need.

    Args:
        stream: what a decoder must be told.
        runs: in the order of presentation; their `wanted` together are the part's frames.
    """

    stream: StreamFacts
    runs: tuple[RunPackets, ...]


Packets = Sequence[Packet] | dict[int, bytes]  # payloads by decode position


class UnorderedStreamError(ValueError):
    """The container gives no usable presentation times, so frames can only be counted while decoding."""


class ChunkDamagedError(ValueError):
    """The chunk cannot give the wanted frames; the message says why."""


def gather_packets(part: ClipPart, *, decoder: str) -> PartPackets:
    """Read the packets a part needs, and no others.

    Args:
        part: the chunk and its wanted frames.
        decoder: name that errors carry.

    Raises:
        DecodeError: `missing`, `changed` when the file is not the one of the manifest, or `corrupt`.
        UnorderedStreamError: without an index, where the container tells no order (H.264 in AVI).
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
    """Read and check a run's packets."""
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
            raise ChunkDamagedError(f"its bytes from {offset} on are not those the manifest was built from")


def run_packets(run: PacketRun, table: PacketTable, *, packets: Packets) -> RunPackets:
    """Put the packets of a run together.

    Args:
        run: the plan.
        table: the packets it was planned over.
        packets: payload of a decode position.
    """
    return RunPackets(
        payloads=tuple(bytes(packets[p]) for p in run.positions),
        pts=tuple(table.pts[list(run.positions)].tolist()),
        wanted=tuple(sorted(table.pts[list(run.wanted)].tolist())),
        clean=bool(table.entry[run.positions[0]] == Entry.CLEAN),
    )


@contextmanager
def opened(part: ClipPart, *, decoder: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open the container of a part's chunk if it is still the file that the manifest describes.

    Args:
        part: the chunk and its wanted frames.
        decoder: name that errors carry.

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
    """Turn what a damaged chunk provokes inside the `with` block into a `DecodeError`.

    Args:
        part: the chunk and its wanted frames.
        decoder: name that errors carry.

    Raises:
        DecodeError: `missing` when the chunk cannot be opened, else `corrupt`.
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
    """Demux the beginning of a file, until all frames up to the last wanted one are known.

    Args:
        part: the chunk and its wanted frames.
        container: the open file, at its beginning.
        stream: its video stream.

    Returns:
        The table, in which only keyframes were looked into, and its packets.

    Raises:
        ChunkDamagedError: when the file ends before the last wanted frame, or a packet is cut short.
        UnorderedStreamError: when the packets do not tell which frames the decoder delivers.
    """
    if not is_plain(container, stream):
        raise UnorderedStreamError("its kind of packets does not tell its frames")
    # A generator, which its stub hides; left half-way it must be closed, or 150 bytes are lost.
    with closing(cast(Generator[Packet, None, None], container.demux(stream))) as demuxed:
        packets, pts, ended = _packets_until(demuxed, part.frame_ids[-1])
    if not packets:
        raise ChunkDamagedError("holds no frame")
    facts = stream_facts(stream)
    if not all(shows_picture(memoryview(packet), codec=facts.codec) for packet in packets):
        raise UnorderedStreamError("a packet shows no frame")
    reader = TraitsReader(facts)
    traits = [reader.read(packet) if packet.is_keyframe else _INNER for packet in packets]
    if not packets_tell(packets[0], traits[0], pts=pts, pix_fmt=stream.codec_context.pix_fmt or ""):
        raise UnorderedStreamError("its packets do not tell its frames")
    table = table_of(pts, traits, shown=[not packet.is_discard for packet in packets])
    # Cut in the middle of a reordered group, a file has frames, but lacks some that are shown before them.
    if ended and len(table.order) != part.chunk.num_frames:
        raise ChunkDamagedError(f"ends after {len(table.order)} frames of {part.chunk.num_frames}")
    return table, packets


_INNER = PictureTraits(Entry.NONE, is_reference=True, layer=0)


def _packets_until(demuxed: Iterable[Packet], last_frame_id: int) -> tuple[list[Packet], list[int], bool]:
    """Take packets, and their times, until `last_frame_id + 1` frames in presentation order are certain.

    The third thing returned tells whether the file ended before they were.
    """
    kept: list[Packet] = []
    times: list[int] = []
    visible: list[int] = []  # times of the frames a decoder delivers
    horizon = None
    for packet in _sound_packets(demuxed):
        if packet.pts is None:
            raise UnorderedStreamError("a packet carries no presentation time")
        # Decode times never decrease and no frame is shown before it is decoded: once they pass the
        # last wanted frame's time, no later packet can come before that frame.
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
    """Yield packets without the demuxer's end marker; they begin with a keyframe and follow in decode order."""
    decoded: int | None = None
    for number, (packet, is_damaged) in enumerate(with_damage(demuxed)):
        if not packet.size:
            continue
        if number == 0 and not packet.is_keyframe:
            raise UnorderedStreamError("it does not begin with a keyframe")
        if is_damaged:
            raise ChunkDamagedError("holds a damaged packet")
        if decoded is not None and packet.dts is not None and packet.dts < decoded:
            raise UnorderedStreamError("its times go back")
        if changes_settings(packet):
            raise UnorderedStreamError("its settings change on the way")
        decoded = packet.dts
        yield packet


def _with_references(
    table: PacketTable, runs: Sequence[PacketRun], *, packets: Sequence[Packet], stream: StreamFacts
) -> PacketTable:
    """Look into the packets of some runs for what may be dropped of them."""
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
