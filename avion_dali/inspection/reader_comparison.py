"""Compares the decoders for CPU cores on a few clips of a file.

They decode different packets, so they show different pictures where damage is concealed, or where a header
contradicts the pictures. This module runs in worker processes, so it imports only numpy and PyAV.
"""

from __future__ import annotations

from av.video.frame import VideoFrame

from avion_dali.contracts import ChunkRef, ClipPart
from avion_dali.decode.reading import read_everything, read_planned, read_spanned

_CLIP_OFFSETS = (0, 3, 7, 12)
_PLACES = (0.1, 0.5, 0.9)


def first_difference(ref: ChunkRef) -> int | None:
    """Return the first frame of a sample that decoders show differently; None if they agree.

    The reference, which decodes from the beginning of the file, takes part near the beginning.

    Args:
        ref: the file, with its packet index if it has one.

    Raises:
        DecodeError: when a decoder cannot read the file.
    """
    for number, place in enumerate(_PLACES):
        first = int(place * ref.num_frames)
        ids = tuple(sorted({min(first + offset, ref.num_frames - 1) for offset in _CLIP_OFFSETS}))
        readers = (read_planned, read_spanned, *([read_everything] if number == 0 else []))
        for frame_id, *shown in zip(ids, *(read(ClipPart(ref, ids)) for read in readers), strict=True):
            if len({_pixels(frame) for frame in shown}) > 1:
                return frame_id
    return None


def _pixels(frame: VideoFrame) -> bytes:
    return frame.to_ndarray(format="rgb24").tobytes()
