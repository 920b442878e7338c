"""Compares, times and counts the work of decoders on the same clips."""

from __future__ import annotations

import gc
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from avion_dali.contracts import ClipRequest
from benchmarks.decode.backends import Backend

RIGHT_FROM_DB = 30.0  # the same picture by another conversion reaches 40 dB, another picture hardly 20
_IDENTICAL_DB = 99.0
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Case:
    """Clips to decode in one way."""

    backend: Backend  # the decoder
    requests: Sequence[ClipRequest]  # the clips


def time_rounds(cases: Mapping[Key, Case], rounds: int) -> dict[Key, list[float]]:
    """Time cases in this process alternately, so that a disturbance affects all of them.

    Returns:
        Processor milliseconds per clip of each case, the mean over its clips, for each round.
    """
    timings: dict[Key, list[float]] = {key: [] for key in cases}
    # As in small workers, decoders that create many objects must not pay for collecting those of torch.
    gc.collect()
    gc.freeze()
    for _ in range(rounds):
        for key, case in cases.items():
            timings[key].append(1000 * decode_all(case) / len(case.requests))
    gc.unfreeze()
    return timings


def decode_all(case: Case) -> float:
    """Decode all clips of a case once; returns the processor seconds of all threads of this process."""
    frames_VTHWC = np.empty(case.requests[0].frames_shape, np.uint8)
    before = time.process_time()
    for request in case.requests:
        case.backend.decode(request, frames_VTHWC)
    return time.process_time() - before


def bytes_read(case: Case) -> float | None:
    """Mean bytes per clip read from the kernel; None if the kernel does not count them.

    Memory-mapped reads are not counted; no decoder here maps files.

    Args:
        case: clips of a decoder that has decoded before: the first clip may load libraries.
    """
    if not Path("/proc/self/io").exists():
        return None
    empty = -_kernel_bytes() + _kernel_bytes()
    before = _kernel_bytes()
    decode_all(case)
    return (_kernel_bytes() - before - empty) / len(case.requests)


def _kernel_bytes() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def frames_per_wanted(case: Case) -> float | None:
    """Frames decoded per frame that is kept; None if only the library knows the number."""
    count = case.backend.frames_decoded
    if count is None:
        return None
    parts = [part for request in case.requests for part in request.parts]
    return sum(map(count, parts)) / sum(len(part.frame_ids) for part in parts)


@dataclass(frozen=True)
class Agreement:
    """Difference of a decoder's frames from those of the reference decoder."""

    psnr_db: float = 0.0  # of the worst frame
    bias_levels: float = 255.0  # largest mean difference of a color channel of a clip, in levels of 255
    failure: str = ""  # what the decoder raised, or empty

    @property
    def is_right(self) -> bool:
        """Whether these are the requested frames."""
        return not self.failure and self.psnr_db >= RIGHT_FROM_DB

    @property
    def is_identical(self) -> bool:
        """Whether every byte is equal."""
        return not self.failure and self.psnr_db == _IDENTICAL_DB


def compare(backend: Backend, requests: Sequence[ClipRequest], expected: Sequence[np.ndarray]) -> Agreement:
    """Compare a decoder's clips with expected ones.

    Args:
        backend: the decoder.
        requests: the clips.
        expected: uint8 (V, T, H, W, 3) each.
    """
    worst, bias = _IDENTICAL_DB, 0.0
    for request, expected_VTHWC in zip(requests, expected, strict=True):
        frames_VTHWC = np.zeros_like(expected_VTHWC)
        try:
            backend.decode(request, frames_VTHWC)
        except Exception as error:  # other libraries raise errors of any type
            return Agreement(failure=f"{type(error).__name__}: {str(error).splitlines()[0]}")
        difference = frames_VTHWC.astype(np.float32) - expected_VTHWC
        square = float((difference**2).mean(axis=(2, 3, 4)).max())
        worst = min(worst, 10 * np.log10(255**2 / square) if square else _IDENTICAL_DB)
        bias = max(bias, float(np.abs(difference.mean(axis=(0, 1, 2, 3))).max()))
    return Agreement(float(worst), bias)


def decoded(backend: Backend, requests: Sequence[ClipRequest]) -> list[np.ndarray]:
    """Return a decoder's clips, uint8 (V, T, H, W, 3) each."""
    clips = []
    for request in requests:
        frames_VTHWC = np.zeros(request.frames_shape, np.uint8)
        backend.decode(request, frames_VTHWC)
        clips.append(frames_VTHWC)
    return clips


def require_equal(first: Backend, second: Backend, requests: Sequence[ClipRequest]) -> None:
    """Check that two decoders give the same bytes.

    Raises:
        RuntimeError: naming the clip where they differ.
    """
    pairs = zip(decoded(first, requests), decoded(second, requests), strict=True)
    for request, (one, other) in zip(requests, pairs, strict=True):
        if not np.array_equal(one, other):
            part = request.parts[0]
            raise RuntimeError(
                f"{first.name} and {second.name} differ on {part.chunk.path}, frames {part.frame_ids}"
            )
