"""Frames that an AVI file lost with their packets.

AVI states no times: a packet's place in the stream is its time. If packets are lost, all later ones appear too
early, unless the index at the end of the file says which ones are missing.

This module runs in probing and chunking workers, so it imports only numpy and PyAV.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import av
from av.container import InputContainer
from av.video.stream import VideoStream

from avion_dali.data.container_limits import ByteSpan
from avion_dali.data.declared import MAX_MISSING_SECONDS

_SEARCHED_BYTES = 64 << 20  # the index of about 40 hours is this long, with as many chunks of sound
_ENTRY_BYTES = 16
_MOST_PER_PACKET = 100  # frames that a header may state for each packet of a truncated file


class PacketPlace(NamedTuple):
    """Position of a packet in its file, and its size, both in bytes."""

    position: int
    size: int


@dataclass(frozen=True, slots=True)
class AviFrames:
    """Which frames of an AVI file are there.

    Args:
        numbers: number of each packet's frame in decode order, by the packet's position; packets that the index
            does not contain are missing.
        gaps: numbers before which packets are lost.
        total: number of frames, those that are lost included.
        is_timed: whether an index confirms the numbers; otherwise those after damage are unknown.
    """

    numbers: dict[int, int]
    gaps: frozenset[int]
    total: int
    is_timed: bool = True


def find_avi_frames(
    path: str | os.PathLike[str], container: InputContainer, stream: VideoStream, *, span: ByteSpan | None
) -> AviFrames | None:
    """Compare the packets of an AVI file with its index.

    Args:
        path: the file.
        container: the file, directly after opening.
        stream: its video stream.
        span: one of several recordings in the file; None for the whole file.

    Returns:
        The frames that are there if some are lost or this is unknown; None if none are lost, or it is no AVI.
    """
    if container.format.name != "avi":
        return None
    own = [PacketPlace(entry.pos, entry.size) for entry in stream.index_entries]  # reading adds to them
    entries = max(list(_index_at_end(path, stream.index, span=span)), own, key=len)
    packets: list[PacketPlace] = []
    with suppress(av.FFmpegError):
        packets += (PacketPlace(packet.pos or 0, packet.size) for packet in container.demux(stream))
    packets = [packet for packet in packets if packet.size]
    stored = [number for number, entry in enumerate(entries) if entry.size]
    numbers = _match(entries, packets) if entries and packets else {}
    if len(numbers) == len(packets) == len(stored):
        return None
    if 2 * len(numbers) < len(packets) or len(packets) > len(stored):
        unconfirmed = {packet.position: number for number, packet in enumerate(packets)}
        promised = min(stream.frames, _MOST_PER_PACKET * len(packets))
        # The header counts repeated frames as well, which have empty packets.
        is_cut = promised > len(packets) + MAX_MISSING_SECONDS * (stream.average_rate or 0)
        return AviFrames(unconfirmed, frozenset(), promised if is_cut else len(packets), is_timed=False)
    found = set(numbers.values())
    gaps = {number for before, number in zip(stored, stored[1:], strict=False) if before not in found}
    return AviFrames(numbers, frozenset(gaps), len(entries))


def _match(entries: Sequence[PacketPlace], packets: Sequence[PacketPlace]) -> dict[int, int]:
    """Return the number of the index entry of each packet, by the packet's position.

    Lost bytes shift all later positions. The shift is then found by a packet whose size occurs once.
    """
    by_position = {entry.position: number for number, entry in enumerate(entries)}
    numbers_of_size: dict[int, list[int]] = {}
    for number, entry in enumerate(entries):
        numbers_of_size.setdefault(entry.size, []).append(number)
    shift, last = packets[0].position - entries[0].position, -1
    numbers: dict[int, int] = {}
    for packet in packets:
        number = by_position.get(packet.position - shift, -1)
        if number < 0 or entries[number].size != packet.size:
            # Bisected, because all packets of some codecs (DV) have the same size.
            same = numbers_of_size.get(packet.size, [])
            at = bisect_right(same, last)
            if at != len(same) - 1:
                continue
            number = same[at]
            shift = packet.position - entries[number].position
        numbers[packet.position] = last = number
    return numbers


def _index_at_end(
    path: str | os.PathLike[str], stream_index: int, *, span: ByteSpan | None
) -> Iterator[PacketPlace]:
    """Yield the entries of one stream in the chunk `idx1`, which lost bytes before it may hide from readers."""
    start, end = span or (0, os.path.getsize(path))
    start = max(end - _SEARCHED_BYTES, start)
    with open(path, "rb") as file:
        file.seek(start)
        tail = file.read(end - start)
    start = tail.rfind(b"idx1")
    if start < 0:
        return
    length = int.from_bytes(tail[start + 4 : start + 8], "little")
    table = memoryview(tail)[start + 8 : start + 8 + length]
    own = b"%02d" % stream_index
    for at in range(0, len(table) - _ENTRY_BYTES + 1, _ENTRY_BYTES):
        kind, position, num_bytes = table[at : at + 4], table[at + 8 : at + 12], table[at + 12 : at + 16]
        if kind[:2] == own and kind[2:] in (b"dc", b"db"):
            yield PacketPlace(int.from_bytes(position, "little"), int.from_bytes(num_bytes, "little"))
