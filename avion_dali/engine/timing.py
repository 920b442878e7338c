"""Measures the time of steps, the part of it spent waiting for data, and the time in which the GPU had no work.

On a GPU, moments are CUDA events: they lie between the kernels of the steps and are read when the device has
passed them, so that measuring does not make the host wait. The host runs ahead of the device, and its waiting
need not cost the device anything: `data_wait_share` says what the loader cost the host, `gpu_idle_share` what
the device lost.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class WindowTiming:
    """Means over the steps that the device has finished since the last window, on this rank.

    Args:
        steps: optimizer steps of the window.
        step_s: seconds per optimizer step, data wait included.
        data_wait_s: seconds per optimizer step that the host spent blocked in the loader's `next()`.
        data_wait_share: `data_wait_s / step_s`, in [0, 1].
        clips_per_s: clips of this rank per second.
        memory_mb: peak memory in MiB since the start: allocated on the GPU, or resident on the CPU.
        gpu_idle_share: share of the time in which the GPU had no work between steps, or waited for the frames
            of a micro-batch, in [0, 1]; None on the CPU.
    """

    steps: int
    step_s: float
    data_wait_s: float
    data_wait_share: float
    clips_per_s: float
    memory_mb: float
    gpu_idle_share: float | None = None


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


class Clock(Protocol):
    """Moments in the work of a device, and the time between them."""

    def mark(self) -> Any:
        """Return the moment after all work that has been queued so far."""

    def is_past(self, moment: Any) -> bool:
        """Tell whether the device has reached a moment, without waiting."""

    def wait(self, moment: Any) -> None:
        """Wait until the device has reached a moment."""

    def seconds(self, first: Any, last: Any) -> float:
        """Return the seconds between two moments, which the device must have reached."""


class HostClock:
    """The clock of the CPU, which has done its work as soon as a function returns."""

    def mark(self) -> float:
        """Read the clock."""
        return time.perf_counter()

    def is_past(self, moment: float) -> bool:
        """Tell that a moment is past."""
        return moment <= time.perf_counter()

    def wait(self, moment: float) -> None:
        """Do nothing."""

    def seconds(self, first: float, last: float) -> float:
        """Subtract two readings."""
        return last - first


class DeviceClock:
    """CUDA events of the current stream."""

    def mark(self) -> torch.cuda.Event:
        """Queue an event."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def is_past(self, moment: torch.cuda.Event) -> bool:
        """Ask for the event's state."""
        return moment.query()

    def wait(self, moment: torch.cuda.Event) -> None:
        """Wait for the event."""
        moment.synchronize()

    def seconds(self, first: torch.cuda.Event, last: torch.cuda.Event) -> float:
        """Return the time between two events, as the device measured it."""
        return first.elapsed_time(last) / 1e3


@dataclass
class _Step:
    """What is known of one optimizer step."""

    clips: int = 0
    waited_s: float = 0.0
    end: Any = None
    idle: list[tuple[Any, Any]] = field(default_factory=list)  # moments between which the device had no work
    excluded: list[tuple[Any, Any]] = field(default_factory=list)


class StepTimer:
    """Collects the timing of steps between two log rows, without waiting for the device.

    Args:
        device: device of the steps.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._clock: Clock = DeviceClock() if device.type == "cuda" else HostClock()
        self.restart()

    def restart(self) -> None:
        """Start an empty window now."""
        self._start = self._out_of_work = self._clock.mark()
        self._current, self._done = _Step(), deque[_Step]()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the block as waiting for data; afterwards the device has work again."""
        if self._out_of_work is None:
            self._out_of_work = self._clock.mark()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._current.waited_s += time.perf_counter() - start
            self._has_work_at(self._clock.mark())

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Exclude the block (an evaluation, a save) from the window; work queued before it still counts."""
        start = self._clock.mark()
        self._has_work_at(start)
        try:
            yield
        finally:
            self._out_of_work = self._clock.mark()
            self._current.excluded.append((start, self._out_of_work))

    def step_done(self, clips: int) -> None:
        """Count one optimizer step of this many clips on this rank; the device has no further work queued."""
        self._current.clips, self._current.end = clips, self._clock.mark()
        self._done.append(self._current)
        self._out_of_work, self._current = self._current.end, _Step()

    def window(self) -> WindowTiming:
        """Close the window after the last step that the device has finished, and start the next one there.

        It waits for the device only if that has not finished a single step.
        """
        steps = self._finished_steps()
        elapsed = self._clock.seconds(self._start, steps[-1].end) if steps else 0.0
        elapsed = max(elapsed - sum(self._total(step.excluded) for step in steps), 1e-9)
        waited = sum(step.waited_s for step in steps)
        idle = sum(self._total(step.idle) for step in steps)
        if steps:
            self._start = steps[-1].end
        number = max(len(steps), 1)
        return WindowTiming(
            steps=len(steps),
            step_s=elapsed / number,
            data_wait_s=waited / number,
            data_wait_share=min(waited / elapsed, 1.0),
            clips_per_s=sum(step.clips for step in steps) / elapsed,
            memory_mb=peak_memory_mb(self.device),
            gpu_idle_share=min(idle / elapsed, 1.0) if self.device.type == "cuda" else None,
        )

    def _finished_steps(self) -> list[_Step]:
        """Take the steps that the device has finished; at least one if there is any."""
        if self._done:
            self._clock.wait(self._done[0].end)
        steps = []
        while self._done and self._clock.is_past(self._done[0].end):
            steps.append(self._done.popleft())
        return steps

    def _has_work_at(self, moment: Any) -> None:
        if self._out_of_work is not None:
            self._current.idle.append((self._out_of_work, moment))
        self._out_of_work = None

    def _total(self, spans: list[tuple[Any, Any]]) -> float:
        return sum(self._clock.seconds(first, last) for first, last in spans)
