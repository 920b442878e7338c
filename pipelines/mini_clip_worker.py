"""What a worker does for a clip under DALI: its packets are read, checked and put into a mini clip.

DALI has readers of its own, but they read whole files: they decode a chunk from its first frame on, or open
every file of the data set ahead; they check no byte, name no file when they fail, and cannot be stopped when a
disk does not answer. Here a clip takes a few reads, in a process that may fail without harming others.

Light: neither DALI nor torch is imported.
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
    """What became of a clip in a worker.

    Args:
        mini_clip: the clip for DALI; None when its decoded frames are at its place in the ring instead.
        num_bytes: how many bytes of the mini clip's data are at its place; 0 when they did not fit and are
            part of `mini_clip`.
        seconds: spent on it.
        unfit: why the worker decoded the clip itself; empty when it did not.
    """

    mini_clip: MiniClip | None
    num_bytes: int
    seconds: float
    unfit: str = ""


def collect_into(request: ClipRequest, place: Place, device: Device) -> CollectedClip:
    """Write a clip's mini clip into shared memory, or its frames where DALI cannot decode it.

    Args:
        request: the clip.
        place: where to write; frames are uint8 of `request.frames_shape`.
        device: where DALI will decode.

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
            return CollectedClip(None, 0, time.perf_counter() - start, str(unfit))
    num_bytes = len(mini_clip.data)
    if num_bytes > len(memory):
        return CollectedClip(mini_clip, 0, time.perf_counter() - start)
    memory[:num_bytes] = np.frombuffer(mini_clip.data, np.uint8)
    return CollectedClip(replace(mini_clip, data=b""), num_bytes, time.perf_counter() - start)
