"""`--decoder cpu-fused`: the packet plan, then crop, scale and RGB in one filter graph; both are reused."""

from __future__ import annotations

import numpy as np

from avion_dali.contracts import ClipRequest
from avion_dali.decode.clip import fill_clip
from avion_dali.decode.reading import read_planned, reused_decoder
from avion_dali.decode.rendering import forget_graphs, fused_view


def decode_clip(request: ClipRequest, frames_VTHWC: np.ndarray) -> None:
    """Decode a clip into an array, decoding only the packets it needs.

    Decoders and graphs are kept for the next clip, so a process calls this from one thread.

    Args:
        request: the clip.
        frames_VTHWC: uint8 array of `request.frames_shape`, written in place.

    Raises:
        DecodeError: when a chunk cannot give its frames.
    """
    try:
        fill_clip(request, frames_VTHWC, read_frames=read_planned, make_view=fused_view)
    except BaseException:
        # A decoder or graph that stopped half-way may still hold a picture of this clip.
        reused_decoder.cache_clear()
        forget_graphs()
        raise
