"""Fill a clip's array from its request: the part all CPU decoders share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from av.video.frame import VideoFrame

from avion_dali.contracts import ClipPart, ClipRequest, CropWindow

ReadFrames = Callable[[ClipPart], list[VideoFrame]]


class View(Protocol):
    """Renders decoded frames of a clip through one crop window."""

    def render(self, frame: VideoFrame) -> np.ndarray:
        """Return uint8 (H, W, 3) RGB."""


class MakeView(Protocol):
    """Makes a view for frames like a given one."""

    def __call__(self, like: VideoFrame, window: CropWindow, *, flip: bool, frame_size: int) -> View:
        """Return the view."""


def fill_clip(
    request: ClipRequest,
    frames_VTHWC: np.ndarray,
    *,
    read_frames: ReadFrames,
    make_view: MakeView,
) -> None:
    """Decode a clip into an array.

    Args:
        request: the clip.
        frames_VTHWC: uint8 array of `request.frames_shape`, written in place.
        read_frames: decodes the wanted frames of one part.
        make_view: makes what renders frames through one crop window.

    Raises:
        DecodeError: when a chunk cannot give its frames.
    """
    available = sum(len(part.frame_ids) for part in request.parts)
    slots = [np.flatnonzero(np.equal(request.gather, i)) for i in range(available)]
    done = 0
    for part in request.parts:
        frames = read_frames(part)
        for v, (window, flip) in enumerate(zip(request.windows, request.flips, strict=True)):
            rendered = make_view(frames[0], window, flip=flip, frame_size=request.frame_size)
            for i, frame in enumerate(frames, start=done):
                frames_VTHWC[v, slots[i]] = rendered.render(frame)
        done += len(frames)
