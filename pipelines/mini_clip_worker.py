"""The task of a worker with DALI: reads and checks the packets of a clip, and writes them as a mini clip.

The readers of DALI are not used, because they read whole files: they decode a chunk from its first frame, or
open all files of the dataset in advance. They verify no checksums, do not name the file of an error, and cannot
be stopped when a disk does not answer. Here, a clip needs a few reads, in a process whose failure does not
affect other clips.

This module imports neither DALI nor torch.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from avion_dali.contracts import ClipRequest
from avion_dali.decode import cpu_fused
from avion_dali.decode.source import UnorderedStreamError, gather_packets
from avion_dali.loading.ring import Place
from avion_dali.loading.worker import attached_memory, failures_as_decode_errors

from .codecs import Device, require_decodable
from .mini_clip import MiniClip, UnfitForMiniClipError, build_mini_clip


@dataclass(frozen=True, slots=True)
class CollectedClip:
    """Result of `collect_into`.

    Args:
        request: the clip as it was planned.
        mini_clip: the clip for DALI; None if its decoded frames are at its place in the ring instead.
        num_bytes: number of bytes of the mini clip's data at its place; 0 if they did not fit and are part of
            `mini_clip`.
        seconds: time spent by the worker in seconds.
        unfit: reason why the worker decoded the clip; empty if it did not.
    """

    request: ClipRequest
    mini_clip: MiniClip | None
    num_bytes: int
    seconds: float
    unfit: str = ""


def collect_into(request: ClipRequest, place: Place, device: Device) -> CollectedClip:
    """Write a clip's mini clip into shared memory, or its decoded frames if DALI cannot decode it.

    Args:
        request: the clip.
        place: place to write to; frames are uint8 of `request.frames_shape`.
        device: device on which DALI decodes.

    Raises:
        DecodeError: when the clip cannot be read, whatever the cause.
    """
    start = time.perf_counter()
    memory = attached_memory(place)
    with failures_as_decode_errors(request, decoder="dali"):
        try:
            parts = [gather_packets(part, decoder="dali") for part in request.parts]
            require_decodable(parts, device=device)
            mini_clip = build_mini_clip(parts)
        except (UnfitForMiniClipError, UnorderedStreamError) as unfit:
            shape = request.frames_shape
            cpu_fused.decode_clip(request, memory[: int(np.prod(shape))].reshape(shape))
            return CollectedClip(request, None, 0, time.perf_counter() - start, str(unfit))
    num_bytes = len(mini_clip.data)
    if num_bytes > len(memory):
        return CollectedClip(request, mini_clip, 0, time.perf_counter() - start)
    memory[:num_bytes] = np.frombuffer(mini_clip.data, np.uint8)
    return CollectedClip(request, replace(mini_clip, data=b""), num_bytes, time.perf_counter() - start)
