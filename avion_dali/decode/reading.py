"""Reads the wanted frames of one chunk, in three ways that decode different amounts but return equal frames."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain

from av.packet import Packet, PacketSideData
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame

from avion_dali.contracts import ClipPart
from avion_dali.data.bitstream import Entry
from avion_dali.data.delivery import decode_strictly
from avion_dali.data.indexing import INDEXED_CODECS, STRICT, make_decoder, make_packet
from avion_dali.data.packet_index import StreamFacts
from avion_dali.decode.packets import spanning_run
from avion_dali.decode.source import (
    ChunkDamagedError,
    RunPackets,
    UnorderedStreamError,
    damage_as_decode_error,
    gather_packets,
    opened,
    read_table,
)

# A decoder keeps parameter sets, so creating one costs more than flushing it. The chunks of a data set have few
# different settings.
reused_decoder = lru_cache(maxsize=8)(make_decoder)
_NEW_EXTRADATA = 1  # AV_PKT_DATA_NEW_EXTRADATA


def read_planned(part: ClipPart) -> list[VideoFrame]:
    """Decode only the packets that the wanted frames need (the packet plan).

    Args:
        part: the chunk and its wanted frames.

    Returns:
        One decoded frame per frame id, in the same order.

    Raises:
        DecodeError: when the file is missing, changed or corrupt.
    """
    try:
        packets = gather_packets(part, decoder="cpu-fused")
    except UnorderedStreamError:
        return _read_by_counting(part, "cpu-fused")
    if packets.stream.codec not in INDEXED_CODECS:
        # Its decoder needs more than a packet index contains (pixel format, bits per sample, the codec tag).
        return _read_span(part, "cpu-fused")
    found: dict[int, VideoFrame] = {}
    with damage_as_decode_error(part, decoder="cpu-fused"):
        for run in packets.runs:
            found |= _decode_run(packets.stream, run)
        return _in_order(part, found, chain.from_iterable(run.wanted for run in packets.runs))


def read_spanned(part: ClipPart) -> list[VideoFrame]:
    """Decode everything from the keyframe before the first wanted frame to the last wanted frame.

    This is the method of AVION's fused reader (arXiv 2309.16669, section 4.1 and appendix A).

    Args:
        part: the chunk and its wanted frames.

    Returns:
        One decoded frame per frame id, in the same order.

    Raises:
        DecodeError: when the file is missing, changed or corrupt.
    """
    try:
        return _read_span(part, "paper-fused")
    except UnorderedStreamError:
        return _read_by_counting(part, "paper-fused")


def _read_span(part: ClipPart, decoder: str) -> list[VideoFrame]:
    """Decode everything between the wanted frames with the decoder that the container configures."""
    with opened(part, decoder=decoder) as (container, stream):
        table, packets = read_table(part, container, stream=stream)
        run = spanning_run(table, part.frame_ids)
        if table.entry[run.positions[0]] == Entry.CLEAN:
            stream.codec_context.options = STRICT
        wanted = table.pts[list(run.wanted)].tolist()
        found = _decode(stream.codec_context, (packets[p] for p in run.positions), wanted)
        return _in_order(part, found, sorted(wanted))


def read_everything(part: ClipPart) -> list[VideoFrame]:
    """Decode the file from its beginning and count frames: the reference for the other two functions.

    Args:
        part: the chunk and its wanted frames.

    Returns:
        One decoded frame per frame id, in the same order.

    Raises:
        DecodeError: when the file is missing, changed or corrupt.
    """
    return _read_by_counting(part, "reference")


def _decode_run(stream: StreamFacts, run: RunPackets) -> dict[int, VideoFrame]:
    decoder = reused_decoder(stream, strict=run.clean)
    found = _decode(decoder, _packets(run, stream.extradata), run.wanted)
    decoder.flush_buffers()
    return found


def _packets(run: RunPackets, extradata: bytes) -> Iterator[Packet]:
    for i, (payload, pts) in enumerate(zip(run.payloads, run.pts, strict=True)):
        packet = make_packet(payload, pts)
        packet.is_keyframe = i == 0  # PNG's decoder adds the previous picture to a packet that is no keyframe
        if i == 0 and extradata:
            # A previous run may have contained other parameter sets, which a flush does not discard.
            packet.set_sidedata(_parameter_sets(extradata))
        yield packet


@lru_cache(maxsize=8)
def _parameter_sets(extradata: bytes) -> PacketSideData:
    data = PacketSideData(_NEW_EXTRADATA, len(extradata))  # type: ignore[call-arg]
    memoryview(data).cast("B")[:] = extradata
    return data


def _decode(
    decoder: VideoCodecContext, packets: Iterable[Packet], wanted: Iterable[int]
) -> dict[int, VideoFrame]:
    """Feed packets, drain the decoder, and return the wanted frames by presentation time."""
    kept = set(wanted)
    decoded = chain.from_iterable(decoder.decode(packet) for packet in chain(packets, [None]))
    return {frame.pts: frame for frame in decoded if frame.pts in kept}


def _in_order(part: ClipPart, found: dict[int, VideoFrame], wanted: Iterable[int]) -> list[VideoFrame]:
    return _alike(part, [_sound(i, found.get(pts)) for i, pts in zip(part.frame_ids, wanted, strict=True)])


def _read_by_counting(part: ClipPart, decoder: str) -> list[VideoFrame]:
    wanted, frames = set(part.frame_ids), []
    with opened(part, decoder=decoder) as (container, stream):
        for index, frame in enumerate(decode_strictly(container, stream)):
            if index in wanted:
                frames.append(_sound(index, frame))
            if index == part.frame_ids[-1]:
                return _alike(part, frames)
        raise ChunkDamagedError(f"frame {part.frame_ids[len(frames)]} could not be decoded")


def _sound(frame_id: int, frame: VideoFrame | None) -> VideoFrame:
    """Return the frame if the decoder delivered it without damage."""
    if frame is None or frame.is_corrupt:
        state = "was not delivered by" if frame is None else "is marked as damaged by"
        raise ChunkDamagedError(f"frame {frame_id} {state} the decoder")
    return frame


def _alike(part: ClipPart, frames: list[VideoFrame]) -> list[VideoFrame]:
    """Return the frames if one filter graph can process all of them; otherwise it would read past their end."""
    expected = (part.chunk.width, part.chunk.height, frames[0].format.name)
    for frame_id, frame in zip(part.frame_ids, frames, strict=True):
        picture = (frame.width, frame.height, frame.format.name)
        if picture != expected:
            found, wanted = ("{}x{} {}".format(*facts) for facts in (picture, expected))
            raise ChunkDamagedError(f"frame {frame_id} is {found}, not {wanted}; chunk the video again")
    return frames
