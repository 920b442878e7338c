"""Fill a clip's array from its request: the part all CPU decoders share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from av.video.frame import VideoFrame

from avion_dali.contracts import ClipPart, ClipRequest
from avion_dali.decode.rendering import FusedView, ReferenceView

ReadFrames = Callable[[ClipPart], list[VideoFrame]]


def fill_clip(
    request: ClipRequest,
    frames_VTHWC: np.ndarray,
    *,
    read_frames: ReadFrames,
    view: type[FusedView] | type[ReferenceView],
) -> None:
    """Decode a clip into an array.

    Args:
        request: the clip.
        frames_VTHWC: uint8 array of `request.frames_shape`, written in place.
        read_frames: decodes the wanted frames of one part.
        view: renders frames through one crop window.

    Raises:
        DecodeError: when a chunk cannot give its frames.
    """
    slots = [np.flatnonzero(np.equal(request.gather, i)) for i in range(max(request.gather) + 1)]
    done = 0
    for part in request.parts:
        frames = read_frames(part)
        for v, (window, flip) in enumerate(zip(request.windows, request.flips, strict=True)):
            rendered = view(frames[0], window, flip=flip, frame_size=request.frame_size)
            for i, frame in enumerate(frames, start=done):
                frames_VTHWC[v, slots[i]] = rendered.render(frame)
        done += len(frames)
