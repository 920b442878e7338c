"""Decoders for loader tests; workers import them by name, so this file stays as light as a worker."""

import json
import os
import signal
import sys
import time

import numpy as np

from avion_dali.contracts import ClipRequest, DecodeError


def paint_identity(request: ClipRequest, frames_VTHWC: np.ndarray) -> None:
    """Write (sample id, epoch, first frame id) into the pixels instead of decoding."""
    frames_VTHWC[...] = 0
    frames_VTHWC[:, :, 0, 0] = divmod(request.sample_id, 256) + (request.epoch,)
    frames_VTHWC[:, :, 1, 0, 0] = request.parts[0].frame_ids[0] % 256


def paint_late(request: ClipRequest, frames_VTHWC: np.ndarray) -> None:
    """Take a second for every tenth sample of epoch 0."""
    if request.epoch == 0 and request.sample_id % 10 == 0:
        time.sleep(1.0)
    paint_identity(request, frames_VTHWC)


def fail_on_sevens(request: ClipRequest, frames_VTHWC: np.ndarray) -> None:
    """Fail for the samples 7, 17, 27, ... each in another way."""
    sample = request.sample_id
    if sample % 10 == 7:
        part = request.parts[0]
        if sample == 7:
            time.sleep(60)
        if sample == 17:
            os.kill(os.getpid(), signal.SIGKILL)
        if sample == 27:
            raise ValueError("a surprise inside the decoder")
        raise DecodeError(part.chunk.path, part.frame_ids, decoder="odd", kind="missing", cause="not there")
    paint_identity(request, frames_VTHWC)


def fail_always(request: ClipRequest, frames_VTHWC: np.ndarray) -> None:
    """Fail for every sample."""
    part = request.parts[0]
    raise DecodeError(part.chunk.path, part.frame_ids, decoder="odd", kind="missing", cause="disk is gone")


def confess(request: ClipRequest, frames_VTHWC: np.ndarray) -> None:
    """Report what the worker process has loaded and how much memory it holds."""
    import avion_dali.decode.cpu_fused  # noqa: F401  (what a real worker holds)

    heavy = [m for m in ("torch", "open_clip", "jsonargparse", "nvidia.dali") if m in sys.modules]
    with open("/proc/self/status") as status:
        resident = next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmRSS"))
    cause = json.dumps({"heavy": heavy, "resident_mb": resident})
    raise DecodeError("worker", (0,), decoder="odd", kind="missing", cause=cause)
