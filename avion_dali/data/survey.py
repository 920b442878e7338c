"""Reads all packets of a file: which pictures they indicate, and whether the decoder delivers exactly these.

This module runs in probing workers, so it imports only numpy and PyAV.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from avion_dali.contracts import DecodeError
from avion_dali.data.bitstream import shows_picture
from avion_dali.data.delivery import with_damage
from avion_dali.data.indexing import (
    PacketCollector,
    TraitsReader,
    is_plain,
    make_packet,
    packets_tell,
    stream_facts,
)


@dataclass(frozen=True, slots=True)
class PacketSurvey:
    """Information from the packets of a file.

    Args:
        shown: int64 (F,), sorted presentation times in ticks of the pictures that the packets indicate.
        decoding: int64 (F,), decoding times of these packets if all have one; otherwise empty.
        last_duration: ticks for which the last picture is shown, 0 if the container does not state it.
        last_decoded_duration: the same for the picture that is decoded last.
        first_picture: the first keyframe, decoded separately; None if this fails.
        tells: whether the decoder delivers exactly the pictures that the packets indicate.
    """

    shown: np.ndarray
    decoding: np.ndarray
    last_duration: int
    last_decoded_duration: int
    first_picture: VideoFrame | None
    tells: bool


class _Row(NamedTuple):
    pts: int | None
    dts: int | None
    duration: int
    is_shown: bool


def survey_packets(
    container: InputContainer,
    stream: VideoStream,
    *,
    collector: PacketCollector | None,
    name: str,
    tolerant: bool,
) -> PacketSurvey:
    """Read the packets of a file that was just opened.

    Args:
        container: the open file.
        stream: its video stream.
        collector: receives the packets from the first keyframe on, for an index.
        name: name of the file in errors.
        tolerant: whether to ignore damage.

    Returns:
        The information from the packets.

    Raises:
        DecodeError: `corrupt` when a packet is damaged and `tolerant` is False.
    """
    codec = stream.codec_context.codec.canonical_name
    rows: list[_Row] = []
    first: Packet | None = None
    picture: VideoFrame | None = None
    tells = is_plain(container, stream)
    for packet in _packets(container, stream, name=name, tolerant=tolerant):
        if first is None and not packet.is_keyframe:
            tells = False  # some decoders deliver pictures from before the first keyframe
            continue
        if first is None:
            first, picture = packet, _decode_alone(stream, packet)
        if collector is not None:
            collector.add(packet)
        shows = shows_picture(memoryview(packet), codec=codec)
        tells = tells and shows
        rows.append(_Row(packet.pts, packet.dts, packet.duration or 0, shows and not packet.is_discard))
    tells = tells and first is not None and _settled(stream, first, rows=rows)
    return _summary(rows, picture, tells=tells)


def _packets(container: InputContainer, stream: VideoStream, *, name: str, tolerant: bool) -> Iterator[Packet]:
    """Yield packets except empty ones: the end marker, and repeated frames of an AVI file."""
    try:
        for packet, is_damaged in with_damage(container.demux(stream)):
            if is_damaged and not tolerant:
                raise DecodeError(name, (), decoder="probe", kind="corrupt", cause="contains a damaged packet")
            if packet.size:
                yield packet
    except av.FFmpegError:
        if not tolerant:
            raise


def _settled(stream: VideoStream, first: Packet, *, rows: list[_Row]) -> bool:
    traits = TraitsReader(stream_facts(stream)).read(first)
    pts = [row.pts for row in rows]
    dts = [row.dts for row in rows if row.dts is not None]
    ascending = all(a <= b for a, b in zip(dts, dts[1:], strict=False))  # False if recordings were joined
    return ascending and packets_tell(first, traits, pts=pts, pix_fmt=stream.codec_context.pix_fmt or "")


def _summary(rows: list[_Row], picture: VideoFrame | None, *, tells: bool) -> PacketSurvey:
    rows = [row for row in rows if row.is_shown]
    shown = [row.pts for row in rows if row.pts is not None]
    decoding = [row.dts for row in rows if row.dts is not None]
    last = max(rows, key=lambda row: row.pts or 0).duration if len(shown) == len(rows) and rows else 0
    return PacketSurvey(
        shown=np.sort(np.array(shown, dtype=np.int64)),
        decoding=np.array(decoding if len(decoding) == len(rows) else [], dtype=np.int64),
        last_duration=last,
        last_decoded_duration=rows[-1].duration if rows else 0,
        first_picture=picture,
        tells=tells,
    )


def _decode_alone(stream: VideoStream, keyframe: Packet) -> VideoFrame | None:
    """Decode a keyframe separately, for properties that PyAV provides only on decoded frames."""
    # A plain copy of the packet: with its flags, a keyframe that an edit list hides would give no frame.
    context = stream.codec_context
    try:
        frames = [*context.decode(make_packet(bytes(keyframe), 0)), *context.decode(None)]
    except av.FFmpegError:
        return None
    return frames[0] if frames else None
