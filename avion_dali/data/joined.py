"""Finds files in which recordings were joined byte by byte and readers stop at the end of the first one.

Streams without an index (MPEG, elementary, Matroska) are read to the end of the file; mp4, AVI and FLV are not.
"""

from __future__ import annotations

import mmap
import os
import re
from typing import BinaryIO

_FLV_HEADER = re.compile(rb"FLV\x01[\x00-\x05]\x00\x00\x00\x09", re.DOTALL)
_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")


def find_unread_recording(path: str | os.PathLike[str]) -> int | None:
    """Return the first byte of another recording that readers of a file do not reach; None if there is none.

    Args:
        path: a video file.
    """
    with open(path, "rb") as file:
        head = file.read(12)
        if head[4:8] in _BOXES:
            return _second_mp4(file, os.fstat(file.fileno()).st_size)
        if head[:4] == b"RIFF":
            return _second_riff(file, os.fstat(file.fileno()).st_size)
        if head[:4] == b"FLV\x01":
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                found = _FLV_HEADER.search(data, 9)
                return found.start() if found else None
    return None


def _second_mp4(file: BinaryIO, size: int) -> int | None:
    """Search the top-level boxes (ISO/IEC 14496-12, section 4.2) for a second file type box."""
    at, types = 0, 0
    while at + 16 <= size:
        file.seek(at)
        head = file.read(16)
        length, kind = int.from_bytes(head[:4], "big"), head[4:8]
        types += kind == b"ftyp"
        if types > 1:
            return at
        length = int.from_bytes(head[8:], "big") if length == 1 else length
        if length < 8:  # extends to the end of the file, or is damaged
            return None
        at += length
    return None


def _second_riff(file: BinaryIO, size: int) -> int | None:
    """Search the top-level chunks for a second start of an AVI file; its continuations have the type AVIX."""
    at, number = 0, 0
    while at + 12 <= size:
        file.seek(at)
        head = file.read(12)
        if head[:4] != b"RIFF":
            return None
        if number and head[8:] == b"AVI ":
            return at
        at, number = at + 8 + (int.from_bytes(head[4:8], "little") + 1) // 2 * 2, number + 1
    return None
