"""Reads facts of a video file by demuxing: frame count, rate, timing, size, color and rotation.

In plain streams, only the first keyframe is decoded (PyAV provides the rotation only on decoded frames). If
packets do not determine which pictures the decoder delivers, the file is decoded and its pictures are counted.
Decode workers use `open_video`, so this module imports only numpy and PyAV.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from fractions import Fraction
from typing import BinaryIO

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from avion_dali.contracts import DecodeError, FailureKind
from avion_dali.data.avi import AviFrames, find_avi_frames
from avion_dali.data.colors import color_range_name, colorspace_name
from avion_dali.data.container_limits import OPEN_OPTIONS, ByteSpan, ExcessiveClaimError, require_modest_header
from avion_dali.data.declared import check_end, check_index, check_size, corrupt
from avion_dali.data.delivery import TolerantReader, decode_strictly
from avion_dali.data.indexing import PacketCollector, tells_order
from avion_dali.data.survey import PacketSurvey, survey_packets
from avion_dali.data.timing import SLOW_FPS, complete_times, densest_rate, measure_rate

_LINGERING_S = 0.25


@dataclass(frozen=True, slots=True)
class ChunkFacts:
    """Facts of a video file that a manifest needs.

    Args:
        path: path of the file, as given.
        size_bytes: size of the file.
        num_frames: number of frames that a decoder delivers, in presentation order; frames that an edit list
            removes, or that refer to frames before the first keyframe, are not counted.
        fps: frames per second: exact for a constant rate, otherwise the average.
        width: coded picture width in pixels, before rotation.
        height: coded picture height in pixels, before rotation.
        codec: FFmpeg's codec name, such as `h264`, `hevc`, `vp9`.
        pix_fmt: FFmpeg's pixel format name, such as `yuv420p`.
        color_range: `limited`, `full` or `unspecified`.
        colorspace: FFmpeg's name of the YUV matrix, such as `smpte170m` (BT.601), `bt709`, `unspecified`.
        rotation: degrees counter-clockwise, in [0, 360), by which a player rotates the pictures.
        start_s: seconds on a player's clock before the first frame; usually 0.
        is_cfr: whether every frame lies within one clock tick of `index / fps`.
        frame_times: float64 (num_frames,), seconds after the first frame; None for a constant rate.
        packet_index: packed index of the packets; empty if it was not requested or is not possible.
        first_s: stated time of the first frame, in seconds of the stream's clock.
        is_counted: whether frames were decoded and counted, because the packets do not determine them.
        last_s: seconds for which the last frame is shown.
        densest_fps: frames per second in the densest passage; `fps` for a constant rate.
        pixel_aspect: width of a pixel divided by its height.
        is_interlaced: whether the first frame consists of two fields.
        transfer: FFmpeg's number of the transfer characteristics; 2 if unspecified.
        primaries: FFmpeg's number of the color primaries; 2 if unspecified.
    """

    path: str
    size_bytes: int
    num_frames: int
    fps: Fraction
    width: int
    height: int
    codec: str
    pix_fmt: str
    color_range: str
    colorspace: str
    rotation: int
    is_cfr: bool
    start_s: float = 0.0
    frame_times: np.ndarray | None = field(default=None, compare=False)
    packet_index: bytes = field(default=b"", compare=False, repr=False)
    first_s: Fraction = Fraction(0)
    is_counted: bool = False
    last_s: float = 0.0
    densest_fps: Fraction = Fraction(0)
    pixel_aspect: Fraction = Fraction(1)
    is_interlaced: bool = False
    transfer: int = 2
    primaries: int = 2

    @property
    def lingers(self) -> bool:
        """Whether the last picture is shown for longer than the others."""
        return self.last_s > max(2 / float(self.fps), _LINGERING_S)

    def end_s(self) -> float:
        """Return the end of the last frame in seconds of a player's clock."""
        last = (self.num_frames - 1) / float(self.fps) if self.frame_times is None else self.frame_times[-1]
        return self.start_s + float(last) + (self.last_s or float(1 / self.fps))

    def clock_times(self) -> np.ndarray | None:
        """Return the time of each frame in seconds of a player's clock; None if frame i is shown at `i / fps`.

        A low constant rate has times as well: if pictures are shown for long, the one shown at a time is used,
        not the nearest one.
        """
        times = self.frame_times
        if times is None and not self.start_s and self.fps >= SLOW_FPS and not self.lingers:
            return None
        return self.start_s + (np.arange(self.num_frames) / float(self.fps) if times is None else times)


@contextmanager
def open_video(
    path: str | os.PathLike[str],
    *,
    decoder: str = "probe",
    frame_ids: tuple[int, ...] = (),
    span: ByteSpan | None = None,
) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a file and choose its video stream; no other function does this.

    The stream decodes on the caller's thread. FFmpeg errors inside the `with` block are converted to
    `DecodeError`, so decoders need not convert them.

    Args:
        path: the video file.
        decoder: name of the decoder in errors.
        frame_ids: the wanted frames in errors.
        span: one of several recordings in the file; None for the whole file.

    Yields:
        The open container and its best video stream.

    Raises:
        DecodeError: `missing` when the file cannot be opened at all, `corrupt` when it contains no readable
            video.
    """
    name = os.fspath(path)

    def failure(kind: FailureKind, cause: str) -> DecodeError:
        return DecodeError(name, frame_ids, decoder=decoder, kind=kind, cause=cause)

    try:
        if stat.S_ISDIR(os.stat(name).st_mode):
            raise failure("corrupt", "is a directory, not a video file")
        _require_modest_header(name, failure)
        # An absolute path: FFmpeg takes what stands before a colon for a protocol.
        address = os.path.abspath(name)
        if span is not None:
            address = f"subfile,,start,{span[0]},end,{span[1]},,:{address}"
        # Tags are not read; old ones need not be UTF-8.
        opened = av.open(address, "r", options=OPEN_OPTIONS, metadata_errors="replace")
    except (FileNotFoundError, PermissionError, NotADirectoryError) as error:
        raise failure("missing", error.strerror or type(error).__name__) from error
    except av.FFmpegError as error:
        raise failure("corrupt", error.strerror or type(error).__name__) from error
    with opened as container:
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream):
            raise failure("corrupt", "contains no video stream")
        if stream.codec_context is None:
            raise failure("corrupt", "contains video of a codec that FFmpeg does not know")
        stream.thread_count = 1
        try:
            yield container, stream
        except av.FFmpegError as error:
            raise failure("corrupt", error.strerror or type(error).__name__) from error


def _require_modest_header(name: str, failure: Callable[[FailureKind, str], DecodeError]) -> None:
    try:
        with open(name, "rb", buffering=0) as file:
            require_modest_header(file.fileno())
    except ExcessiveClaimError as error:
        raise failure("corrupt", str(error)) from error


def probe_chunk(
    path: str | os.PathLike[str], *, index: bool = False, tolerant: bool = False, span: ByteSpan | None = None
) -> ChunkFacts:
    """Read the facts of a video file.

    Args:
        path: the video file.
        index: whether to create a packet index.
        tolerant: whether to describe the undamaged part of a damaged file instead of raising an error.
        span: one of several recordings in the file, without an index; None for the whole file.

    Returns:
        The facts of the file.

    Raises:
        DecodeError: `missing`, or `corrupt` when the file is not a video, is empty, or ends too early.
    """
    name = os.fspath(path)
    with open_video(path, span=span) as (container, stream), _opened_if(index, path) as file:
        check_index(name, stream, size_bytes=span[1] - span[0] if span else os.stat(path).st_size)
        declared = (stream.codec_context.width, stream.codec_context.height)
        collector = PacketCollector(file.fileno(), container, stream) if file else None
        survey = survey_packets(container, stream, collector=collector, name=name, tolerant=tolerant)
        _check_order(name, None if tolerant else collector)
        stated = (stream.average_rate, stream.guessed_rate)
        reading = _Reading(name, span, tolerant)
        shown, first, is_counted = _shown_pictures(reading, container, survey=survey, stated=stated)
        tick = stream.time_base or Fraction(1, 1000)
        last_duration = _last_duration(container, stream, survey=survey, shown=shown)
        if not tolerant:
            extent = int(shown[-1]) + last_duration - min(int(shown[0]), 0)
            check_end(name, container, stream=stream, extent=extent)
            check_size(name, declared, first=first)
        fps, is_cfr = measure_rate(shown, tick, stated=stated)
        context = stream.codec_context
        return ChunkFacts(
            path=name,
            size_bytes=os.stat(path).st_size,
            num_frames=len(shown),
            fps=fps,
            width=context.width,
            height=context.height,
            codec=context.codec.canonical_name,
            pix_fmt=context.pix_fmt or "",
            color_range=color_range_name(context.color_range, context.pix_fmt or ""),
            colorspace=colorspace_name(context.colorspace),
            rotation=rotation_of(first),
            is_cfr=is_cfr,
            start_s=_start_seconds(container, int(shown[0]) * tick, fps=fps),
            first_s=int(shown[0]) * tick,
            frame_times=None if is_cfr else (shown - shown[0]) * float(tick),
            packet_index=collector.record(shown) if collector else b"",
            is_counted=is_counted,
            last_s=float(last_duration * tick) or float(1 / fps),
            densest_fps=fps if is_cfr else densest_rate((shown - shown[0]) * float(tick), stated),
            pixel_aspect=Fraction(stream.sample_aspect_ratio or 1),
            is_interlaced=first is not None and first.interlaced_frame,
            transfer=int(context.color_trc),
            primaries=int(context.color_primaries),
        )


def avi_frames(path: str | os.PathLike[str], *, span: ByteSpan | None) -> AviFrames | None:
    """Return the frames of an AVI file that lost some; see `find_avi_frames`.

    Args:
        path: the video file.
        span: one of several recordings in the file; None for the whole file.

    Raises:
        DecodeError: when the file cannot be opened.
    """
    with open_video(path, span=span) as (container, stream):
        return find_avi_frames(path, container, stream, span=span)


@dataclass(frozen=True, slots=True)
class _Reading:
    """Which recording is read, and whether damage is ignored."""

    name: str
    span: ByteSpan | None
    is_tolerant: bool


def _shown_pictures(
    reading: _Reading,
    container: InputContainer,
    *,
    survey: PacketSurvey,
    stated: tuple[Fraction | None, ...],
) -> tuple[np.ndarray, VideoFrame | None, bool]:
    """Return the times of the pictures that are shown, the first picture, and whether they were counted."""
    name = reading.name
    avi = avi_frames(name, span=reading.span) if container.format.name == "avi" else None
    if avi is not None and avi.gaps and not reading.is_tolerant:
        raise corrupt(name, f"lacks {avi.total - len(avi.numbers)} of its {avi.total} packets")
    if avi is not None and reading.is_tolerant:
        shown, first = _count_frames_of_avi(reading, survey, avi)
        return shown, first, True
    shown, first = survey.shown, survey.first_picture
    if not survey.tells:
        shown, first = _count_pictures(reading, survey, stated)
    _check_times(name, shown)
    return shown, first, not survey.tells


def _opened_if(wanted: bool, path: str | os.PathLike[str]) -> AbstractContextManager[BinaryIO | None]:
    return open(path, "rb") if wanted else nullcontext()


def _check_order(name: str, collector: PacketCollector | None) -> None:
    if collector is not None and not collector.is_ordered():
        raise corrupt(name, "its container states another order of pictures than the pictures themselves")


def _check_times(name: str, shown: np.ndarray) -> None:
    if not len(shown):
        raise corrupt(name, "contains no decodable frame")
    if len(shown) > 1 and shown[0] == shown[-1]:
        raise corrupt(name, "shows all its frames at the same time")


def is_turned(path: str | os.PathLike[str]) -> bool:
    """Return whether a player rotates the pictures of a video, according to its first one.

    Args:
        path: the video file.

    Raises:
        DecodeError: when the file cannot be read.
    """
    with open_video(path) as (container, stream):
        first = next(iter(TolerantReader(container, stream)), None)
        return bool(rotation_of(first.frame if first else None))


def _start_seconds(container: InputContainer, first_frame: Fraction, *, fps: Fraction) -> float:
    """Return the seconds on a player's clock before the first frame, if sound begins before the picture.

    Less than half a frame is not a delay: it is caused by the priming of an audio encoder.
    """
    seconds = first_frame - Fraction(container.start_time or 0, 1_000_000)
    return float(seconds) if seconds * 2 > 1 / fps else 0.0


def _last_duration(
    container: InputContainer, stream: VideoStream, *, survey: PacketSurvey, shown: np.ndarray
) -> int:
    """Return the number of ticks for which the last picture is shown; 0 if the container does not state it.

    The table of an mp4 contains decoding times: if pictures are reordered, the last one shown is not the one
    decoded last, whose duration is in the table.
    """
    if "mp4" not in container.format.name or not stream.frames or not stream.duration:
        return survey.last_duration  # fragmented files have no such table
    by_table = stream.duration - int(shown[-1] - shown[0])
    return max(survey.last_duration, min(by_table, survey.last_decoded_duration))


def _count_pictures(
    reading: _Reading, survey: PacketSurvey, stated: tuple[Fraction | None, ...]
) -> tuple[np.ndarray, VideoFrame | None]:
    """Decode a file whose packets do not determine its pictures; return their times and the first picture."""
    times: list[int | None] = []
    first: VideoFrame | None = None
    with open_video(reading.name, span=reading.span) as (container, stream):
        whole = (delivered.frame for delivered in TolerantReader(container, stream))
        for frame in whole if reading.is_tolerant else decode_strictly(container, stream):
            first = first or frame
            times.append(frame.pts)
        rate = next((rate for rate in stated if rate), Fraction(25))
        step = 1 / (rate * (stream.time_base or Fraction(1, 1000)))
        if not tells_order(container, stream):
            # Sorted decoding times have the spacing of the presentation times, which AVI does not store.
            decoding = np.sort(survey.decoding)
            same = len(decoding) == len(times) and bool((np.diff(decoding) > 0).all())
            return decoding if same else complete_times([None] * len(times), step), first
    return complete_times(times, step), first


def _count_frames_of_avi(
    reading: _Reading, survey: PacketSurvey, avi: AviFrames
) -> tuple[np.ndarray, VideoFrame | None]:
    """Return the times that the frames of a damaged AVI file had, and the first picture."""
    with open_video(reading.name, span=reading.span) as (container, stream):
        first = next(iter(TolerantReader(container, stream, avi=avi)), None)
    begin = int(survey.decoding.min()) if len(survey.decoding) else 0
    return begin + np.arange(avi.total), first.frame if first else None


def rotation_of(frame: VideoFrame | None) -> int:
    """Return the degrees, in [0, 360), by which a player rotates a picture counter-clockwise.

    Args:
        frame: a decoded frame, or None.
    """
    # For a zero matrix FFmpeg returns the least integer as its angle; players do not rotate in this case.
    return frame.rotation % 360 if frame is not None and abs(frame.rotation) <= 360 else 0
