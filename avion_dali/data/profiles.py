"""How chunks are encoded: a table of encoder settings, each with what it costs and buys.

Every profile gives 8-bit 4:2:0 pictures, tagged limited-range BT.601 (the conversion that hardware
decoding pipelines assume), closed GOPs, one thread an encode, and an mp4 whose index stands first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ProfileName = Literal["compat", "balanced", "vp9"]

PIX_FMT = "yuv420p"
COLORSPACE_BT601 = 6  # FFmpeg's AVCOL_SPC_SMPTE170M
COLOR_RANGE_LIMITED = 1  # FFmpeg's AVCOL_RANGE_MPEG


@dataclass(frozen=True)
class EncodeProfile:
    """Settings of one encoder.

    Args:
        codec: FFmpeg's encoder name.
        gop: largest distance of keyframes, in frames.
        options: encoder options, FFmpeg's names.
    """

    codec: str
    gop: int
    options: dict[str, str]


PROFILES: dict[ProfileName, EncodeProfile] = {
    # The x264 defaults, as AVION's chunks were made: the smallest files, but a frame in the middle of a GOP
    # needs about 60 others decoded first.
    "compat": EncodeProfile("libx264", 250, {"preset": "medium", "crf": "23"}),
    # Seven of eight frames are referenced by no other, so that a clip decodes little but what it keeps.
    "balanced": EncodeProfile(
        "libx264",
        32,
        {
            "preset": "medium",
            "crf": "23",
            "x264-params": "keyint=32:min-keyint=32:scenecut=0:bframes=7:b-adapt=0:b-pyramid=none:open-gop=0",
        },
    ),
    # For decoders without H.264, such as DALI on a CPU. Real-time mode 5 gave the size and quality of
    # `good` at a quarter of its time. Constant quality needs the bit rate set to zero.
    "vp9": EncodeProfile(
        "libvpx-vp9", 60, {"deadline": "realtime", "cpu-used": "5", "crf": "33", "b": "0", "keyint_min": "60"}
    ),
}
