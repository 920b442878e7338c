"""Renders a decoded YUV frame as the square RGB picture of a model's input.

`FusedView` crops before all other operations. `ReferenceView` crops last; its result differs by the rounding of
a different scaler.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from av.filter import Graph
from av.filter.context import FilterContext
from av.video.frame import VideoFrame
from PIL import Image

from avion_dali.contracts import CropWindow

# Measured against exact BT.601 with antialiased bilinear scaling: worst frame 52.9 dB, bias 0.06 levels.
# swscale's default flags use the nearest chroma sample and have a bias of up to 2.9 levels.
SCALE_FLAGS = "bilinear+full_chroma_int:in_chroma_loc=center"
_FULL_FRAME_FLAGS = "bilinear+full_chroma_int+accurate_rnd:in_chroma_loc=center"


@dataclass(frozen=True, slots=True)
class _Picture:
    """Properties of a filter graph's input frames and of its output."""

    width: int
    height: int
    pixel_format: str
    colorspace: int
    color_range: int
    flip: bool
    frame_size: int


class FusedView:
    """Crops, scales, flips and converts to RGB in one filter graph, without a full-size RGB frame.

    Source: AVION, arXiv 2309.16669, section 4.1 and appendix A. In addition, pictures pass through planar RGB,
    for which FFmpeg has vectorized conversions: this takes half the time of converting to packed RGB directly.

    Args:
        graph: a graph created by `_fused_graph`.
        crop: the crop filter of the graph.
        window: the crop window in source pixels.
    """

    def __init__(self, graph: Graph, crop: FilterContext, window: CropWindow) -> None:
        self._graph = graph
        for name, value in zip("whxy", (window.width, window.height, window.x, window.y), strict=True):
            crop.process_command(name, str(value))

    def render(self, frame: VideoFrame) -> np.ndarray:
        """Return uint8 (H, W, 3) RGB as a view of the filter's buffer.

        Args:
            frame: a decoded frame of the clip.
        """
        self._graph.vpush(frame)
        return _rgb_view(self._graph.vpull())


def fused_view(like: VideoFrame, window: CropWindow, *, flip: bool, frame_size: int) -> FusedView:
    """Reuse the graph of earlier clips with another crop window.

    Args:
        like: a frame of the clip, which determines size, pixel format and color tags of the graph.
        window: the crop window in source pixels.
        flip: whether to mirror left to right.
        frame_size: side length of the output in pixels.
    """
    return FusedView(*_kept_graph(_picture(like, flip, frame_size)), window)


class SizedView:
    """Crops, scales to any size and converts to RGB, with the filters of `FusedView`.

    Args:
        graph: a graph created by `sized_view`.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    def render(self, frame: VideoFrame) -> np.ndarray:
        """Return uint8 (H, W, 3) RGB as a view of the filter's buffer.

        Args:
            frame: a decoded frame of the clip.
        """
        self._graph.vpush(frame)
        return _rgb_view(self._graph.vpull())


def sized_view(like: VideoFrame, region: tuple[int, int, int, int], *, size: tuple[int, int]) -> SizedView:
    """Create a view whose region and output may have odd sizes and need not be square.

    Args:
        like: a frame of the clip.
        region: (x, y, width, height) in source pixels.
        size: (width, height) of the output in pixels.
    """
    x, y, width, height = region
    steps = [
        ("crop", f"{width}:{height}:{x}:{y}:exact=1"),
        ("scale", f"{size[0]}:{size[1]}:flags={SCALE_FLAGS}"),
        ("format", "gbrp"),
        ("scale", f"{size[0]}:{size[1]}"),
        ("format", "rgb24"),
    ]
    graph, _ = _linear_graph(like.width, like.height, pixel_format=like.format.name, steps=steps)
    return SizedView(graph)


def fresh_fused_view(like: VideoFrame, window: CropWindow, *, flip: bool, frame_size: int) -> FusedView:
    """Create a graph for this clip only, as in the paper; the output is bit-identical to that of `fused_view`.

    Args:
        like: a frame of the clip.
        window: the crop window in source pixels.
        flip: whether to mirror left to right.
        frame_size: side length of the output in pixels.
    """
    return FusedView(*_fused_graph(_picture(like, flip, frame_size)), window)


class ReferenceView:
    """Converts full frames to RGB, crops the array, then resizes with antialiased bilinear filtering.

    Args:
        like: a frame of the clip.
        window: the crop window in source pixels.
        flip: whether to mirror left to right.
        frame_size: side length of the output in pixels.
    """

    def __init__(self, like: VideoFrame, window: CropWindow, *, flip: bool, frame_size: int) -> None:
        steps = [("scale", f"{like.width}:{like.height}:flags={_FULL_FRAME_FLAGS}"), ("format", "rgb24")]
        self._graph, _ = _linear_graph(like.width, like.height, pixel_format=like.format.name, steps=steps)
        self._window, self._flip, self._size = window, flip, (frame_size, frame_size)

    def render(self, frame: VideoFrame) -> np.ndarray:
        """Return uint8 (H, W, 3) RGB.

        Args:
            frame: a decoded frame of the clip.
        """
        self._graph.vpush(frame)
        w = self._window
        crop = _rgb_view(self._graph.vpull())[w.y : w.y + w.height, w.x : w.x + w.width]
        resized = np.asarray(
            Image.fromarray(np.ascontiguousarray(crop)).resize(self._size, Image.Resampling.BILINEAR)
        )
        return resized[:, ::-1] if self._flip else resized


def forget_graphs() -> None:
    """Discard the kept graphs; after a failure, one of them may still contain a frame."""
    _kept_graph.cache_clear()


def _picture(like: VideoFrame, flip: bool, frame_size: int) -> _Picture:
    tags = (like.colorspace, like.color_range)
    return _Picture(like.width, like.height, like.format.name, *tags, flip, frame_size)


def _fused_graph(picture: _Picture) -> tuple[Graph, FilterContext]:
    """Create a graph whose crop filter can be moved by commands; return the graph and this filter."""
    size = picture.frame_size
    steps = [
        ("crop", f"{picture.width}:{picture.height}:0:0:exact=1"),
        ("scale", f"{size}:{size}:flags={SCALE_FLAGS}"),
        ("format", "gbrp"),
        ("scale", f"{size}:{size}"),
        ("format", "rgb24"),
    ]
    if picture.flip:
        steps.insert(3, ("hflip", ""))  # at the final size, because hflip ignores changes of the crop window
    graph, nodes = _linear_graph(picture.width, picture.height, pixel_format=picture.pixel_format, steps=steps)
    return graph, nodes[0]


_kept_graph = lru_cache(maxsize=16)(_fused_graph)


def _linear_graph(
    width: int, height: int, *, pixel_format: str, steps: list[tuple[str, str]]
) -> tuple[Graph, list[FilterContext]]:
    graph = Graph()
    graph.threads = 1
    source = graph.add(
        "buffer", video_size=f"{width}x{height}", pix_fmt=pixel_format, time_base="1/1", pixel_aspect="1/1"
    )
    nodes = [graph.add(name, arguments) for name, arguments in steps]
    graph.link_nodes(source, *nodes, graph.add("buffersink")).configure()
    return graph, nodes


def _rgb_view(frame: VideoFrame) -> np.ndarray:
    plane = frame.planes[0]
    rows = np.frombuffer(memoryview(plane), dtype=np.uint8).reshape(frame.height, plane.line_size)
    return rows[:, : frame.width * 3].reshape(frame.height, frame.width, 3)
