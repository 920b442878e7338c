"""Parts of the GPU suite besides our own decoding: the machine, its tests, and other GPU decoders."""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from avion_dali.contracts import ClipRequest
from avion_dali.data.planner import Planner
from avion_dali.decode import cpu_fused
from benchmarks.corpus import FOUR
from benchmarks.decode_backends import Backend, rerun_with_pyav_libraries
from benchmarks.decode_measure import compare, decoded
from benchmarks.gpu_corpus import open_manifest
from benchmarks.gpu_parts import NotRunError, Record, Suite, attempt
from benchmarks.gpu_sampling import GpuSampler, open_nvml, sampling
from benchmarks.machine import ROOT, Row

if TYPE_CHECKING:
    import pytest
    import torch

DecodeOnGpu = Callable[[ClipRequest], "torch.Tensor"]  # uint8 (T, H, W, 3)

CLIPS = 48
THREADS = (1, 8, 16)


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


class _Tally:
    """Counts what became of the tests."""

    def __init__(self) -> None:
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.failures: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called by pytest for each phase of a test."""
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.failed:
            self.failures.append(f"{report.nodeid}: {report.longreprtext.strip().splitlines()[-1]}")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Called by pytest for each file it read."""
        if report.failed:
            self.failures.append(f"{report.nodeid}: {report.longreprtext.strip().splitlines()[-1]}")


def gpu_tests(suite: Suite, record: Record) -> None:
    """The tests that need a GPU, all of which must pass here; their output is in the part's log."""
    suite.require_gpu()
    import pytest

    os.environ["AVION_REQUIRE_CUDA"] = "1"
    os.chdir(ROOT)
    tally = _Tally()
    options = ["-m", "gpu", "-p", "no:cacheprovider", "--continue-on-collection-errors", "tests"]
    status = pytest.main(options, plugins=[tally])
    record({"measured": "tests", **tally.counts, "status": int(status), "failures": tally.failures})


def make_torchcodec() -> DecodeOnGpu:
    """torchcodec on NVDEC: a file opened for each clip; it keeps its decode sessions between clips."""
    from torchcodec.decoders import VideoDecoder

    def decode(request: ClipRequest) -> torch.Tensor:
        part = request.parts[0]
        decoder = VideoDecoder(part.chunk.path, device="cuda", dimension_order="NHWC", seek_mode="approximate")
        return crop_and_resize(decoder.get_frames_at(list(part.frame_ids)).data, request)

    return decode


def make_pynvvideocodec() -> DecodeOnGpu:
    """NVIDIA's PyNvVideoCodec: a decoder opened a clip, frames copied before it is gone."""
    nvc = importlib.import_module("PyNvVideoCodec")
    import torch

    def decode(request: ClipRequest) -> torch.Tensor:
        part = request.parts[0]
        decoder = nvc.SimpleDecoder(
            part.chunk.path, gpu_id=0, use_device_memory=True, output_color_type=nvc.OutputColorType.RGB
        )
        frames = decoder.get_batch_frames_by_index(list(part.frame_ids))
        return crop_and_resize(torch.stack([torch.from_dlpack(frame) for frame in frames]), request)

    return decode


LIBRARIES: dict[str, Callable[[], DecodeOnGpu]] = {
    "torchcodec": make_torchcodec,
    "PyNvVideoCodec": make_pynvvideocodec,
}


def crop_and_resize(frames_THWC: torch.Tensor, request: ClipRequest) -> torch.Tensor:
    """Crop and scale whole frames (T, H, W, 3), uint8, as the request says, by torch."""
    from torch.nn.functional import interpolate

    w, side = request.windows[0], request.frame_size
    crop_TCHW = frames_THWC[:, w.y : w.y + w.height, w.x : w.x + w.width].permute(0, 3, 1, 2).float()
    scaled = interpolate(crop_TCHW, (side, side), mode="bilinear", antialias=True)
    return scaled.round().clamp(0, 255).byte().permute(0, 2, 3, 1)


def other_libraries(suite: Suite, record: Record) -> None:
    """Rates of other libraries' GPU decoders at the loader's requests, where they can be imported."""
    suite.require_gpu()
    status = rerun_with_pyav_libraries("benchmarks.gpu_suite")
    if status is not None:
        sys.exit(status)  # it was done there
    planner = Planner(open_manifest(suite, suite.training_style), FOUR.rules(suite.scale.frame_size), seed=0)
    drawn = (planner.plan(row, epoch=0) for row in range(4 * CLIPS))
    # A frame that is wanted twice is the other libraries' weak point, and none that matters.
    requests = [r for r in drawn if len(r.parts) == 1 and len(r.parts[0].frame_ids) == len(r.gather)][:CLIPS]
    with sampling() as sampler:
        for name, make in LIBRARIES.items():
            measure = partial(measure_library, name, make, requests, sampler=sampler, suite=suite)
            failure = attempt(partial(measure, record=record))
            if failure:
                record({"measured": "library", "library": name, **failure})


def measure_library(
    name: str,
    make: Callable[[], DecodeOnGpu],
    requests: Sequence[ClipRequest],
    *,
    sampler: GpuSampler,
    suite: Suite,
    record: Record,
) -> Row:
    """Compare a library's frames with our own, then time it with some threads; nothing more to record.

    Raises:
        NotRunError: when its frames are wrong.
    """
    decode = make()
    agreement = compare(_on_host(name, decode), requests[:8], _expected(requests[:8]))
    if not agreement.is_right:
        raise NotRunError(agreement.failure or f"its frames are other ones: {agreement.psnr_db:.1f} dB")
    row: Row = {"measured": "library", "library": name, "min_psnr_db": round(agreement.psnr_db, 1)}
    row["max_bias_levels"] = round(agreement.bias_levels, 2)
    for threads in THREADS:
        start = time.perf_counter()
        clips_per_s = library_rate(decode, requests, threads=threads, seconds=suite.scale.measure_s)
        numbers = {"threads": threads, "clips_per_s": round(clips_per_s, 1)}
        record({**row, **numbers, **sampler.since(start)})
    return {}


def _expected(requests: Sequence[ClipRequest]) -> list[np.ndarray]:
    return decoded(Backend("cpu-fused", cpu_fused.decode_clip, ""), requests)


def _on_host(name: str, decode: DecodeOnGpu) -> Backend:
    def fill(request: ClipRequest, frames_VTHWC: np.ndarray) -> None:
        frames_VTHWC[0] = decode(request).cpu().numpy()

    return Backend(name, fill, "by torch")


def library_rate(
    decode: DecodeOnGpu, requests: Sequence[ClipRequest], *, threads: int, seconds: float
) -> float:
    """Clips per second of some threads together."""
    start = time.perf_counter()

    def work(number: int) -> int:
        for done, request in enumerate(cycle([*requests[number:], *requests[:number]]), start=1):
            int(decode(request)[-1, -1, -1, -1])  # it is there when a number of it is
            if time.perf_counter() - start >= seconds:
                return done
        return 0

    with ThreadPoolExecutor(threads) as pool:
        done = sum(pool.map(work, range(threads)))
    return done / (time.perf_counter() - start)
