"""How chunks are encoded: a table of encoder settings, each with what it costs and buys.

Every profile gives 8-bit 4:2:0 pictures, tagged limited-range BT.601 (the conversion that hardware
decoding pipelines assume), closed GOPs, one thread an encode, and an mp4 whose index stands first.

The settings come from a sweep (`benchmarks/results/chunk_profiles_sweep.json`). Quality numbers (`crf`) are set
so that the structural similarity to the source is that of `compat` less 0.002 at most; bytes and times are
compared at that quality. What the sweep taught:

- A clip's time is the number of frames decoded times the cost of one. Pictures that no other refers to are left
  out when nobody wants them, so B-frames must not be referenced, and be many between two that are.
- Entropy coding is the larger part of decoding a frame at chunk sizes: variable-length codes (CAVLC) cost a
  fifth of bytes more than arithmetic ones, and take a third of the time off.
- Rate control that aims at what is measured (`tune=ssim`: no psycho-visual bits) and a thorough encoder, which
  works once, pay for most of that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ProfileName = Literal["compat", "balanced", "fast", "intra", "hevc", "vp9"]

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


# A fixed pattern: every group opens with an IDR picture, then seven B-frames stand between two frames that are
# referenced. Weighted prediction would cost decoding time and saves next to nothing.
_FIXED = "scenecut=0:open-gop=0:b-adapt=0:b-pyramid=none:bframes=7:weightp=0"
_THOROUGH = "subme=9:trellis=2"

PROFILES: dict[ProfileName, EncodeProfile] = {
    # The x264 defaults, as AVION's chunks were made: the smallest files, but a frame in the middle of a GOP
    # needs about 60 others decoded first.
    "compat": EncodeProfile("libx264", 250, {"preset": "medium", "crf": "23"}),
    # Keyframes 48 apart cost a clip hardly more frames than 32 apart, since only every eighth in between is
    # referenced, and fewer bytes; at 64 a one-second clip reads more than an eighth of a still chunk.
    "balanced": EncodeProfile(
        "libx264",
        48,
        {
            "preset": "slow",
            "tune": "ssim",
            "crf": "23.1",
            "x264-params": f"keyint=48:min-keyint=48:{_FIXED}:{_THOROUGH}:cabac=0:aq-strength=0.6",
        },
    ),
    # No deblocking filter either, which smooth pictures pay for with a lower quality number, and
    # keyframes further apart.
    "fast": EncodeProfile(
        "libx264",
        64,
        {
            "preset": "slow",
            "tune": "ssim",
            "crf": "22.1",
            "x264-params": f"keyint=64:min-keyint=64:{_FIXED}:{_THOROUGH}:cabac=0:no-deblock=1:aq-strength=0.4",
        },
    ),
    # Every frame stands alone: the least to decode for a few frames far apart, at several times the bytes.
    "intra": EncodeProfile(
        "libx264",
        1,
        {"preset": "medium", "tune": "ssim", "crf": "17.6", "x264-params": "keyint=1:cabac=0:no-deblock=1"},
    ),
    # For hardware decoders that are faster at HEVC. x265 marks frames that none refers to, also without
    # temporal layers. Its information message would stand in every file.
    "hevc": EncodeProfile(
        "libx265",
        32,
        {
            "preset": "fast",
            "tune": "ssim",
            "crf": "22.5",
            "x265-params": "keyint=32:min-keyint=32:scenecut=0:open-gop=0:b-adapt=0:b-pyramid=0:bframes=7:"
            "pools=none:frame-threads=1:wpp=0:info=0:log-level=error",
        },
    ),
    # For decoders without H.264, such as DALI on a CPU. Every frame may be referenced, so the groups are short.
    # Constant quality needs the bit rate set to zero.
    "vp9": EncodeProfile(
        "libvpx-vp9", 32, {"deadline": "good", "cpu-used": "5", "crf": "32", "b": "0", "keyint_min": "32"}
    ),
}
