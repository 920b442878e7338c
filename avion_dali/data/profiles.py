"""Chunk profiles: a table of encoder settings, with the costs and benefits of each.

All profiles produce 8-bit 4:2:0 pictures, tagged as limited-range BT.601 (the conversion that hardware decoding
pipelines assume), closed GOPs, and an mp4 with its index at the beginning; each encoder uses one thread.

The settings are from a sweep (`benchmarks/results/chunk_profiles_sweep.json`). Quality numbers (`crf`) are set
so that the structural similarity to the source is at most 0.002 below that of `compat`; bytes and times are
compared at this quality. Results of the sweep:

- The time per clip is the number of decoded frames times the time per frame. Pictures that are neither wanted
  nor referenced are dropped, so B-frames should not be referenced, and many should lie between two references.
- At chunk sizes, entropy decoding is the larger part of decoding a frame: variable-length codes (CAVLC) need a
  fifth more bytes than arithmetic codes, and save a third of the time.
- Rate control for the measured quality (`tune=ssim`: no psycho-visual bits) and a slow encoder preset, which is
  only paid once, compensate for most of these bytes.
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
        codec: FFmpeg's name of the encoder.
        gop: largest distance between keyframes, in frames.
        options: encoder options by FFmpeg's names.
    """

    codec: str
    gop: int
    options: dict[str, str]


# A fixed pattern: each group begins with an IDR picture, and seven B-frames lie between two referenced frames.
# Weighted prediction would cost decoding time and save almost no bytes.
_FIXED = "scenecut=0:open-gop=0:b-adapt=0:b-pyramid=none:bframes=7:weightp=0"
_THOROUGH = "subme=9:trellis=2"

PROFILES: dict[ProfileName, EncodeProfile] = {
    # The x264 defaults, as for AVION's chunks: the smallest files, but a frame in the middle of a
    # GOP requires decoding about 60 others first.
    "compat": EncodeProfile("libx264", 250, {"preset": "medium", "crf": "23"}),
    # With 48 frames between keyframes, a clip decodes hardly more than with 32, because only every eighth frame
    # is referenced, and files are smaller; with 64, a one-second clip reads over an eighth of a static chunk.
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
    # In addition, no deblocking filter, for which smooth pictures need a lower quality number, and longer GOPs.
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
    # Only keyframes: the fewest frames to decode for a few distant frames, at several times the bytes.
    "intra": EncodeProfile(
        "libx264",
        1,
        {"preset": "medium", "tune": "ssim", "crf": "17.6", "x264-params": "keyint=1:cabac=0:no-deblock=1"},
    ),
    # For hardware decoders that are faster with HEVC. x265 marks frames that no other refers to, also without
    # temporal layers. Its information message would be stored in every file.
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
    # For decoders without H.264, such as DALI on a CPU. Every frame may be referenced, so the GOPs are short.
    # Constant quality requires a bit rate of zero.
    "vp9": EncodeProfile(
        "libvpx-vp9", 32, {"deadline": "good", "cpu-used": "5", "crf": "32", "b": "0", "keyint_min": "32"}
    ),
}
