"""Decoders that do not decode, for measuring the loader alone. Workers import this module."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from avion_dali.contracts import ClipRequest


def deliver_at_once(request: ClipRequest, frames_VTHWC: np.ndarray) -> None:
    """A decoder that does nothing, so that only the cost of loading remains."""


def sleep_instead(request: ClipRequest, frames_VTHWC: np.ndarray, *, seconds: dict[str, float]) -> None:
    """A decoder that takes as long as a real one without using the processor."""
    profile = Path(request.parts[0].chunk.path).parents[1].name
    time.sleep(seconds[sleep_key(profile, len(request.gather))])


def sleep_key(profile: str, num_frames: int) -> str:
    """What a simulated decoder's time depends on: the chunk's profile and the clip's frames."""
    return f"{profile}/{num_frames}"
