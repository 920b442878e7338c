"""Measures the time of steps and the part of it spent waiting for data.

The clock is read only on log steps, after the device has finished, so each window costs one synchronization.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class WindowTiming:
    """Means over the steps since the last log row, on this rank.

    Args:
        steps: optimizer steps of the window.
        step_s: seconds per optimizer step, data wait included.
        data_wait_s: seconds per optimizer step spent blocked in the loader's `next()`.
        data_wait_share: `data_wait_s / step_s`, in [0, 1].
        clips_per_s: clips of this rank per second.
        memory_mb: peak memory in MiB since the start: allocated on the GPU, or resident on the CPU.
    """

    steps: int
    step_s: float
    data_wait_s: float
    data_wait_share: float
    clips_per_s: float
    memory_mb: float


def peak_memory_mb(device: torch.device) -> float:
    """Return the peak memory of this process in MiB, allocated by torch on a GPU or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes on macOS, KiB on Linux


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work; return immediately on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class StepTimer:
    """Collects the timing of steps between two log rows.

    Args:
        device: device that must have finished before the clock is read at the end of a window.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.restart()

    def restart(self) -> None:
        """Start an empty window now."""
        self._start = time.perf_counter()
        self._excluded_s = self._waited_s = 0.0
        self._steps = self._clips = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the block as waiting for data."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._waited_s += time.perf_counter() - start

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Exclude the block (an evaluation, a save) from the window; work queued before it still counts."""
        synchronize(self.device)
        start = time.perf_counter()
        try:
            yield
        finally:
            synchronize(self.device)
            self._excluded_s += time.perf_counter() - start

    def step_done(self, clips: int) -> None:
        """Count one optimizer step of this many clips on this rank."""
        self._steps += 1
        self._clips += clips

    def window(self) -> WindowTiming:
        """Close the window: wait for the device, read the clock, and start the next one."""
        synchronize(self.device)
        elapsed = max(time.perf_counter() - self._start - self._excluded_s, 1e-9)
        steps = max(self._steps, 1)
        timing = WindowTiming(
            steps=self._steps,
            step_s=elapsed / steps,
            data_wait_s=self._waited_s / steps,
            data_wait_share=min(self._waited_s / elapsed, 1.0),
            clips_per_s=self._clips / elapsed,
            memory_mb=peak_memory_mb(self.device),
        )
        self.restart()
        return timing
