"""Compares what the header of a file declares with what the file contains.

This module runs in probing workers, so it imports only PyAV.
"""

from __future__ import annotations

from fractions import Fraction

import av
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from avion_dali.contracts import DecodeError

MAX_MISSING_SECONDS = 1.0  # a file may end this long before its stated duration (rounding, last frame)


def expected_seconds(container: InputContainer, stream: VideoStream) -> float | None:
    """Return the duration that the file's header states for its video stream.

    Args:
        container: the open file.
        stream: its video stream.

    Returns:
        Seconds, or None if the header has no duration of the video alone (a container's duration may be that of
        the audio).
    """
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    tag = stream.metadata.get("DURATION", "")  # Matroska: HH:MM:SS.nnnnnnnnn
    if tag.count(":") == 2:
        hours, minutes, seconds = tag.split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    if len(container.streams) == 1 and container.duration:
        return container.duration / av.time_base
    return None


def corrupt(name: str, cause: str) -> DecodeError:
    """Create the error of a file that cannot be used.

    Args:
        name: path of the file.
        cause: description of the problem.
    """
    return DecodeError(name, (), decoder="probe", kind="corrupt", cause=cause)


def check_index(name: str, stream: VideoStream, *, size_bytes: int) -> None:
    """Reject a file whose index refers to bytes after its end (a truncated mp4 keeps its index).

    Args:
        name: path of the file.
        stream: its video stream.
        size_bytes: size of the file.

    Raises:
        DecodeError: `corrupt`.
    """
    end = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
    if end > size_bytes:
        raise corrupt(name, f"is truncated: its index needs {end} bytes, the file has {size_bytes}")


def check_end(name: str, container: InputContainer, *, stream: VideoStream, extent: int) -> None:
    """Reject a file that ends well before the end that its header states.

    Args:
        name: path of the file.
        container: the open file.
        stream: its video stream.
        extent: end of the last picture in ticks.

    Raises:
        DecodeError: `corrupt`.
    """
    expected = expected_seconds(container, stream)
    if expected is None:
        return
    # Matroska counts its duration from zero, mp4 from the first frame.
    seconds = float(extent * (stream.time_base or Fraction(1, 1000)))
    if seconds < expected - MAX_MISSING_SECONDS:
        raise corrupt(name, f"ends after {seconds:.1f} s of {expected:.1f} s")


def check_size(name: str, declared: tuple[int, int], *, first: VideoFrame | None) -> None:
    """Reject a file whose header states another picture size than that of its pictures: one is damaged.

    Args:
        name: path of the file.
        declared: width and height in pixels.
        first: the first picture; None if it cannot be decoded.

    Raises:
        DecodeError: `corrupt`.
    """
    if first is not None and (first.width, first.height) != declared:
        says = "x".join(map(str, declared))
        raise corrupt(name, f"declares pictures of {says}, but they are {first.width}x{first.height}")
