"""What a clip for DALI costs a decode process: its packets are read, checked and put into a mini clip.

DALI has readers of its own, but they read whole files: they decode a chunk from its first frame on, or open
every file of the data set ahead; they check no byte, name no file when they fail, and cannot be stopped when a
disk does not answer. Here a clip costs a few reads in a process that may fail alone.

Light: neither DALI nor torch is imported.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from avion_dali.contracts import ClipRequest
from avion_dali.decode import cpu_fused
from avion_dali.decode.source import UnorderedStreamError, gather_packets
from avion_dali.loading.worker import attached_memory, failures_as_decode_errors
from pipelines.codecs import Device, require_decodable
from pipelines.mini_clip import MiniClip, UnfitForMiniClipError, build_mini_clip


@dataclass(frozen=True, slots=True)
class Place:
    """Shared memory that a clip may fill.

    Args:
        memory_name: its name.
        offset: first byte.
        num_bytes: length; enough for the clip's decoded frames.
    """

    memory_name: str
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class CollectedClip:
    """What became of a clip in a worker.

    Args:
        mini_clip: the clip for DALI; None when its decoded frames lie at its place instead.
        num_bytes: of the mini clip's data, how much lies at its place; 0 when it is too large for that and
            comes along.
        seconds: spent on it.
        unfit: why it was decoded here, for those that were.
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
    memory = attached_memory(place.memory_name)[place.offset : place.offset + place.num_bytes]
    with failures_as_decode_errors(request, decoder="dali"):
        try:
            mini_clip = collect_mini_clip(request, device)
        except (UnfitForMiniClipError, UnorderedStreamError) as unfit:
            shape = request.frames_shape
            cpu_fused.decode_clip(request, memory[: int(np.prod(shape))].reshape(shape))
            return CollectedClip(None, 0, time.perf_counter() - start, str(unfit))
    num_bytes = len(mini_clip.data)
    if num_bytes > len(memory):
        return CollectedClip(mini_clip, 0, time.perf_counter() - start)
    memory[:num_bytes] = np.frombuffer(mini_clip.data, np.uint8)
    return CollectedClip(replace(mini_clip, data=b""), num_bytes, time.perf_counter() - start)


def collect_mini_clip(request: ClipRequest, device: Device) -> MiniClip:
    """Read a clip's packets and write them as a mini clip.

    Args:
        request: the clip.
        device: where DALI will decode.

    Raises:
        DecodeError: when a chunk cannot be read.
        UnfitForMiniClipError: when DALI would not give the clip's frames from it.
        UnorderedStreamError: when a container without index tells no order.
    """
    parts = [gather_packets(part, decoder="dali") for part in request.parts]
    require_decodable(parts, device=device)
    return build_mini_clip(parts)
