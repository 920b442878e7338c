"""Decodes the clip of a request into an array. All CPU decoders share this module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import numpy as np
from av.video.frame import VideoFrame

from avion_dali.contracts import ClipPart, ClipRequest, CropWindow

ReadFrames = Callable[[ClipPart], list[VideoFrame]]


class View(Protocol):
    """Renders decoded frames of a clip through one crop window and flip."""

    def render(self, frame: VideoFrame) -> np.ndarray:
        """Return uint8 (H, W, 3) RGB."""


class MakeView(Protocol):
    """Creates a view for frames with the properties of a given frame."""

    def __call__(self, like: VideoFrame, window: CropWindow, *, flip: bool, frame_size: int) -> View:
        """Return the view."""


def keep_everything() -> None:
    """Do nothing: the default `forget` of decoders without state between clips."""


@dataclass(frozen=True)
class ClipDecoder:
    """A decoder that runs on a CPU core, defined by how it reads frames and how it renders them.

    Calling it with a request and an array decodes the clip into the array. It is sent to workers as the names
    of its functions.

    Args:
        name: name of the decoder in errors.
        read_frames: decodes the wanted frames of one part.
        make_view: creates the view that renders frames through one crop window.
        forget: discards the state kept for the next clip; called when a clip fails, because an interrupted
            decoder or filter may still contain one of its pictures.
    """

    name: str
    read_frames: ReadFrames
    make_view: MakeView
    forget: Callable[[], None] = keep_everything

    def __call__(self, request: ClipRequest, frames_VTHWC: np.ndarray) -> None:
        """Decode a clip into an array.

        Args:
            request: the clip.
            frames_VTHWC: uint8 array of `request.frames_shape`, written in place.

        Raises:
            DecodeError: when the frames of a chunk cannot be decoded.
        """
        gather = np.array(request.gather)
        views = enumerate(zip(request.windows, request.flips, strict=True))
        try:
            parts, total = [], 0
            for part in request.parts:
                parts.append((total, self.read_frames(part)))
                total += len(part.frame_ids)
            for (first, frames), (v, (window, flip)) in product(parts, views):
                view = self.make_view(frames[0], window, flip=flip, frame_size=request.frame_size)
                for i, frame in enumerate(frames, start=first):
                    frames_VTHWC[v, gather == i] = view.render(frame)
        except BaseException:
            self.forget()
            raise
