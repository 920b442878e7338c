"""The CPU decoders by their names in `--decoder`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from avion_dali.contracts import ClipRequest
from avion_dali.decode import cpu_fused, paper_fused, reference

DecodeClip = Callable[[ClipRequest, np.ndarray], None]
"""Fills a uint8 array of shape `request.frames_shape` or raises `DecodeError`. It is a `ClipDecoder` or any
function that can be imported by name, because it is sent to the decode workers."""

CPU_DECODERS: dict[str, DecodeClip] = {
    "cpu-fused": cpu_fused.decode_clip,
    "paper-fused": paper_fused.decode_clip,
    "reference": reference.decode_clip,
}
