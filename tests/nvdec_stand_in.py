"""What DALI's `mixed` decoder makes of a mini clip, without a GPU: DALI's order, libavcodec's pixels.

The rules are those of DALI 2.4 (frames_decoder_gpu.cc), for a file without an index:

- libavformat gives the packets, and a filter turns each of H.264 and HEVC into one packet with start codes.
- The parser of NVDEC finds the pictures in these bytes by itself. Every picture gets the time of its packet, so
  there must be one per packet.
- NVDEC delivers pictures in decode order. DALI keeps 8 and gives out the earliest, as long as the container
  says that there are frames; the number of a frame is its place in this order.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import av
import numpy as np
from av.bitstream import BitStreamFilterContext

from pipelines.mini_clip import MiniClip

BUFFERED = 8
FILTERS = {"h264": "h264_mp4toannexb", "hevc": "hevc_mp4toannexb"}


def numbered(times: Sequence[int]) -> list[int]:
    """The times of pictures in the order in which DALI numbers them, given those in decode order."""
    coming, kept, found = list(times), [], []
    while coming or kept:
        while coming and len(kept) < BUFFERED:
            kept.append(coming.pop(0))
        kept.remove(earliest := min(kept))
        found.append(earliest)
    return found


def wanted_frames(mini: MiniClip) -> list[np.ndarray]:
    """The frames of a mini clip at its `frame_ids`, as stored (YUV)."""
    times, packets, codec = _as_nvdec_gets_them(mini)
    if codec in FILTERS:
        with av.open(io.BytesIO(b"".join(packets)), format=codec) as raw:
            pictures = sum(1 for packet in raw.demux(video=0) if packet.size)
        assert pictures == len(packets), "the parser finds other pictures than there are packets"
    shown = _decoded(times, packets, codec=codec)
    order = numbered(times)
    return [shown[order[number]] for number in mini.frame_ids]


def _as_nvdec_gets_them(mini: MiniClip) -> tuple[list[int], list[bytes], str]:
    """The time of each packet in decode order, its bytes after the filter, and the codec."""
    with av.open(io.BytesIO(bytes(mini.data))) as container:
        (stream,) = container.streams.video
        codec = stream.codec_context.name
        convert = BitStreamFilterContext(FILTERS.get(codec, "null"), stream)
        packets = [packet for packet in container.demux(stream) if packet.size]
        assert stream.frames == len(packets)
        times = [packet.pts for packet in packets]
        filtered = [[bytes(found) for found in convert.filter(packet)] for packet in packets]
    assert all(len(found) == 1 for found in filtered)
    assert all(0 <= time < 2**31 for time in times), "DALI keeps times as int, and -1 marks an empty buffer"
    return times, [found[0] for found in filtered], codec


def _decoded(times: Sequence[int], packets: Sequence[bytes], *, codec: str) -> dict[int, np.ndarray]:
    """The picture of each time, from a decoder that knows the bytes of the packets alone."""
    decoder, frames = av.CodecContext.create(codec, "r"), []
    decoder.thread_count = 1
    for time, data in zip(times, packets, strict=True):
        packet = av.Packet(data)
        packet.pts = time
        frames += decoder.decode(packet)
    frames += decoder.decode(None)
    shown = {frame.pts: frame.to_ndarray() for frame in frames}
    assert sorted(shown) == sorted(times), "a packet is not one picture that is shown"
    return shown
