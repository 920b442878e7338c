"""Read the wanted frames of one chunk: three ways that differ in how much they decode, not in the frames."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice

from av.container import InputContainer
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from avion_dali.contracts import ClipPart, DecodeError
from avion_dali.data.probe import open_video
from avion_dali.decode.packets import (
    PacketTable,
    Run,
    UnorderedStreamError,
    begins_inside_open_gop,
    drop_unneeded,
    droppable_packets,
    plan_runs,
    read_packets,
    spanning_run,
)

PlanRuns = Callable[[PacketTable, Sequence[int], VideoStream], list[Run]]

# Damaged slices are an error, not something to paint over.
_STRICT = {"err_detect": "explode"}


class _UnreadableError(ValueError):
    """The chunk cannot give the wanted frames; the message says why."""


def read_planned(part: ClipPart) -> list[VideoFrame]:
    """Decode only the packets the wanted frames need (the packet plan).

    Args:
        part: the chunk and its wanted frames.

    Returns:
        One decoded frame for each id, in order.

    Raises:
        DecodeError: when the file is missing, changed or corrupt.
    """
    return _read_runs(part, "cpu-fused", _needed_runs)


def read_spanned(part: ClipPart) -> list[VideoFrame]:
    """Decode everything from the keyframe before the first wanted frame to the last wanted frame.

    This is what AVION's fused reader does (arXiv 2309.16669, section 4.1 and appendix A).

    Args:
        part: the chunk and its wanted frames.

    Returns:
        One decoded frame for each id, in order.

    Raises:
        DecodeError: when the file is missing, changed or corrupt.
    """
    return _read_runs(part, "paper-fused", lambda table, ids, _: [spanning_run(table, ids)])


def read_everything(part: ClipPart) -> list[VideoFrame]:
    """Decode the file from its beginning and count frames: the yardstick for the other two.

    Args:
        part: the chunk and its wanted frames.

    Returns:
        One decoded frame for each id, in order.

    Raises:
        DecodeError: when the file is missing, changed or corrupt.
    """
    with _opened(part, "reference") as (container, stream):
        return _pick(part, container, stream)


def _read_runs(part: ClipPart, decoder: str, plan: PlanRuns) -> list[VideoFrame]:
    with _opened(part, decoder) as (container, stream):
        try:
            table = _packet_table(part, container.demux(stream))
        except UnorderedStreamError:
            return _pick(part, container, stream)
        return _decode_runs(part, stream, table, plan(table, part.frame_ids, stream))


def _needed_runs(table: PacketTable, frame_ids: Sequence[int], stream: VideoStream) -> list[Run]:
    runs = plan_runs(table, frame_ids)
    droppable = droppable_packets(table, runs, stream)
    return runs if droppable is None else drop_unneeded(runs, droppable)


@contextmanager
def _opened(part: ClipPart, decoder: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open the part's chunk if it is still the file that the manifest describes."""
    chunk, ids = part.chunk, part.frame_ids
    try:
        with open_video(chunk.path, decoder=decoder, frame_ids=ids) as (container, stream):
            size = os.path.getsize(chunk.path)
            context = stream.codec_context
            if (size, context.width, context.height) != (chunk.size_bytes, chunk.width, chunk.height):
                cause = (
                    f"is {context.width}x{context.height} and {size} bytes, the manifest says "
                    f"{chunk.width}x{chunk.height} and {chunk.size_bytes}; build the manifest again"
                )
                raise DecodeError(chunk.path, ids, decoder=decoder, kind="changed", cause=cause)
            context.options = _STRICT
            yield container, stream
    except _UnreadableError as error:
        raise DecodeError(chunk.path, ids, decoder=decoder, kind="corrupt", cause=str(error)) from error


def _packet_table(part: ClipPart, packets: Iterable[Packet]) -> PacketTable:
    table = read_packets(packets, part.frame_ids[-1])
    if len(table.order) <= part.frame_ids[-1]:
        raise _UnreadableError(f"ends after {len(table.order)} frames of {part.chunk.num_frames}")
    return table


def _decode_runs(part: ClipPart, stream: VideoStream, table: PacketTable, runs: list[Run]) -> list[VideoFrame]:
    context = stream.codec_context
    if begins_inside_open_gop((table.packets[run.positions[0]] for run in runs), stream):
        context.options = {}
    found: dict[int, VideoFrame] = {}
    for run in runs:
        found |= _decode_run(context, table, run)
    frames = [found.get(int(table.pts[p])) for p in table.order[list(part.frame_ids)]]
    return [_sound(i, f) for i, f in zip(part.frame_ids, frames, strict=True)]


def _decode_run(context: VideoCodecContext, table: PacketTable, run: Run) -> dict[int, VideoFrame]:
    """Feed a run's packets, drain the decoder, and keep the wanted frames by presentation time."""
    wanted = {int(table.pts[p]) for p in run.wanted}
    fed = chain((table.packets[p] for p in run.positions), [None])
    decoded = chain.from_iterable(context.decode(packet) for packet in fed)
    kept = {frame.pts: frame for frame in decoded if frame.pts in wanted}
    context.flush_buffers()
    return kept


def _pick(part: ClipPart, container: InputContainer, stream: VideoStream) -> list[VideoFrame]:
    container.seek(0)
    first = (packet for packet in container.demux(stream) if packet.size and packet.is_keyframe)
    if begins_inside_open_gop(islice(first, 1), stream):
        stream.codec_context.options = {}
    container.seek(0)
    wanted, frames = set(part.frame_ids), []
    for index, frame in enumerate(container.decode(stream)):
        if index in wanted:
            frames.append(_sound(index, frame))
        if index == part.frame_ids[-1]:
            return frames
    raise _UnreadableError(f"frame {part.frame_ids[len(frames)]} could not be decoded")


def _sound(frame_id: int, frame: VideoFrame | None) -> VideoFrame:
    """Return the frame if the decoder delivered it undamaged."""
    if frame is None or frame.is_corrupt:
        state = "was not delivered by" if frame is None else "is marked damaged by"
        raise _UnreadableError(f"frame {frame_id} {state} the decoder")
    return frame
