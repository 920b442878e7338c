"""How busy a GPU is: NVDEC, kernels, memory and clock, read from NVIDIA's management library while others work.

The library comes with the driver, and `nvidia-smi` reads the same numbers from it, but more slowly.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.parts import Record, Suite
from benchmarks.report import Row

EVERY_S = 0.05
# NVML's utilisation is an average over its last sampling period, which lasts a sixth of a second to a second.
LAG_S = 0.7
_VIDEO_CLOCK = 3


class _Rates(ctypes.Structure):
    _fields_ = [("gpu", ctypes.c_uint), ("memory", ctypes.c_uint)]


class _Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


@dataclass(frozen=True)
class Sample:
    """One reading; None is what this GPU does not tell."""

    at_s: float  # on the clock of `time.perf_counter`
    nvdec_percent: int | None  # share of time that decoders were busy
    kernels_percent: int | None  # share of time that any kernel ran
    gpu_memory_mb: float | None  # used by all processes, in MB (10^6 bytes)
    video_clock_mhz: int | None  # of the decoders


class Nvml:
    """One GPU, as the management library shows it."""

    def __init__(self, library: Any, index: int = 0) -> None:
        self._library, self._device = library, ctypes.c_void_p()
        self._call("nvmlInit_v2")
        self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(self._device))

    def sample(self) -> Sample:
        """Read everything."""
        busy, period, clock = ctypes.c_uint(), ctypes.c_uint(), ctypes.c_uint()
        rates, memory = _Rates(), _Memory()
        pointer = ctypes.byref
        return Sample(
            at_s=time.perf_counter(),
            nvdec_percent=busy.value
            if self._tells("nvmlDeviceGetDecoderUtilization", pointer(busy), pointer(period))
            else None,
            kernels_percent=rates.gpu if self._tells("nvmlDeviceGetUtilizationRates", pointer(rates)) else None,
            gpu_memory_mb=memory.used / 1e6
            if self._tells("nvmlDeviceGetMemoryInfo", pointer(memory))
            else None,
            video_clock_mhz=clock.value
            if self._tells("nvmlDeviceGetClockInfo", ctypes.c_uint(_VIDEO_CLOCK), pointer(clock))
            else None,
        )

    def driver(self) -> str:
        """Version of the driver."""
        text = ctypes.create_string_buffer(96)
        self._call("nvmlSystemGetDriverVersion", text, ctypes.c_uint(len(text)))
        return text.value.decode()

    def _tells(self, name: str, *arguments: Any) -> bool:
        """Call a function that not every GPU has; says whether this one has it."""
        return getattr(self._library, name)(self._device, *arguments) == 0

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise OSError(f"{name} answered {status}")


def open_nvml() -> Nvml:
    """Open the GPU that this process sees first.

    Raises:
        OSError: when there is no library or no GPU.
    """
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return Nvml(ctypes.CDLL("libnvidia-ml.so.1"), int(first) if first.isdigit() else 0)


_SUMMARIES: dict[str, Callable[[list[float]], float]] = {
    "nvdec_percent": statistics.mean,
    "kernels_percent": statistics.mean,
    "gpu_memory_mb": max,
    "video_clock_mhz": max,
}


class GpuSampler:
    """Reads a GPU all the time, in a thread of its own."""

    def __init__(self, nvml: Nvml | None) -> None:
        self._nvml, self._ended = nvml, threading.Event()
        self._samples: list[Sample] = []
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def since(self, start_s: float) -> Row:
        """What the GPU did since a time of `time.perf_counter`; nothing where it cannot be read.

        The first samples, which still tell of the time before, do not count where there are others.
        """
        samples = [s for s in self._samples if s.at_s >= start_s]
        late = [s for s in samples if s.at_s >= start_s + LAG_S] or samples
        row = {}
        for name, summary in _SUMMARIES.items():
            values = [value for s in late if (value := getattr(s, name)) is not None]
            if values:
                row[name] = round(float(summary(values)), 1)
        return row

    def memory_mb(self) -> float | None:
        """Memory that all processes use on the GPU now."""
        used = self._nvml.sample().gpu_memory_mb if self._nvml else None
        return None if used is None else round(used, 1)

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()

    def _work(self) -> None:
        while self._nvml and not self._ended.wait(EVERY_S):
            self._samples.append(self._nvml.sample())


@contextmanager
def sampling() -> Iterator[GpuSampler]:
    """Sample the GPU inside the `with` block, where there is one."""
    try:
        nvml = open_nvml()
    except OSError:
        nvml = None
    sampler = GpuSampler(nvml)
    try:
        yield sampler
    finally:
        sampler.close()


def machine(suite: Suite, record: Record) -> None:
    """The GPU, its driver, what NVDEC decodes, and why not what it does not."""
    suite.require_gpu()
    import torch

    from pipelines.support import codec_support, driver_cuda_version, nvdec_obstacle

    facts = torch.cuda.get_device_properties(0)
    row: Row = {"measured": "machine", "gpu": facts.name, "memory_gb": round(facts.total_memory / 1e9, 1)}
    row |= {"torch_cuda": torch.version.cuda, "driver_cuda": driver_cuda_version()}
    row |= {"multiprocessors": facts.multi_processor_count, "capability": f"{facts.major}.{facts.minor}"}
    try:
        row["driver"] = open_nvml().driver()
    except OSError as error:
        row["driver"] = f"not known: {error}"
    record({**row, "obstacle": nvdec_obstacle(0) or "none"})
    record({"measured": "codecs", **codec_support(0)})
