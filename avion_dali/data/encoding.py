"""Encodes one chunk: pictures are made upright, small and BT.601; the mp4 gets its name only after a check.

This module runs in chunking workers, so it imports only numpy and PyAV.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import av
import numpy as np
from av.filter import Graph
from av.sidedata.sidedata import Type as SideDataType
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from avion_dali.contracts import DecodeError
from avion_dali.data.colors import color_range_name, colorspace_name
from avion_dali.data.probe import open_video, probe_chunk
from avion_dali.data.profiles import COLOR_RANGE_LIMITED, COLORSPACE_BT601, PIX_FMT, EncodeProfile
from avion_dali.files import partial_path, put_in_place

_LOOK_SIDE = 16
# Limits in gray levels: of the difference to the source picture, and of how much closer another picture may be.
_MAX_LOOK_DIFFERENCE, _LOOK_SLACK = 16.0, 2.0
_MAX_OFF_FRAMES = 0.1
_NEWER_KINDS = 16  # number of side data kinds that FFmpeg may have beyond those known to PyAV
_SCALE_FLAGS = "bicubic+accurate_rnd+full_chroma_int"


def target_size(width: int, height: int, *, short_side: int) -> tuple[int, int]:
    """Return the size of a chunk's pictures: the given short side or less, both sides multiples of 16.

    Hardware decoders reuse a session only if the display size equals the coded size, hence the multiples of 16.
    The long side is scaled to the nearest multiple instead of being cropped: nothing of the picture is lost,
    and the aspect ratio is off by at most 8 pixels of the long side (1.6 % of 512), far less than by a
    random-resized crop. Pictures are never enlarged, except that a side below 16 pixels becomes 16.

    Args:
        width: width of the upright source picture in square pixels.
        height: height of the upright source picture in square pixels.
        short_side: requested short side, a multiple of 16.

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
    """Return the filters that show a decoded frame according to its display matrix.

    The matrix maps a source point (x, y) to (a x + c y, b x + d y), with y pointing down (FFmpeg,
    libavutil/display.h).

    Args:
        frame: a decoded frame.

    Returns:
        FFmpeg filters in order: at most one transposition, then reflections.

    Raises:
        ValueError: when the matrix rotates by anything other than quarter turns.
    """
    a, b, c, d = _display_matrix(frame)
    if a * d == b * c:  # no matrix, or one that would leave nothing to see: players ignore it
        return []
    if a and d and not (b or c):
        turned, mirror_x, mirror_y = False, a < 0, d < 0
    elif b and c and not (a or d):
        turned, mirror_x, mirror_y = True, c < 0, b < 0
    else:
        raise ValueError(f"the display rotation of {frame.rotation} degrees is not a quarter turn")
    return ["transpose=cclock_flip"] * turned + ["hflip"] * mirror_x + ["vflip"] * mirror_y


def _display_matrix(frame: VideoFrame) -> tuple[int, int, int, int]:
    """Return the numbers a, b, c, d of a frame's display matrix; zeros if it has none."""
    try:
        side_data: Any = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV names all side data of a frame together, and does not know newer kinds
        side_data = _with_nameable_side_data(frame).side_data.get("DISPLAYMATRIX")
    if side_data is None:
        return 0, 0, 0, 0
    a, b, _, c, d = np.frombuffer(bytes(side_data), dtype=np.int32)[:5].tolist()
    return a, b, c, d


def _with_nameable_side_data(frame: VideoFrame) -> VideoFrame:
    """Return a frame without the kinds of side data that this PyAV does not know (EXIF, view ids)."""
    named = max(int(cast(Any, kind).value) for kind in cast(Any, SideDataType))
    graph = Graph()
    graph.threads = 1
    picture = (f"{frame.width}x{frame.height}", frame.format.name)
    source = graph.add("buffer", video_size=picture[0], pix_fmt=picture[1], time_base="1/1", pixel_aspect="1/1")
    kinds = range(named + 1, named + 1 + _NEWER_KINDS)
    steps = [graph.add("sidedata", f"mode=delete:type={kind}") for kind in kinds]
    graph.link_nodes(source, *steps, graph.add("buffersink")).configure()
    graph.vpush(frame)
    return graph.vpull()


class PictureFilter:
    """Filter graph that converts the decoded frames of one video to the pictures of its chunks.

    All pictures have the size that is computed for the first one. If the source changes (joined recordings),
    later pictures are fitted into that size with black bars.

    Args:
        pixel_aspect: width of a source pixel divided by its height.
        short_side: see `target_size`.
    """

    def __init__(self, pixel_aspect: Fraction, *, short_side: int) -> None:
        self.pixel_aspect = pixel_aspect
        self.changes = 0  # number of changes of the source's size, format or pixel aspect ratio
        self._short_side = short_side
        self._target: tuple[int, int] | None = None
        self._source: tuple[object, ...] | None = None

    def __call__(self, frame: VideoFrame) -> VideoFrame:
        """Convert one decoded frame to a chunk picture.

        Args:
            frame: a decoded frame.

        Returns:
            An upright `yuv420p` picture of the target size, limited-range BT.601.

        Raises:
            ValueError: when the rotation is not a multiple of a quarter turn.
        """
        source = (frame.width, frame.height, frame.format.name, self.pixel_aspect)
        if source != self._source:
            self.changes += self._source is not None
            self._build(frame)
            self._source = source
        self._graph.vpush(frame)
        picture = self._graph.vpull()
        picture.pict_type = 0  # otherwise the encoder copies the source's choice of keyframes
        return picture

    def _build(self, like: VideoFrame) -> None:
        turns = upright_filters(like)
        # Scaling precedes rotation, because it makes the picture smaller; its size is that before the rotation.
        turned = "transpose=cclock_flip" in turns
        width, height = max(round(like.width * self.pixel_aspect), 1), like.height
        upright = (height, width) if turned else (width, height)
        if self._target is None:
            self._target = target_size(*upright, short_side=self._short_side)
        fitted = fit_inside(*upright, self._target)
        new_width, new_height = fitted[::-1] if turned else fitted
        matrix, color_range = _source_color(like)
        steps = [
            f"scale={new_width}:{new_height}:flags={_SCALE_FLAGS}"
            f":in_color_matrix={matrix}:in_range={color_range}:out_color_matrix=smpte170m:out_range=tv",
            f"format={PIX_FMT}",
            *turns,
            "setsar=1",
        ]
        if fitted != self._target:
            steps.append("pad={}:{}:(ow-iw)/2:(oh-ih)/2".format(*self._target))
        self._graph = Graph()
        self._graph.threads = 1
        source = self._graph.add(
            "buffer",
            video_size=f"{like.width}x{like.height}",
            pix_fmt=like.format.name,
            time_base="1/1",
            pixel_aspect="1/1",
        )
        nodes = [self._graph.add(*step.split("=", 1)) for step in steps]
        self._graph.link_nodes(source, *nodes, self._graph.add("buffersink")).configure()


def fit_inside(width: int, height: int, target: tuple[int, int]) -> tuple[int, int]:
    """Return the even size that fills a target except for bars; the target itself if the shapes agree.

    Args:
        width: width of an upright picture in square pixels.
        height: height of this picture.
        target: (width, height) to fill.
    """
    scale = min(target[0] / width, target[1] / height)
    # The sides of the target are rounded to 16 pixels, so a difference of this size is ignored.
    if max(abs(width * scale - target[0]), abs(height * scale - target[1])) <= 16:
        return target
    fitted = (width * scale, height * scale)
    return max(round(fitted[0] / 2) * 2, 2), max(round(fitted[1] / 2) * 2, 2)


def _source_color(frame: VideoFrame) -> tuple[str, str]:
    """Return matrix and range of a source in terms of the scale filter; untagged sources are limited BT.601.

    This is FFmpeg's assumption as well, so it keeps the colors with which untagged videos were trained so far.
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
    """Writes one chunk under a temporary name; `finish` verifies it and gives it its final name.

    As a context manager, it deletes an unfinished file after an error.

    Args:
        path: the chunk to create.
        profile: how to encode it.
        fps: constant frame rate.
    """

    def __init__(self, path: Path, profile: EncodeProfile, *, fps: Fraction) -> None:
        self._path = path
        self._profile = profile
        self._fps = fps
        self._frames = 0
        self._partial = partial_path(path)
        # An absolute path, because FFmpeg interprets the part before a colon as a protocol.
        self._container = av.open(
            str(self._partial.absolute()), "w", format="mp4", options={"movflags": "+faststart"}
        )
        self._stream: VideoStream | None = None

    def write(self, picture: VideoFrame) -> None:
        """Append a picture; all pictures must have the same size.

        Args:
            picture: YUV 4:2:0, as created by `PictureFilter`.

        Raises:
            OSError: when the file cannot be written, for example because the disk is full.
        """
        if self._stream is None:
            self._stream = self._add_stream(picture.width, picture.height)
        picture.pts, picture.time_base = self._frames, 1 / self._fps
        with _write_errors(self._partial):
            self._container.mux(self._stream.encode(picture))
        self._frames += 1

    def finish(self, looks: Mapping[int, np.ndarray] | None = None) -> None:
        """Complete the file, read it back and give it its final name.

        Args:
            looks: see `verify_chunk`.

        Raises:
            OSError: when the file cannot be written.
            DecodeError: when the file that is read back differs from what was written.
        """
        assert self._stream is not None, "a chunk has at least one picture"
        with _write_errors(self._partial):
            self._container.mux(self._stream.encode(None))
            self._container.close()
        size = (self._stream.width, self._stream.height)
        verify_chunk(self._partial, frames=self._frames, fps=self._fps, size=size, looks=looks)
        put_in_place(self._partial, self._path)

    def _add_stream(self, width: int, height: int) -> VideoStream:
        options = dict(self._profile.options)
        stream = self._container.add_stream(self._profile.codec, rate=self._fps, options=options)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, PIX_FMT
        stream.gop_size = self._profile.gop
        stream.thread_count = 1  # videos are encoded in parallel
        stream.colorspace, stream.color_range = COLORSPACE_BT601, COLOR_RANGE_LIMITED
        stream.codec_context.time_base = 1 / self._fps
        return stream

    def __enter__(self) -> ChunkWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        with suppress(av.FFmpegError):  # closing writes the index, which may fail again
            self._container.close()
        self._partial.unlink(missing_ok=True)


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """Distinguish FFmpeg's write errors from errors in reading the source, which alternates with writing."""
    try:
        yield
    except av.FFmpegError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from error


def write_chunk(path: Path, pictures: Iterable[VideoFrame], *, profile: EncodeProfile, fps: Fraction) -> None:
    """Write one chunk; it appears under its name only when it is complete and verified.

    Args:
        path: the chunk to create.
        pictures: at least one picture, all of one size.
        profile: how to encode it.
        fps: constant frame rate.

    Raises:
        OSError: when the file cannot be written.
        DecodeError: when the file that is read back differs from what was written.
    """
    with ChunkWriter(path, profile, fps=fps) as writer:
        for picture in pictures:
            writer.write(picture)
        writer.finish()


def look_of(picture: VideoFrame) -> np.ndarray:
    """Return a thumbnail of a picture: 16 x 16 gray levels, float32.

    Args:
        picture: a chunk picture; its sides are multiples of 16.
    """
    luma = picture.planes[0]
    rows = np.frombuffer(memoryview(luma), np.uint8).reshape(luma.height, luma.line_size)[:, : luma.width]
    blocks = rows.reshape(_LOOK_SIDE, luma.height // _LOOK_SIDE, _LOOK_SIDE, luma.width // _LOOK_SIDE)
    return blocks.mean(axis=(1, 3), dtype=np.float32)


def verify_chunk(
    path: Path,
    *,
    frames: int,
    fps: Fraction,
    size: tuple[int, int],
    looks: Mapping[int, np.ndarray] | None = None,
) -> None:
    """Check a chunk's facts, decode all of it, and compare some pictures with their source pictures.

    Args:
        path: the file.
        frames: number of frames it must have.
        fps: constant rate it must have.
        size: (width, height) it must have.
        looks: `look_of` source pictures by their position in the chunk, as computed from their own times.

    Raises:
        DecodeError: `corrupt`; the message states the difference.
    """
    facts = probe_chunk(path)
    # A short chunk fits several rates (29.97 and 30000/1001), so the time of its last frame is compared.
    off = abs((frames - 1) / facts.fps - (frames - 1) / fps) * fps
    found = (facts.num_frames, facts.is_cfr, facts.width, facts.height)
    if found != (frames, True, *size) or off > _MAX_OFF_FRAMES:
        raise _unfit(
            path,
            f"has (frames, fps, constant, width, height) {(found[0], facts.fps, *found[1:])}, "
            f"not {(frames, fps, True, *size)}",
        )
    times, shown = [], {}
    with open_video(path, decoder="chunker") as (container, stream):
        for number, frame in enumerate(container.decode(stream)):
            times.append(frame.time)
            if looks and number in looks:
                shown[number] = look_of(frame)
    if len(times) != frames or abs(times[-1] - times[0] - (frames - 1) / fps) > _MAX_OFF_FRAMES / fps:
        raise _unfit(path, f"{len(times)} of its {frames} frames can be decoded")
    if looks:
        _compare(path, looks, shown=shown, fps=fps)


def _compare(
    path: Path, looks: Mapping[int, np.ndarray], *, shown: Mapping[int, np.ndarray], fps: Fraction
) -> None:
    """Check that each picture matches the source picture of its time better than the other pictures do."""
    for number, look in looks.items():
        found = shown.get(number)
        own = np.inf if found is None else float(np.abs(found - look).mean())
        others = [np.abs(found - other).mean() for other in looks.values()] if found is not None else []
        if own > _MAX_LOOK_DIFFERENCE or own > min(others) + _LOOK_SLACK:
            at = float(number / fps)
            raise _unfit(path, f"shows a different picture than the source {at:.2f} s after its start")


def _unfit(path: Path, cause: str) -> DecodeError:
    return DecodeError(str(path), (), decoder="chunker", kind="corrupt", cause=cause)
