"""Names of FFmpeg's numbers for the colors of a stream (ITU-T H.273)."""

from __future__ import annotations

# FFmpeg's numbers of transfer characteristics (ITU-T H.273, table 3).
HDR_TRANSFERS = {16: "PQ (SMPTE 2084)", 18: "HLG"}
# FFmpeg's AVColorSpace numbers (ITU-T H.273, table 4); PyAV's enum does not contain all of them.
_COLORSPACES = {
    0: "gbr",
    1: "bt709",
    4: "fcc",
    5: "bt470bg",
    6: "smpte170m",
    7: "smpte240m",
    8: "ycgco",
    9: "bt2020nc",
    10: "bt2020c",
}


def color_range_name(color_range: int, pix_fmt: str) -> str:
    """Return the name of FFmpeg's range number; the old `yuvj` pixel formats are `full`."""
    if pix_fmt.startswith("yuvj"):
        return "full"
    return {1: "limited", 2: "full"}.get(color_range, "unspecified")


def colorspace_name(colorspace: int) -> str:
    """Return the name of FFmpeg's YUV matrix number, such as `bt709`; `unspecified` if it is unknown."""
    return _COLORSPACES.get(colorspace, "unspecified")
