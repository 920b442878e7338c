"""The codecs that DALI decodes, by device, and the packets whose frames it would number wrongly.

Workers import this module, so it imports neither DALI nor torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from avion_dali.data.bitstream import is_superframe, nal_length_size
from avion_dali.decode.source import PartPackets

from .mini_clip import UnfitForMiniClipError

Device = Literal["cpu", "mixed"]

# The FFmpeg inside DALI has no H.264 and no HEVC decoder. On NVDEC, DALI reads the pixel range from a field
# that JPEG pictures do not have (DALI 2.4, frames_decoder_gpu.cc), so MJPEG is decoded on the CPU.
DECODABLE: dict[Device, frozenset[str]] = {
    "cpu": frozenset({"vp8", "vp9", "mjpeg"}),
    "mixed": frozenset({"h264", "hevc", "vp8", "vp9"}),
}


def require_decodable(parts: Sequence[PartPackets], *, device: Device) -> None:
    """Check that DALI delivers the frames of these packets, each at its position.

    On NVDEC, DALI gives every decoded picture the time of its packet, so a packet must contain exactly one
    picture, which is shown. (This follows from the code, DALI 2.4, frames_decoder_gpu.cc; no such failure was
    observed.)

    Args:
        parts: packets of a clip's parts.
        device: device on which DALI decodes them.

    Raises:
        UnfitForMiniClipError: when DALI does not deliver them; the message states the reason.
    """
    for part in parts:
        codec = part.stream.codec
        if codec not in DECODABLE[device]:
            where = "without a GPU" if device == "cpu" else "on a GPU"
            raise UnfitForMiniClipError(f"DALI does not decode {codec} {where}")
        # NVDEC outputs pictures of even sizes (`ulTargetHeight` in cuviddec.h), so the chroma of an odd height
        # does not begin where DALI reads it, at height x pitch (DALI 2.4, color_space.cu).
        if device == "mixed" and (part.stream.width % 2 or part.stream.height % 2):
            size = f"{part.stream.width}x{part.stream.height}"
            raise UnfitForMiniClipError(
                f"its pictures have an odd side ({size}), and DALI needs even ones on a GPU"
            )
        payloads = [payload for run in part.runs for payload in run.payloads] if device == "mixed" else []
        if codec == "vp9" and not all(map(shows_one_picture, payloads)):
            raise UnfitForMiniClipError("it has hidden pictures, which DALI counts as frames on a GPU")
        length_size = nal_length_size(codec, part.stream.extradata)
        if codec == "h264" and any(holds_two_fields(payload, length_size) for payload in payloads):
            raise UnfitForMiniClipError("it is interlaced, and DALI counts fields as frames on a GPU")


def shows_one_picture(payload: bytes) -> bool:
    """Return whether a VP9 packet is a single coded picture that is shown.

    Source: VP9 bitstream specification 0.6, section 6.2 (show_existing_frame, show_frame) and annex B (the
    marker that ends a superframe). In profile 3 these bits are shifted by one; its pictures count as hidden.

    Args:
        payload: the packet, not empty.
    """
    return not is_superframe(payload) and payload[0] & 0x30 != 0x30 and payload[0] & 0x0A == 0x02


def holds_two_fields(payload: bytes, length_size: int) -> bool:
    """Return whether an H.264 packet contains two pictures, which are the fields of an interlaced frame.

    Each picture starts with a slice whose first macroblock is 0, coded as a single bit 1 (ITU-T H.264,
    section 7.3.3).

    Args:
        payload: the packet.
        length_size: bytes of each NAL unit's length.
    """
    at, pictures = length_size, 0
    while length_size and at + 1 < len(payload):
        if payload[at] & 0x1F in (1, 2, 5) and payload[at + 1] & 0x80:
            pictures += 1
        at += int.from_bytes(payload[at - length_size : at], "big") + length_size
    return pictures > 1
