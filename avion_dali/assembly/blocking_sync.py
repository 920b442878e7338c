"""Makes threads that wait for the GPU sleep, with the driver's own function, before CUDA starts."""

from __future__ import annotations

import ctypes
import logging
import os

from avion_dali.config import DaliConfig

_SCHED_BLOCKING_SYNC = 4  # CU_CTX_SCHED_BLOCKING_SYNC in cuda.h

_log = logging.getLogger(__name__)


def apply_blocking_sync(dali: DaliConfig) -> None:
    """Apply `dali.blocking_sync` to the GPU of this rank; say in one line why, if it cannot be.

    Args:
        dali: the settings.
    """
    if dali.blocking_sync:
        problem = use_blocking_sync(int(os.environ.get("LOCAL_RANK", "0")))
        if problem:
            _log.warning("dali.blocking_sync has no effect: %s", problem)


def use_blocking_sync(device_index: int) -> str | None:
    """Make this process's threads sleep while they wait for a GPU, instead of spinning.

    By default, CUDA spins where a process has fewer contexts than the machine has cores, and each of DALI's
    threads waits for the GPU after each frame. Source: CUDA driver API, `cuDevicePrimaryCtxSetFlags`.

    Args:
        device_index: index of the GPU among those visible to the process.

    Returns:
        None on success, otherwise one line with the reason.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver (libcuda.so.1)"
    device, flags, active = ctypes.c_int(), ctypes.c_uint(), ctypes.c_int()
    calls = [
        ("cuInit", (0,)),
        ("cuDeviceGet", (ctypes.byref(device), device_index)),
        ("cuDevicePrimaryCtxGetState", (device, ctypes.byref(flags), ctypes.byref(active))),
        ("cuDevicePrimaryCtxSetFlags_v2", (device, _SCHED_BLOCKING_SYNC)),
    ]
    for name, arguments in calls:
        if active.value:
            return "CUDA is already in use in this process; set it before anything else uses the GPU"
        status = getattr(cuda, name)(*arguments)
        if status:
            return f"{name} failed with code {status}"
    return None
