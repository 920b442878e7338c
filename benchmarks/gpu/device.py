"""The GPU itself: what it and its driver are, what NVDEC decodes, and its utilization during a measurement."""

from __future__ import annotations

import ctypes
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import pynvml
import torch

from benchmarks.gpu.parts import NotRunError, Record, Suite, attempt
from benchmarks.report import Row

EVERY_S = 0.05
# NVML's utilization is an average over its last sampling period, which lasts a sixth of a second to a second.
LAG_S = 0.7
# What is read of a GPU, and what becomes of many readings: percent of the time that decoders were busy and that
# any kernel ran; memory used by all processes, in MB (10^6 bytes); clocks.
READINGS: dict[str, tuple[Callable[[Any], float], Callable[[list[float]], float]]] = {
    "nvdec_percent": (lambda gpu: pynvml.nvmlDeviceGetDecoderUtilization(gpu)[0], statistics.mean),
    "kernels_percent": (lambda gpu: pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu, statistics.mean),
    "gpu_memory_mb": (lambda gpu: pynvml.nvmlDeviceGetMemoryInfo(gpu).used / 1e6, max),
    "video_clock_mhz": (lambda gpu: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_VIDEO), max),
    "sm_clock_mhz": (lambda gpu: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM), statistics.mean),
}
SMI_FIELDS = ("name", "driver_version", "mig.mode.current", "power.limit", "clocks.max.sm", "clocks.max.mem")
# Numbers of `cudaVideoCodec` in NVIDIA's cuviddec.h.
CUVID_CODECS = {"h264": 4, "mjpeg": 5, "hevc": 8, "vp8": 9, "vp9": 10, "av1": 11}


def open_gpu() -> Any:
    """Return NVML's handle of the GPU that this process sees first."""
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
        """Return the utilization since a time of `time.perf_counter`; empty if it cannot be read."""
        # The first samples still cover earlier time.
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


def probe(suite: Suite, record: Record) -> None:
    """Everything that takes no time: software, GPU, decoders, and the card's own speed."""
    record({"measured": "software", **attempt(software)})
    record({"measured": "gpu", **attempt(partial(gpu_facts, suite))})
    for codec in CUVID_CODECS:
        record({"measured": "nvdec", "codec": codec, **attempt(partial(decoder_caps, suite, codec))})
    record({"measured": "yardstick", **attempt(partial(peak_product, suite))})


def software() -> Row:
    """What `benchmarks.machine` does not know: libraries of CUDA, compilers, shared memory."""
    nccl = torch.cuda.nccl.version() if torch.cuda.is_available() else None
    row: Row = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "nccl": nccl}
    row["compilers"] = [name for name in ("gcc", "cc", "nvcc") if shutil.which(name)]
    return {**row, "shm_gb": round(shutil.disk_usage("/dev/shm").total / 1e9, 1)}


def gpu_facts(suite: Suite) -> Row:
    """The card as nvidia-smi and PyTorch describe it."""
    from pipelines.support import driver_cuda_version, nvdec_obstacle

    if suite.device == "cpu":
        raise NotRunError("no GPU (--device cpu)")
    facts = torch.cuda.get_device_properties(0)
    row: Row = {"memory_gb": round(facts.total_memory / 1e9, 1), "multiprocessors": facts.multi_processor_count}
    row |= {"capability": f"{facts.major}.{facts.minor}", "driver_cuda": driver_cuda_version()}
    row["obstacle_of_dali"] = nvdec_obstacle(0) or "none"
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        row |= zip(SMI_FIELDS, said.splitlines()[0].split(", "), strict=False)
    return row


class DecodeCaps(ctypes.Structure):
    """`CUVIDDECODECAPS` of NVIDIA's cuviddec.h."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("codec", "chroma", "bits_above_8", "r0", "r1", "r2")),
        *((name, ctypes.c_ubyte) for name in ("supported", "engines")),
        ("formats", ctypes.c_ushort),
        *((name, ctypes.c_uint) for name in ("max_width", "max_height", "max_blocks")),
        *((name, ctypes.c_ushort) for name in ("min_width", "min_height")),
        ("histogram_and_reserved", ctypes.c_uint * 11),
    )


def decoder_caps(suite: Suite, codec: str) -> Row:
    """Ask the driver whether and how NVDEC decodes 8-bit 4:2:0 of a codec."""
    from pipelines.support import nvcuvid_problem

    if problem := nvcuvid_problem():
        raise NotRunError(problem)
    torch.ones(1, device=suite.device)  # the call needs a CUDA context
    caps = DecodeCaps(codec=CUVID_CODECS[codec], chroma=1)
    status = ctypes.CDLL("libnvcuvid.so.1").cuvidGetDecoderCaps(ctypes.byref(caps))
    sizes = f"{caps.min_width}x{caps.min_height} to {caps.max_width}x{caps.max_height}"
    return {"status": status, "supported": bool(caps.supported), "engines": caps.engines, "sizes": sizes}


def peak_product(suite: Suite) -> Row:
    """TFLOP/s of a large bfloat16 matrix product: what this card reaches, beside its data sheet."""
    side, times = suite.scale.product, []
    a, b = (torch.randn(side, side, device=suite.device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(30):
        start = time.perf_counter()
        torch.mm(a, b)
        if suite.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return {"side": side, "tflop_per_s": float(f"{2e-12 * side**3 / statistics.median(times[5:]):.4g}")}
