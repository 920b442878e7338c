"""Containers that are opened: of known formats that name no other files, with headers that claim what fits.

FFmpeg also opens playlists (concatenations, HLS, DASH), whatever a file's name ends in, and these open further
files or addresses. And it allocates what a header claims: 647 bytes of an mp4 that claim 20 million pictures
take hundreds of megabytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

# Names of FFmpeg's demuxers (`ffmpeg -demuxers`) that read a picture stream out of the file itself.
ALLOWED_DEMUXERS = (
    *("mov", "matroska", "avi", "mpegts", "mpeg", "mpegvideo", "flv", "asf", "ogg", "mxf", "nut", "ivf", "gif"),
    *("h264", "hevc", "av1", "obu", "m4v", "mjpeg", "vc1", "dv", "rm", "yuv4mpegpipe", "apng", "wtv"),
    *("gxf", "nsv", "nuv", "dirac", "vvc", "evc", "h261", "h263", "cavsvideo", "pva", "flic", "dhav"),
)
# A part of a file is opened as `subfile`, which opens the file.
OPEN_OPTIONS = {"format_whitelist": ",".join(ALLOWED_DEMUXERS), "protocol_whitelist": "file,subfile"}
"""FFmpeg's options for opening any file that is not our own."""

ByteSpan = tuple[int, int]
"""First byte of a recording in its file, and the byte after its last one."""

_PARENTS = frozenset({b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf"})
_MAX_BOXES = 1_000_000  # an hour of one-picture fragments
_MAX_DEPTH = 8


class ExcessiveClaimError(ValueError):
    """A header claims more than its file can hold; the message says what."""


@dataclass(frozen=True, slots=True)
class _Box:
    kind: bytes
    body: int
    end: int


def require_modest_header(file: int) -> None:
    """Require that the sample tables of an mp4 or QuickTime file do not claim more than fits into the file.

    Every sample takes a byte at least, or an entry in a table. Files of other formats pass: their indexes hold
    an entry for each packet.

    Args:
        file: descriptor of the file.

    Raises:
        ExcessiveClaimError: when they do.
    """
    size, claimed = os.fstat(file).st_size, 0
    for number, box in enumerate(_boxes(file, 0, size, depth=0)):
        if number == _MAX_BOXES:
            raise ExcessiveClaimError(f"has more than {_MAX_BOXES} boxes")
        if box.kind == b"cmov":
            raise ExcessiveClaimError("has a compressed header; copy it with `ffmpeg -i FILE -c copy NEW.mp4`")
        claimed += _claimed_bytes(file, box)
        if claimed > size:
            raise ExcessiveClaimError(f"is damaged: its header claims more samples than {size} bytes can hold")


def _boxes(file: int, start: int, end: int, *, depth: int) -> Iterator[_Box]:
    """Yield the boxes of a part of the file, and those inside the ones that lead to sample tables."""
    while start + 8 <= end:
        head = os.pread(file, 16, start)
        if len(head) < 8:
            return
        length, kind, skipped = int.from_bytes(head[:4], "big"), head[4:8], 8
        if length == 1:
            length, skipped = int.from_bytes(head[8:16], "big"), 16
        stop = end if length == 0 else min(start + length, end)
        if 0 < length < skipped:
            return
        yield _Box(kind, start + skipped, stop)
        if kind in _PARENTS and depth < _MAX_DEPTH:
            yield from _boxes(file, start + skipped, stop, depth=depth + 1)
        start = stop


def _claimed_bytes(file: int, box: _Box) -> int:
    """Return how many bytes the samples take at least that a box claims without listing them."""
    if box.kind not in (b"stsz", b"trun"):
        return 0
    head = os.pread(file, 12, box.body)
    if len(head) < 12:
        return 0
    if box.kind == b"stsz":
        each, count = int.from_bytes(head[4:8], "big"), int.from_bytes(head[8:12], "big")
        return each * count  # 0 where sizes are listed, which FFmpeg compares with the size of the box
    listed = 4 * sum(bool(int.from_bytes(head[1:4], "big") & flag) for flag in (0x100, 0x200, 0x400, 0x800))
    count = int.from_bytes(head[4:8], "big")
    return max(count - (box.end - box.body) // listed, 0) if listed else count
