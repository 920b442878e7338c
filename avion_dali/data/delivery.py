"""Reads the pictures that a decoder delivers from the beginning of a file, in order, and detects losses.

The decoder determines which pictures a file has. Packets alone determine them only for plain streams
(`indexing.packets_tell`); all other streams are decoded and counted, in the same way by every reader.

Decode workers use this module, so it imports only numpy and PyAV.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice, pairwise

import av
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from avion_dali.data.avi import AviFrames
from avion_dali.data.bitstream import Entry, nal_length_size, picture_traits
from avion_dali.data.indexing import STRICT, stream_facts

_SEAM_PACKETS = 2  # the damage mark may precede the seam by this many packets


def decode_strictly(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """Decode a file that was just opened; damage is an error if the first keyframe allows strict decoding.

    Some decoders deliver pictures from before the first keyframe; failures of other decoders are not damage.

    Args:
        container: the file, at its beginning.
        stream: its video stream.

    Yields:
        The pictures in presentation order.
    """
    packets = _sized_packets(container, stream)
    ahead = _until_keyframe(packets)
    if _begins_clean(ahead, stream):
        stream.codec_context.options = STRICT
    for packet in ahead[:-1]:
        with suppress(av.FFmpegError):
            yield from stream.codec_context.decode(packet)
    for packet in chain(ahead[-1:], packets):
        yield from stream.codec_context.decode(packet)
    yield from stream.codec_context.decode(None)


def _sized_packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet]:
    """Yield packets except empty ones: the end marker, and repeated frames of an AVI file."""
    return (packet for packet in container.demux(stream) if packet.size)


def with_damage(packets: Iterable[Packet]) -> Iterator[tuple[Packet, bool]]:
    """Yield each packet with a flag that tells whether the container marks it as damaged.

    Where transport streams were joined byte by byte, their counters jump as if packets were lost. At such a
    seam the time decreases as well, and nothing is missing, so the mark is ignored.

    Args:
        packets: packets in file order.
    """
    coming, ahead = iter(packets), deque[Packet]()
    while (packet := ahead.popleft() if ahead else next(coming, None)) is not None:
        if packet.is_corrupt:
            ahead.extend(islice(coming, _SEAM_PACKETS - len(ahead)))
        yield packet, packet.is_corrupt and not _is_seam([packet, *ahead])


def _is_seam(packets: Iterable[Packet]) -> bool:
    times = [packet.dts for packet in packets if packet.dts is not None]
    return any(after < before for before, after in pairwise(times))


def _until_keyframe(packets: Iterator[Packet]) -> list[Packet]:
    ahead: list[Packet] = []
    for packet in packets:
        ahead.append(packet)
        if packet.is_keyframe:
            break
    return ahead


def _begins_clean(ahead: list[Packet], stream: VideoStream) -> bool:
    """Return whether a strict decoder accepts a stream's first keyframe."""
    if not ahead or not ahead[-1].is_keyframe:
        return False
    facts = stream_facts(stream)
    length_size = nal_length_size(facts.codec, facts.extradata)
    data = bytes(ahead[-1])
    return (
        picture_traits(data, codec=facts.codec, length_size=length_size, is_keyframe=True).entry == Entry.CLEAN
    )


@dataclass(frozen=True, slots=True)
class Delivered:
    """A picture as delivered by its decoder.

    Args:
        frame: the picture.
        number: its index among all delivered pictures, from 0.
        is_whole: False for pictures that are damaged or refer to damaged ones.
        after_loss: True if damage lies between this undamaged picture and the previous undamaged one.
    """

    frame: VideoFrame
    number: int
    is_whole: bool
    after_loss: bool = False


class TolerantReader:
    """Decodes a file that may be damaged; pictures between an error and the next keyframe are not whole.

    Args:
        container: the file, directly after opening.
        stream: its video stream.
        avi: the frames of an AVI file that lost some, or may have.

    Two attributes are valid after iteration has started and ended, respectively: `begins_inside`, whether the
    stream begins inside a group of pictures, and `ends_broken`, whether the end of the file is lost.
    """

    def __init__(self, container: InputContainer, stream: VideoStream, *, avi: AviFrames | None = None) -> None:
        self._container, self._stream, self._avi = container, stream, avi
        self._number = 0
        self._had_keyframe = False
        self._is_broken = False
        self._broken_from: int | None = None  # earliest time of a packet since the error
        self._since_loss: list[int] = []  # decode order of pictures of an AVI file since the error
        self.begins_inside = False
        self.ends_broken = False

    def __iter__(self) -> Iterator[Delivered]:
        packets = _sized_packets(self._container, self._stream)
        ahead = _until_keyframe(packets)
        self.begins_inside = bool(ahead) and not ahead[0].is_keyframe
        # FFmpeg's HEVC decoder does not mark damaged pictures; in strict mode it reports the damage.
        if self._stream.codec_context.codec.canonical_name == "hevc" and _begins_clean(ahead, self._stream):
            self._stream.codec_context.options = STRICT
        try:
            for packet, is_damaged in with_damage(chain(ahead, packets)):
                yield from self._decode(packet, is_damaged=is_damaged)
        except av.FFmpegError:  # raised by the demuxer, which cannot continue
            self._is_broken = True
        yield from self._decode(None, is_damaged=False)
        self.ends_broken = self._is_broken

    def _decode(self, packet: Packet | None, *, is_damaged: bool) -> Iterator[Delivered]:
        frames: list[VideoFrame] = []
        failed = is_damaged
        if packet is not None and self._avi is not None:
            packet.pts = self._avi.numbers.get(packet.pos or 0)
            failed = packet.pts is None or packet.pts in self._avi.gaps
        try:
            frames = self._stream.codec_context.decode(packet)
        except av.FFmpegError:
            failed = True
        # A stream that begins inside a group may fail up to its first keyframe; this is not a loss.
        self._had_keyframe |= packet is not None and packet.is_keyframe
        if failed and self._had_keyframe:
            self._is_broken = True
        if self._is_broken and packet is not None and packet.pts is not None:
            earlier = packet.pts if self._broken_from is None else self._broken_from
            self._broken_from = min(packet.pts, earlier)
        for frame in frames:
            yield self._judge(frame)
            self._number += 1

    def _judge(self, frame: VideoFrame) -> Delivered:
        """Determine whether a picture is whole, and record where damage begins and ends."""
        if self._avi is not None and self._is_broken:
            self._count_again(frame)
        number = self._number
        if frame.is_corrupt:
            self._is_broken = True
            return Delivered(frame, number, is_whole=False)
        # Pictures decoded before the damage may be delivered after it.
        is_early = frame.pts is not None and self._broken_from is not None and frame.pts < self._broken_from
        if not self._is_broken or is_early:
            return Delivered(frame, number, is_whole=True)
        recovers = frame.key_frame and (self._avi is None or self._avi.is_timed)
        if recovers:
            self._is_broken, self._broken_from = False, None
        return Delivered(frame, number, is_whole=recovers, after_loss=recovers)

    def _count_again(self, frame: VideoFrame) -> None:
        """Determine the number of a picture after lost packets of an AVI file."""
        if frame.key_frame and frame.pts is not None:
            # Its number in decode order, and the pictures that are decoded after it but shown before it.
            self._number = frame.pts + sum(after > frame.pts for after in self._since_loss)
            self._since_loss = []
        elif frame.pts is not None:
            self._since_loss.append(frame.pts)
