"""`--decoder reference`: decode the whole file, convert full frames, then crop and resize as arrays."""

from __future__ import annotations

import numpy as np

from avion_dali.contracts import ClipRequest
from avion_dali.decode.clip import fill_clip
from avion_dali.decode.reading import read_everything
from avion_dali.decode.rendering import ReferenceView


def decode_clip(request: ClipRequest, frames_VTHWC: np.ndarray) -> None:
    """Decode a clip into an array without any shortcut.

    Args:
        request: the clip.
        frames_VTHWC: uint8 array of `request.frames_shape`, written in place.

    Raises:
        DecodeError: when a chunk cannot give its frames.
    """
    fill_clip(request, frames_VTHWC, read_frames=read_everything, make_view=ReferenceView)
