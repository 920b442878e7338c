"""Tasks for the tests of DALI's loader; workers import them by name: as light as a worker."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

from avion_dali.contracts import ClipRequest
from avion_dali.loading.ring import Place
from avion_dali.loading.worker import attached_memory
from pipelines.codecs import Device
from pipelines.mini_clip_worker import CollectedClip, collect_into

KILLED, REFUSED = 6, (9, 10)  # sample ids


def collect_oddly(request: ClipRequest, place: Place, device: Device) -> CollectedClip:
    """Collect a clip, but kill the process at one sample, and spoil the mini clips of some others."""
    if request.sample_id == KILLED:
        os.kill(os.getpid(), signal.SIGKILL)
    clip = collect_into(request, place, device)
    if request.sample_id in REFUSED and clip.mini_clip is not None:
        attached_memory(place)[: clip.num_bytes] = 0
    return clip


def collect_refused(request: ClipRequest, place: Place, device: Device) -> CollectedClip:
    """Spoil every mini clip."""
    clip = collect_into(request, place, device)
    assert clip.mini_clip is not None
    return replace(clip, mini_clip=replace(clip.mini_clip, frame_ids=(9999,)))


def collect_with_refused_pairs(request: ClipRequest, place: Place, device: Device) -> CollectedClip:
    """Spoil the mini clips of the samples 2, 3, 6, 7, 10, 11, ..."""
    collect = collect_refused if request.sample_id % 4 >= 2 else collect_into
    return collect(request, place, device)
