"""The packet plan: which coded packets a set of frames needs, and no others.

A file's packets come in decode order. A wanted frame needs its GOP from the keyframe on, up to its own
packet; packets of frames that nobody references and nobody wants are left out. Decoding such a run gives
the same frames, bit for bit, as decoding the whole file.

DALI's mini clips are made of the same runs, so this module knows nothing of pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from av.packet import Packet
from av.video.stream import VideoStream


@dataclass(frozen=True, slots=True)
class PacketTable:
    """The packets of a file, or of its beginning, in decode order.

    Args:
        packets: the coded packets.
        pts: int64 (P,) presentation times in ticks of the stream's time base, all different.
        keyframe: bool (P,), decoding can start here.
        order: int64 (F,), decode position of the f-th frame in presentation order. Frames that an edit list
            hides, or that nobody can decode, are no frames.
    """

    packets: Sequence[Packet]
    pts: np.ndarray
    keyframe: np.ndarray
    order: np.ndarray


@dataclass(frozen=True, slots=True)
class Run:
    """Packets to feed to a freshly flushed decoder, then drain.

    Args:
        positions: decode positions of the packets, ascending, the first a keyframe.
        wanted: decode positions whose frames are kept, ascending.
    """

    positions: tuple[int, ...]
    wanted: tuple[int, ...]


class UnorderedStreamError(ValueError):
    """The container gives no usable presentation times, so frames can only be counted while decoding."""


def read_packets(packets: Iterable[Packet], last_frame_id: int) -> PacketTable:
    """Read packets until the first `last_frame_id + 1` frames in presentation order are certain.

    Args:
        packets: a demuxer's packets of one stream, in decode order.
        last_frame_id: highest frame id wanted.

    Raises:
        UnorderedStreamError: when packets lack presentation times or share them (H.264 in AVI).
    """
    kept: list[Packet] = []
    times: list[int] = []
    shown: list[int] = []  # positions of the packets whose frames a decoder delivers
    visible: list[int] = []  # and their times
    horizon, first_key = None, None
    for packet in packets:
        if not packet.size:  # the demuxer's end marker
            continue
        if packet.pts is None:
            raise UnorderedStreamError("a packet carries no presentation time")
        # Decode times never decrease and no frame is shown before it is decoded: once they pass the
        # last wanted frame's time, no later packet can come before that frame.
        if horizon is not None and packet.dts is not None and packet.dts > horizon:
            break
        kept.append(packet)
        times.append(packet.pts)
        if first_key is None and packet.is_keyframe:
            first_key = packet.pts
        # Frames that precede the first keyframe in either order cannot be decoded by anybody.
        if first_key is None or packet.pts < first_key or packet.is_discard:
            continue
        shown.append(len(kept) - 1)
        visible.append(packet.pts)
        if len(visible) > last_frame_id and (horizon is None or packet.pts < horizon):
            horizon = sorted(visible)[last_frame_id]
    pts = np.array(times, dtype=np.int64)
    if len(set(times)) != len(times):
        raise UnorderedStreamError("packets share presentation times")
    keyframe = np.array([p.is_keyframe for p in kept], dtype=bool)
    order = np.array(shown, dtype=np.int64)
    return PacketTable(kept, pts, keyframe, order[np.argsort(pts[order])])


def plan_runs(table: PacketTable, frame_ids: Sequence[int]) -> list[Run]:
    """Choose the packets that a set of frames needs.

    A frame's run starts at the last keyframe that comes no later than the frame in decode order and in
    presentation order: in an open GOP the frames shown before their keyframe lean on the GOP before.

    Args:
        table: the file's packets.
        frame_ids: strictly increasing ids, each below `len(table.order)`.

    Returns:
        Runs in decode order; together their `wanted` are the frames asked for, each once.
    """
    keys = np.flatnonzero(table.keyframe)
    starts = []
    for position in table.order[np.asarray(frame_ids, dtype=np.int64)].tolist():
        usable = keys[(keys <= position) & (table.pts[keys] <= table.pts[position])]
        starts.append((int(usable[-1]), position))
    groups: list[tuple[int, list[int]]] = []
    for start, position in sorted(starts):
        if groups and start <= max(groups[-1][1]):
            groups[-1][1].append(position)  # the run before passes this keyframe anyway
        else:
            groups.append((start, [position]))
    runs = []
    for start, members in groups:
        positions = np.arange(start, max(members) + 1)
        # Frames shown before the run's keyframe lean on the GOP before it; nothing after leans on them.
        positions = positions[table.pts[positions] >= table.pts[start]]
        runs.append(Run(tuple(positions.tolist()), tuple(sorted(members))))
    return runs


def drop_unneeded(runs: Sequence[Run], droppable: np.ndarray) -> list[Run]:
    """Leave out the packets that nobody references and nobody wants.

    Args:
        runs: planned runs.
        droppable: bool (P,), True for packets that no other packet references.
    """
    return [
        Run(tuple(p for p in run.positions if not droppable[p] or p in run.wanted), run.wanted) for run in runs
    ]


def spanning_run(table: PacketTable, frame_ids: Sequence[int]) -> Run:
    """Return one run from the first wanted frame's keyframe to the last wanted frame, dropping nothing."""
    runs = plan_runs(table, frame_ids)
    positions = range(runs[0].positions[0], runs[-1].positions[-1] + 1)
    return Run(tuple(positions), tuple(p for run in runs for p in run.wanted))


def droppable_packets(table: PacketTable, runs: Sequence[Run], stream: VideoStream) -> np.ndarray | None:
    """Find the packets of these runs that no other packet references.

    For H.264 those of `nal_ref_idc == 0` (ITU-T H.264, section 7.4.1: all slices of a picture agree in
    whether it is zero).

    Args:
        table: the file's packets.
        runs: runs planned without dropping; only their packets are looked at.
        stream: the stream they belong to.

    Returns:
        bool (P,), or None for codecs where this is not told by the packet (all packets are then kept).
    """
    if stream.codec_context.codec.canonical_name != "h264":
        return None
    length_size = avcc_length_size(stream)
    droppable = np.zeros(len(table.packets), dtype=bool)
    for run in runs:
        for position in run.positions:
            header = h264_slice_header(memoryview(table.packets[position]), length_size)
            droppable[position] = header is not None and not header & 0x60
    return droppable


def begins_inside_open_gop(keyframes: Iterable[Packet], stream: VideoStream) -> bool:
    """Tell whether decoding starts at an H.264 keyframe that is no IDR picture.

    Such a run decodes exactly, but the decoder notes that earlier frames are absent, which it would call
    an error when asked to be strict.

    Args:
        keyframes: the packets that decoding starts at.
        stream: the stream they belong to.
    """
    if stream.codec_context.codec.canonical_name != "h264":
        return False
    length_size = avcc_length_size(stream)
    headers = (h264_slice_header(memoryview(packet), length_size) for packet in keyframes)
    return any(header is not None and header & 0x1F != 5 for header in headers)


def avcc_length_size(stream: VideoStream) -> int:
    """Return the byte count of NAL lengths in MP4-style H.264, or 0 for start codes (Annex B).

    Args:
        stream: an H.264 stream.
    """
    extradata = stream.codec_context.extradata or b""
    return (extradata[4] & 3) + 1 if len(extradata) > 4 and extradata[0] == 1 else 0


def h264_slice_header(data: memoryview, length_size: int) -> int | None:
    """Return the NAL header byte of a coded H.264 picture's first slice, or None when it has none.

    Args:
        data: the packet's bytes.
        length_size: bytes of each NAL unit's length prefix; 0 when units are parted by start codes.
    """
    return next((h for h in _nal_headers(data, length_size) if 1 <= h & 0x1F <= 5), None)


def _nal_headers(data: memoryview, length_size: int) -> Iterable[int]:
    if not length_size:
        raw = bytes(data)
        start = raw.find(b"\0\0\1")
        while 0 <= start < len(raw) - 3:
            yield raw[start + 3]
            start = raw.find(b"\0\0\1", start + 3)
        return
    offset = 0
    while offset + length_size < len(data):
        yield data[offset + length_size]
        offset += length_size + int.from_bytes(data[offset : offset + length_size], "big")
