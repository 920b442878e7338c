"""Utilization of a GPU (NVDEC, kernels, memory and clock), read from NVML during a measurement."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pynvml
import torch

from benchmarks.gpu.parts import Record, Suite
from benchmarks.report import Row

EVERY_S = 0.05
# NVML's utilisation is an average over its last sampling period, which lasts a sixth of a second to a second.
LAG_S = 0.7
# What is read of a GPU, and what becomes of many readings: percent of the time that decoders were busy and that
# any kernel ran; memory used by all processes, in MB (10^6 bytes); clock of the decoders.
READINGS: dict[str, tuple[Callable[[Any], float], Callable[[list[float]], float]]] = {
    "nvdec_percent": (lambda gpu: pynvml.nvmlDeviceGetDecoderUtilization(gpu)[0], statistics.mean),
    "kernels_percent": (lambda gpu: pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu, statistics.mean),
    "gpu_memory_mb": (lambda gpu: pynvml.nvmlDeviceGetMemoryInfo(gpu).used / 1e6, max),
    "video_clock_mhz": (lambda gpu: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_VIDEO), max),
}


def open_gpu() -> Any:
    """Return NVML's handle of the GPU that this process sees first.

    Raises:
        pynvml.NVMLError: when there is no driver.
        RuntimeError: when PyTorch finds no GPU.
    """
    pynvml.nvmlInit()
    # CUDA and NVML count devices differently where some are hidden; the identifier is the same.
    return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")


def read(gpu: Any) -> dict[str, float]:
    """Read all available values of this GPU."""
    found = {}
    for name, (reading, _) in READINGS.items():
        with suppress(pynvml.NVMLError):  # not every GPU supports all values
            found[name] = reading(gpu)
    return found


class GpuSampler:
    """Reads the values of a GPU continuously in a separate thread; None stands for no GPU."""

    def __init__(self, gpu: Any) -> None:
        self._gpu, self._ended = gpu, threading.Event()
        self._samples: list[tuple[float, dict[str, float]]] = []  # times of `time.perf_counter`
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def since(self, start_s: float) -> Row:
        """Return the utilization since a time of `time.perf_counter`; empty if it cannot be read.

        The first samples, which still cover earlier time, are dropped if there are later ones.
        """
        samples = [sample for sample in self._samples if sample[0] >= start_s]
        late = [sample for sample in samples if sample[0] >= start_s + LAG_S] or samples
        row = {}
        for name, (_, summary) in READINGS.items():
            values = [found[name] for _, found in late if name in found]
            if values:
                row[name] = round(float(summary(values)), 1)
        return row

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()

    def _work(self) -> None:
        while self._gpu is not None and not self._ended.wait(EVERY_S):
            self._samples.append((time.perf_counter(), read(self._gpu)))


@contextmanager
def sampling() -> Iterator[GpuSampler]:
    """Sample the GPU inside the `with` block, where there is one."""
    gpu = None
    with suppress(pynvml.NVMLError, RuntimeError):
        gpu = open_gpu()
    sampler = GpuSampler(gpu)
    try:
        yield sampler
    finally:
        sampler.close()


def machine(suite: Suite, record: Record) -> None:
    """Describe the GPU, its driver, and the codecs that NVDEC decodes, with reasons for the others."""
    suite.require_gpu()
    from pipelines.support import codec_support, driver_cuda_version, nvdec_obstacle

    facts = torch.cuda.get_device_properties(0)
    row: Row = {"measured": "machine", "gpu": facts.name, "memory_gb": round(facts.total_memory / 1e9, 1)}
    row |= {"torch_cuda": torch.version.cuda, "driver_cuda": driver_cuda_version()}
    row |= {"multiprocessors": facts.multi_processor_count, "capability": f"{facts.major}.{facts.minor}"}
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        row["driver"] = pynvml.nvmlSystemGetDriverVersion()
    record({**row, "obstacle": nvdec_obstacle(0) or "none"})
    record({"measured": "codecs", **codec_support(0)})
