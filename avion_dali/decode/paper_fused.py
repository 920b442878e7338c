"""`--decoder paper-fused`: AVION's way, everything from the keyframe on through the fused filter graph."""

from __future__ import annotations

import numpy as np

from avion_dali.contracts import ClipRequest
from avion_dali.decode.clip import fill_clip
from avion_dali.decode.reading import read_spanned
from avion_dali.decode.rendering import fresh_fused_view


def decode_clip(request: ClipRequest, frames_VTHWC: np.ndarray) -> None:
    """Decode a clip into an array (AVION, arXiv 2309.16669, section 4.1 and appendix A).

    Args:
        request: the clip.
        frames_VTHWC: uint8 array of `request.frames_shape`, written in place.

    Raises:
        DecodeError: when a chunk cannot give its frames.
    """
    fill_clip(request, frames_VTHWC, read_frames=read_spanned, make_view=fresh_fused_view)
