"""Facts of one video file, read by demuxing: frame count, rate, timing, size, colour and rotation.

Nothing is decoded but the first keyframe (PyAV shows the display rotation on decoded frames only).
Imports numpy and PyAV alone, since decode workers share `open_video`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from avion_dali.contracts import DecodeError, FailureKind
from avion_dali.data.bitstream import shows_picture
from avion_dali.data.container_limits import OPEN_OPTIONS, ExcessiveClaimError, require_modest_header
from avion_dali.data.indexing import PacketCollector, make_packet

AUDIO_PRIMING_SECONDS = 0.1  # sound may begin this much early without meaning anything (AAC priming)
MAX_MISSING_SECONDS = 1.0  # a file may end this much before its stated duration (rounding, last frame)

# FFmpeg's AVColorSpace numbers (ITU-T H.273, table 4); PyAV's own enum leaves several out.
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


@dataclass(frozen=True, slots=True)
class ChunkFacts:
    """What a manifest must know of a video file.

    Args:
        path: the file, as given.
        size_bytes: file size.
        num_frames: frames in presentation order that a decoder delivers: those an edit list cuts, or that
            lean on frames before the first keyframe, are not counted.
        fps: frames per second: exact for a constant rate, else the average over the frames.
        width: coded picture width in pixels, before rotation.
        height: coded picture height in pixels, before rotation.
        codec: FFmpeg's codec name, such as `h264`, `hevc`, `vp9`.
        pix_fmt: FFmpeg's pixel format name, such as `yuv420p`.
        color_range: `limited`, `full` or `unspecified`.
        colorspace: FFmpeg's name of the YUV matrix, such as `smpte170m` (BT.601), `bt709`, `unspecified`.
        rotation: degrees counter-clockwise, in [0, 360), by which a player turns the pictures.
        start_s: seconds on a player's clock before the first frame; 0 nearly always.
        is_cfr: True when every frame lies within one clock tick of `index / fps`.
        frame_times: float64 (num_frames,), seconds after the first frame; None for a constant rate.
        packet_index: packed index of the packets; empty when not asked for or not possible.
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


@contextmanager
def open_video(
    path: str | os.PathLike[str], *, decoder: str = "probe", frame_ids: tuple[int, ...] = ()
) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a file and choose its video stream; the one place that does either.

    The stream decodes on the caller's thread. FFmpeg errors inside the `with` block leave it as
    `DecodeError` too, so that no decoder needs its own translation.

    Args:
        path: the video file.
        decoder: name that errors carry.
        frame_ids: wanted frames that errors carry.

    Yields:
        The open container and its best video stream.

    Raises:
        DecodeError: `missing` when the file cannot be opened at all, `corrupt` when it holds no readable
            video.
    """
    name = os.fspath(path)

    def failure(kind: FailureKind, cause: str) -> DecodeError:
        return DecodeError(name, frame_ids, decoder=decoder, kind=kind, cause=cause)

    try:
        if stat.S_ISDIR(os.stat(name).st_mode):
            raise failure("corrupt", "is a directory, not a video file")
        _require_modest_header(name, failure)
        opened = av.open(name, "r", options=OPEN_OPTIONS)
    except (FileNotFoundError, PermissionError, NotADirectoryError) as error:
        raise failure("missing", error.strerror or type(error).__name__) from error
    except av.FFmpegError as error:
        raise failure("corrupt", error.strerror or type(error).__name__) from error
    with opened as container:
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream):
            raise failure("corrupt", "holds no video stream")
        if stream.codec_context is None:
            raise failure("corrupt", "holds video of a codec that FFmpeg does not know")
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


def probe_chunk(path: str | os.PathLike[str], *, index: bool = False) -> ChunkFacts:
    """Read the facts of a video file.

    Args:
        path: the video file.
        index: make a packet index too.

    Returns:
        Its facts.

    Raises:
        DecodeError: `missing`, or `corrupt` when it is no video, is empty, or ends too early.
    """
    name = os.fspath(path)
    with open_video(path) as (container, stream), open(path, "rb") if index else nullcontext() as file:
        size_bytes = os.stat(path).st_size
        _check_index(name, stream, size_bytes)
        collector = PacketCollector(file.fileno(), container, stream) if file else None
        table = _scan(name, container, stream, collector)
        if not len(table.shown):
            raise _corrupt(name, "holds no decodable frame")
        tick = stream.time_base or Fraction(1, 1000)
        expected = expected_seconds(container, stream)
        if expected is not None and float(table.extent * tick) < expected - MAX_MISSING_SECONDS:
            raise _corrupt(name, f"ends after {float(table.extent * tick):.1f} s of {expected:.1f} s")
        fps, is_cfr = _rate(table.shown, tick, (stream.average_rate, stream.guessed_rate))
        context = stream.codec_context
        return ChunkFacts(
            path=name,
            size_bytes=size_bytes,
            num_frames=len(table.shown),
            fps=fps,
            width=context.width,
            height=context.height,
            codec=context.codec.canonical_name,
            pix_fmt=context.pix_fmt or "",
            color_range=color_range_name(context.color_range, context.pix_fmt or ""),
            colorspace=colorspace_name(context.colorspace),
            rotation=table.rotation,
            is_cfr=is_cfr,
            start_s=_start_seconds(container, int(table.shown[0]) * tick),
            frame_times=None if is_cfr else (table.shown - table.shown[0]) * float(tick),
            packet_index=collector.record(len(table.shown)) if collector else b"",
        )


def _start_seconds(container: InputContainer, first_frame: Fraction) -> float:
    """Seconds on a player's clock before the first frame, as where sound begins long before the picture."""
    if container.start_time is None or container.format.name == "avi":
        return 0.0
    seconds = float(first_frame - Fraction(container.start_time, 1_000_000))
    return seconds if seconds > AUDIO_PRIMING_SECONDS else 0.0


def color_range_name(color_range: int, pix_fmt: str) -> str:
    """Name FFmpeg's range number: `limited`, `full` or `unspecified`; the old `yuvj` formats are full."""
    if pix_fmt.startswith("yuvj"):
        return "full"
    return {1: "limited", 2: "full"}.get(color_range, "unspecified")


def colorspace_name(colorspace: int) -> str:
    """Name FFmpeg's YUV matrix number, such as `bt709`; unknown ones are `unspecified`."""
    return _COLORSPACES.get(colorspace, "unspecified")


def expected_seconds(container: InputContainer, stream: VideoStream) -> float | None:
    """Duration that the file's header promises for its video stream.

    Args:
        container: the open file.
        stream: its video stream.

    Returns:
        Seconds, or None when the header says nothing of the video alone (a container's total may be the
        audio's).
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


@dataclass(frozen=True, slots=True)
class _PacketTable:
    """What demuxing showed.

    Args:
        shown: int64 (num_frames,), sorted presentation times in ticks.
        extent: ticks up to the end of the last frame, from the first frame or from zero, whichever is
            more (Matroska counts its duration from zero, mp4 from the first frame).
        rotation: degrees counter-clockwise, in [0, 360).
    """

    shown: np.ndarray
    extent: int
    rotation: int


def _corrupt(name: str, cause: str) -> DecodeError:
    return DecodeError(name, (), decoder="probe", kind="corrupt", cause=cause)


def _check_index(name: str, stream: VideoStream, size_bytes: int) -> None:
    """Refuse a file whose own packet index points behind its end (an mp4 cut short keeps its index)."""
    end = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
    if end > size_bytes:
        raise _corrupt(name, f"is truncated: its index needs {end} bytes, the file has {size_bytes}")


def _scan(
    name: str, container: InputContainer, stream: VideoStream, collector: PacketCollector | None
) -> _PacketTable:
    """Walk over the packets; which of them become frames follows what FFmpeg's decoders drop."""
    rows: list[tuple[int | None, int | None, int, bool]] = []
    rotation, codec = 0, stream.codec_context.codec.canonical_name
    for packet in container.demux(stream):
        if not packet.size:  # the end of the stream, or a frame that an AVI says to repeat
            continue
        if packet.is_corrupt:
            raise _corrupt(name, "holds a damaged packet")
        if not rows:
            if not packet.is_keyframe:
                continue  # nothing before the first keyframe can be decoded
            rotation = _rotation(stream, bytes(packet))
        if collector is not None:
            collector.add(packet)
        hidden = packet.is_discard or not shows_picture(memoryview(packet), codec=codec)
        rows.append((packet.pts, packet.dts, packet.duration or 0, hidden))
    # AVI carries decoding times only; their sorted order has the same spacing as presentation times.
    column = 1 if any(row[0] is None for row in rows) else 0
    if any(row[column] is None for row in rows):
        raise _corrupt(name, "has packets without a time")
    ticks = np.array([row[column] for row in rows], dtype=np.int64)
    # Pictures shown before the first keyframe (open GOPs, cut files) lean on pictures that are not there.
    kept = np.array([not row[3] for row in rows], dtype=bool) & (ticks >= ticks[:1])
    ends = ticks + np.array([row[2] for row in rows], dtype=np.int64)
    shown = np.sort(ticks[kept])
    if len(shown) > 1 and shown[0] == shown[-1]:
        raise _corrupt(name, "shows all its frames at one time")
    extent = int(ends[kept].max() - min(shown[0], 0)) if len(shown) else 0
    return _PacketTable(shown, extent, rotation)


def _rotation(stream: VideoStream, keyframe: bytes) -> int:
    """Display rotation in [0, 360) degrees counter-clockwise."""
    # A bare copy of the packet: with its flags, a keyframe that an edit list hides would give no frame.
    context = stream.codec_context
    frames = [*context.decode(make_packet(keyframe, 0)), *context.decode(None)]
    return frames[0].rotation % 360 if frames else 0


def _rate(ticks: np.ndarray, tick: Fraction, stated: tuple[Fraction | None, ...]) -> tuple[Fraction, bool]:
    """Frame rate and whether it is constant: the plainest rate that the times fit, else their average."""
    rates = [rate for rate in stated if rate]
    if len(ticks) == 1:
        return (rates or [Fraction(25)])[0], True
    exact = (len(ticks) - 1) / (int(ticks[-1] - ticks[0]) * tick)
    average = exact.limit_denominator(100_000)
    # A header's average over a short file is off by the rounding of its clock (19001/317 for 59.94), so
    # whole and NTSC rates are tried first.
    ntsc = Fraction(1000, 1001)
    near = sorted([Fraction(round(exact)), round(exact / ntsc) * ntsc], key=lambda rate: abs(rate - exact))
    plain = [rate for rate in rates if rate.denominator in (1, 1001)]
    seconds = (ticks - ticks[0]) * float(tick)
    for rate in (*plain, *near, *rates, average):
        # Times are rounded to ticks; where a tick is as coarse as a frame (AVI) no rounding is excused.
        tolerance = min(float(tick), 0.25 / max(float(rate), 1.0)) * 1.001
        if rate and np.abs(seconds - np.arange(len(ticks)) / float(rate)).max() <= tolerance:
            return rate, True
    return average, False
