"""Files in which recordings were joined byte by byte, and readers stop at the end of the first one.

Streams without an index (MPEG, elementary, Matroska) are read to the end of the file; mp4, AVI and FLV are not.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import BinaryIO

import numpy as np

from avion_dali.contracts import DecodeError
from avion_dali.data.container_limits import ByteSpan
from avion_dali.data.delivery import Delivered, TolerantReader
from avion_dali.data.probe import ChunkFacts, avi_frames, open_video, probe_chunk

_FLV_HEADER = re.compile(rb"FLV\x01[\x00-\x05]\x00\x00\x00\x09", re.DOTALL)
_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")


def find_recordings(path: str | os.PathLike[str]) -> list[ByteSpan]:
    """Return the bytes (from, to) of each recording of a file; usually there is one.

    Args:
        path: a video file.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(12)
        starts: list[int] = []
        if head[4:8] in _BOXES:
            starts = list(_mp4_starts(file, size))
        elif head[:4] == b"RIFF":
            starts = list(_riff_starts(file, size))
        elif head[:4] == b"FLV\x01":
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                starts = [found.start() for found in _FLV_HEADER.finditer(data, 9)]
    return list(pairwise([0, *starts, size]))


def _mp4_starts(file: BinaryIO, size: int) -> Iterator[int]:
    """Search the top-level boxes (ISO/IEC 14496-12, section 4.2) for further file type boxes."""
    at, types = 0, 0
    while at + 16 <= size:
        file.seek(at)
        head = file.read(16)
        length, kind = int.from_bytes(head[:4], "big"), head[4:8]
        types += kind == b"ftyp"
        if types > 1 and kind == b"ftyp":
            yield at
        length = int.from_bytes(head[8:], "big") if length == 1 else length
        if length < 8:  # extends to the end of the file, or is damaged
            return
        at += length


def _riff_starts(file: BinaryIO, size: int) -> Iterator[int]:
    """Search the top-level chunks for further starts of an AVI file; its continuations have the type AVIX."""
    at = 0
    while at + 12 <= size:
        file.seek(at)
        head = file.read(12)
        if head[:4] != b"RIFF":
            return
        if at and head[8:] == b"AVI ":
            yield at
        at += 8 + (int.from_bytes(head[4:8], "little") + 1) // 2 * 2


def probe_recordings(
    path: str | os.PathLike[str], spans: Sequence[ByteSpan]
) -> tuple[ChunkFacts, Sequence[ByteSpan], str]:
    """Read the facts of a file as if all its recordings were one.

    Args:
        path: a video file.
        spans: from `find_recordings`.

    Returns:
        The facts, the bytes of the recordings that can be read, and why the others cannot, or nothing.

    Raises:
        DecodeError: when the first recording cannot be read.
    """
    if len(spans) == 1:
        return probe_chunk(path, tolerant=True), spans, ""
    facts: list[ChunkFacts] = []
    for span in spans:
        try:
            facts.append(probe_chunk(path, tolerant=True, span=span))
        except DecodeError as error:
            if not facts:
                raise
            unread = f"contains another recording from byte {span[0]} on, which cannot be read ({error.cause})"
            return _as_one(facts), spans[: len(facts)], unread
    return _as_one(facts), spans, ""


def _as_one(facts: Sequence[ChunkFacts]) -> ChunkFacts:
    """Return the facts of recordings of which each begins when the one before it ends."""
    first, last = facts[0], facts[-1]
    count = sum(part.num_frames for part in facts)
    whole = replace(first, num_frames=count, is_counted=True, last_s=last.last_s, packet_index=b"")
    if all(part.fps == first.fps and part.clock_times() is None for part in facts):
        return whole
    times, begin = [], 0.0
    for part in facts:
        own = np.arange(part.num_frames) / float(part.fps) if part.frame_times is None else part.frame_times
        times.append(begin + part.start_s + own)
        begin += part.end_s()
    seconds = np.concatenate(times) - first.start_s
    return replace(
        whole,
        is_cfr=False,
        frame_times=seconds,
        fps=Fraction((count - 1) / float(seconds[-1]) if count > 1 else first.fps).limit_denominator(100_000),
        densest_fps=max(part.densest_fps or part.fps for part in facts),
    )


class RecordingsReader:
    """Decodes the recordings of a file one after the other; see `TolerantReader`.

    Args:
        path: the file.
        spans: the bytes of its recordings.
    """

    def __init__(self, path: str, spans: Sequence[ByteSpan]) -> None:
        self._path, self._spans = path, spans
        self.begins_inside = self.ends_broken = False
        self.pixel_aspect = Fraction(1)
        self.tick = Fraction(1, 1000)  # the last frames of a decoder have no time base

    def __iter__(self) -> Iterator[Delivered]:
        number = 0
        for span in self._spans if len(self._spans) > 1 else [None]:
            with open_video(self._path, decoder="chunker", span=span) as (container, stream):
                avi = avi_frames(self._path, span=span) if container.format.name == "avi" else None
                reader, begin = TolerantReader(container, stream, avi=avi), number
                self.tick, self.pixel_aspect = stream.time_base or Fraction(1, 1000), Fraction(1)
                for delivered in reader:
                    self.begins_inside = reader.begins_inside and not begin
                    self.pixel_aspect = Fraction(stream.sample_aspect_ratio or 0) or self.pixel_aspect
                    number = begin + delivered.number + 1
                    after_loss = delivered.after_loss or (self.ends_broken and delivered.is_whole)
                    self.ends_broken = self.ends_broken and not delivered.is_whole
                    yield replace(delivered, number=number - 1, after_loss=after_loss)
                self.ends_broken = self.ends_broken or reader.ends_broken
