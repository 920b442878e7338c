"""Encode one chunk: pictures made upright, small and BT.601, an mp4 that appears only when proven whole.

Runs in chunking workers: imports numpy and PyAV alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import numpy as np
from av.filter import Graph
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from avion_dali.contracts import DecodeError
from avion_dali.data.probe import color_range_name, colorspace_name, open_video, probe_chunk
from avion_dali.data.profiles import COLOR_RANGE_LIMITED, COLORSPACE_BT601, PIX_FMT, EncodeProfile
from avion_dali.files import partial_path, put_in_place

_SCALE_FLAGS = "bicubic+accurate_rnd+full_chroma_int"


def target_size(width: int, height: int, *, short_side: int) -> tuple[int, int]:
    """Size of the chunk for a picture: short side as asked or smaller, both sides multiples of 16.

    Hardware decoders reuse a session only where the display size equals the coded size, hence the 16. The
    long side is scaled to the nearest multiple rather than cropped: nothing of the picture is lost, and the
    aspect is off by at most 8 pixels of the long side (1.6 % of 512), far less than a random-resized crop
    changes it. Pictures are never enlarged, except that a side below 16 pixels becomes 16.

    Args:
        width: of the upright source picture, square pixels.
        height: of the upright source picture, square pixels.
        short_side: wanted short side, a multiple of 16.

    Returns:
        (width, height) in pixels.
    """

    def floor16(side: float) -> int:
        return max(int(side) // 16 * 16, 16)

    short, long = sorted((width, height))
    new_short = min(short_side, floor16(short))
    new_long = max(min(round(long * new_short / short / 16) * 16, floor16(long)), new_short)
    return (new_long, new_short) if width > height else (new_short, new_long)


def upright_filters(frame: VideoFrame) -> list[str]:
    """Filters that show a decoded frame as its display matrix asks.

    The matrix sends a source point (x, y) to (a x + c y, b x + d y), y downwards (FFmpeg,
    libavutil/display.h).

    Args:
        frame: a decoded frame.

    Returns:
        FFmpeg filters in order: at most one transposition, then mirrorings.

    Raises:
        ValueError: when the matrix turns by something else than quarter turns.
    """
    side_data: Any = frame.side_data.get("DISPLAYMATRIX")
    if side_data is None:
        return []
    a, b, _, c, d = np.frombuffer(bytes(side_data), dtype=np.int32)[:5].tolist()
    if a and d and not (b or c):
        turned, mirror_x, mirror_y = False, a < 0, d < 0
    elif b and c and not (a or d):
        turned, mirror_x, mirror_y = True, c < 0, b < 0
    else:
        raise ValueError(f"the display rotation of {frame.rotation} degrees is not a quarter turn")
    return ["transpose=cclock_flip"] * turned + ["hflip"] * mirror_x + ["vflip"] * mirror_y


class PictureFilter:
    """Filter graph from the decoded frames of one video to the pictures of its chunks.

    Args:
        pixel_aspect: width of a source pixel divided by its height.
        short_side: see `target_size`.
    """

    def __init__(self, pixel_aspect: Fraction, *, short_side: int) -> None:
        self._pixel_aspect = pixel_aspect
        self._short_side = short_side
        self._graph = Graph()
        self._graph.threads = 1
        self._source: tuple[int, int, str] | None = None

    def __call__(self, frame: VideoFrame) -> VideoFrame:
        """Turn one decoded frame into a chunk picture.

        Args:
            frame: a decoded frame; all of a video must have the size and format of the first.

        Returns:
            An upright `yuv420p` picture of the target size, limited-range BT.601.

        Raises:
            ValueError: when the frame differs from the first, or is turned by less than a quarter turn.
        """
        source = (frame.width, frame.height, frame.format.name)
        if self._source is None:
            self._build(frame)
            self._source = source
        if source != self._source:
            raise ValueError(f"the picture changes from {self._source} to {source} (width, height, format)")
        self._graph.vpush(frame)
        picture = self._graph.vpull()
        picture.pict_type = 0  # else the encoder repeats the source's choice of keyframes
        return picture

    def _build(self, first: VideoFrame) -> None:
        turns = upright_filters(first)
        # Scaling comes before turning, on the smaller picture, so its size is the one before the turn.
        turned = "transpose=cclock_flip" in turns
        width, height = round(first.width * self._pixel_aspect), first.height
        upright = (height, width) if turned else (width, height)
        new_width, new_height = target_size(*upright, short_side=self._short_side)
        if turned:
            new_width, new_height = new_height, new_width
        matrix, colour_range = _source_colour(first)
        steps = [
            f"scale={new_width}:{new_height}:flags={_SCALE_FLAGS}"
            f":in_color_matrix={matrix}:in_range={colour_range}:out_color_matrix=smpte170m:out_range=tv",
            f"format={PIX_FMT}",
            *turns,
            "setsar=1",
        ]
        source = self._graph.add(
            "buffer",
            video_size=f"{first.width}x{first.height}",
            pix_fmt=first.format.name,
            time_base="1/1",
            pixel_aspect="1/1",
        )
        nodes = [self._graph.add(*step.split("=", 1)) for step in steps]
        self._graph.link_nodes(source, *nodes, self._graph.add("buffersink")).configure()


def _source_colour(frame: VideoFrame) -> tuple[str, str]:
    """Matrix and range of a source in the scale filter's words; what is untagged counts as limited BT.601.

    That is FFmpeg's own assumption, and so what untagged videos were trained on so far.
    """
    if frame.format.is_rgb:
        return "auto", "auto"
    matrix = {"fcc": "fcc", "smpte240m": "smpte240m", "bt709": "bt709"}.get(
        colorspace_name(frame.colorspace), "smpte170m"
    )
    if colorspace_name(frame.colorspace).startswith("bt2020"):
        matrix = "bt2020"
    full = color_range_name(frame.color_range, frame.format.name) == "full"
    return matrix, "pc" if full else "tv"


class ChunkWriter:
    """Writes one chunk under a temporary name; `finish` proves it and gives it its own.

    As a context manager it deletes what an error left unfinished.

    Args:
        path: the chunk to make.
        profile: how to encode it.
        fps: constant frame rate.
    """

    def __init__(self, path: Path, profile: EncodeProfile, *, fps: Fraction) -> None:
        self._path = path
        self._profile = profile
        self._fps = fps
        self._frames = 0
        self._partial = partial_path(path)
        self._container = av.open(str(self._partial), "w", format="mp4", options={"movflags": "+faststart"})
        self._stream: VideoStream | None = None

    def write(self, picture: VideoFrame) -> None:
        """Append a picture; all must have one size.

        Args:
            picture: YUV 4:2:0, as `PictureFilter` makes them.

        Raises:
            OSError: when the file cannot be written, for example because the disk is full.
        """
        if self._stream is None:
            self._stream = self._add_stream(picture.width, picture.height)
        picture.pts, picture.time_base = self._frames, 1 / self._fps
        with _write_errors(self._partial):
            self._container.mux(self._stream.encode(picture))
        self._frames += 1

    def finish(self) -> None:
        """Complete the file, read it back and give it its name.

        Raises:
            OSError: when the file cannot be written.
            DecodeError: when what was written does not read back as intended.
        """
        assert self._stream is not None, "a chunk has at least one picture"
        with _write_errors(self._partial):
            self._container.mux(self._stream.encode(None))
            self._container.close()
        size = (self._stream.width, self._stream.height)
        verify_chunk(self._partial, frames=self._frames, fps=self._fps, size=size)
        put_in_place(self._partial, self._path)

    def _add_stream(self, width: int, height: int) -> VideoStream:
        options = dict(self._profile.options)
        stream = self._container.add_stream(self._profile.codec, rate=self._fps, options=options)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, PIX_FMT
        stream.gop_size = self._profile.gop
        stream.thread_count = 1  # the parallelism is over videos
        stream.colorspace, stream.color_range = COLORSPACE_BT601, COLOR_RANGE_LIMITED
        stream.codec_context.time_base = 1 / self._fps
        return stream

    def __enter__(self) -> ChunkWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(av.FFmpegError):  # closing writes the index, which may fail once more
            self._container.close()
        self._partial.unlink(missing_ok=True)


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """Tell FFmpeg's errors in writing from those in reading the source, which happen in turns."""
    try:
        yield
    except av.FFmpegError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from error


def write_chunk(path: Path, pictures: Iterable[VideoFrame], *, profile: EncodeProfile, fps: Fraction) -> None:
    """Write one chunk; it appears under its name when it is complete and proven, or not at all.

    Args:
        path: the chunk to make.
        pictures: at least one, all of one size.
        profile: how to encode it.
        fps: constant frame rate.

    Raises:
        OSError: when the file cannot be written.
        DecodeError: when what was written does not read back as intended.
    """
    with ChunkWriter(path, profile, fps=fps) as writer:
        for picture in pictures:
            writer.write(picture)
        writer.finish()


def verify_chunk(path: Path, *, frames: int, fps: Fraction, size: tuple[int, int]) -> None:
    """Check a chunk's facts and decode its first and last frame.

    Args:
        path: the file.
        frames: frames it must hold.
        fps: constant rate it must have.
        size: (width, height) it must have.

    Raises:
        DecodeError: `corrupt`, naming what differs.
    """
    facts = probe_chunk(path)
    found = (facts.num_frames, facts.fps if frames > 1 else fps, facts.is_cfr, facts.width, facts.height)
    wanted = (frames, fps, True, *size)
    if found != wanted:
        raise _unfit(path, f"holds (frames, fps, constant, width, height) {found}, not {wanted}")
    with open_video(path, decoder="chunker") as (container, stream):
        times = [frame.time for frame in islice(container.decode(stream), 1)]
        container.seek(stream.duration or 0, stream=stream)
        times += [frame.time for frame in container.decode(stream)]
    if not times or abs(times[-1] - times[0] - (frames - 1) / fps) > 0.1 / fps:
        raise _unfit(path, "its first or last frame cannot be decoded")


def _unfit(path: Path, cause: str) -> DecodeError:
    return DecodeError(str(path), (), decoder="chunker", kind="corrupt", cause=cause)
