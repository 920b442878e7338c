"""Parts of the GPU suite about the library's loader: its rate, and a training with it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from avion_dali.assembly.open_clips import open_clips
from avion_dali.contracts import ClipBatch, UserError
from avion_dali.cores import available_cores
from avion_dali.loading.faults import LoaderStats
from benchmarks.gpu.chunks import open_manifest
from benchmarks.gpu.device import GpuSampler, sampling
from benchmarks.gpu.parts import NotRunError, Record, Suite, attempt
from benchmarks.loader.measure import CONTEXT_LENGTH, LoaderBench, measure
from benchmarks.report import Row
from benchmarks.train import ablation
from benchmarks.train.ablation import AblationBench

Loader = Any  # a `ClipLoader` of any strategy, or what stands in for one


@dataclass(frozen=True)
class Source:
    """The loaded clips and their decoder."""

    style: str  # of the chunks
    decoder: str  # name of the decoder
    workers: int = 0  # decode processes; 0 for one a core

    def row(self, measured: str) -> Row:
        """Return its columns of a row."""
        workers = self.workers or available_cores()
        return {"measured": measured, "style": self.style, "decoder": self.decoder, "workers": workers}


@contextmanager
def opened_loader(suite: Suite, source: Source, *, micro_batch: int) -> Iterator[Loader]:
    """Open the loader that a training with this configuration has.

    Raises:
        NotRunError: when its chunks could not be made, or it does not work here.
    """
    manifest = open_manifest(suite, source.style)
    try:
        with open_clips(
            manifest,
            batch_size=micro_batch,
            frame_size=suite.scale.frame_size,
            decoder=source.decoder,
            device=suite.device,
            workers=source.workers,
            context_length=CONTEXT_LENGTH,
        ) as loader:
            yield loader
    except UserError as error:
        raise NotRunError(str(error)) from error


def backends(suite: Suite, record: Record) -> None:
    """Rates of the loader by decoder and workers, at the same requests."""
    suite.require_device()
    style, bench = suite.training_style, LoaderBench(warm_s=suite.scale.warm_s, seconds=suite.scale.measure_s)
    sources = [
        Source(style, "dali"),
        *(Source(style, "cpu-fused", workers) for workers in reversed(suite.scale.workers)),
        Source("compat", "dali"),
        Source("compat", "cpu-fused"),
    ]
    with sampling() as sampler:
        for source in sources:
            numbers = attempt(partial(loader_rate, suite, source, bench, sampler))
            record(source.row("loader") | numbers)


def loader_rate(suite: Suite, source: Source, bench: LoaderBench, sampler: GpuSampler) -> Row:
    """Load for a while; return the cost and the utilization of the GPU."""
    with opened_loader(suite, source, micro_batch=suite.scale.batch) as loader:
        start = time.perf_counter()
        numbers = measure(loader, bench)
        numbers |= sampler.since(start + bench.warm_s)
        return {**numbers, "left_to_cpu_fused": loader.stats.decoded_on_cpu}


class RepeatedBatch:
    """A loader that never waits: the ceiling of what a training can reach."""

    steps_per_epoch, accum_steps = 1_000, 1

    def __init__(self, batch: ClipBatch) -> None:
        self.batch, self.stats = batch, LoaderStats()

    def batches(self, first_step: int, last_step: int) -> Iterator[ClipBatch]:
        """Yield the batch for every step."""
        for _ in range(first_step, last_step):
            self.stats.delivered += len(self.batch)
            yield self.batch

    def close(self) -> None:
        """Do nothing."""


def training(suite: Suite, record: Record) -> None:
    """Train a few steps with each decoder, and return the fraction of data wait."""
    suite.require_device()
    style = suite.training_style
    sources = [Source(style, "dali"), Source(style, "cpu-fused")]
    micro_batch = 0
    with sampling() as sampler:
        for source in sources:
            fitting = (micro_batch,) if micro_batch else suite.scale.micro_batches
            numbers = attempt(partial(first_that_fits, suite, source, fitting, sampler))
            micro_batch = numbers.get("micro_batch", micro_batch)
            record(source.row("training") | {"model": suite.scale.model} | numbers)
        numbers = attempt(partial(ceiling, suite, sources[-1], micro_batch, sampler))
        row = {"measured": "training", "style": style, "decoder": "none: one batch again and again"}
        record(row | {"model": suite.scale.model} | numbers)


def first_that_fits(suite: Suite, source: Source, micro_batches: tuple[int, ...], sampler: GpuSampler) -> Row:
    """Train with the first batch size that the GPU's memory holds.

    Raises:
        NotRunError: when none does, or the loader does not work here.
    """
    for micro_batch in micro_batches:
        with opened_loader(suite, source, micro_batch=micro_batch) as loader, suppress(torch.OutOfMemoryError):
            return {"micro_batch": micro_batch, **train(suite, loader, micro_batch, sampler)}
        torch.cuda.empty_cache()
    raise NotRunError(f"the model does not fit with {micro_batches[-1]} clips")


def ceiling(suite: Suite, source: Source, micro_batch: int, sampler: GpuSampler) -> Row:
    """Train in the same way on a single batch in memory.

    Raises:
        NotRunError: when no batch size is known to fit.
    """
    if not micro_batch:
        raise NotRunError("there is nothing to compare it with")
    with opened_loader(suite, source, micro_batch=micro_batch) as loader:
        batch = next(loader.batches(0, 1))
    numbers = train(suite, RepeatedBatch(batch), micro_batch, sampler)
    return {"micro_batch": micro_batch, **numbers}


def train(suite: Suite, loader: Loader, micro_batch: int, sampler: GpuSampler) -> Row:
    """Return the time of a step and its data wait, when the loader has reached a steady state."""
    scale = suite.scale
    bench = AblationBench(suite.device, scale.model, scale.frame_size, (micro_batch,), workers=0)
    loop = ablation.build_loop(loader, bench, batch=micro_batch, folder=suite.folder / "run")
    start = time.perf_counter()
    _, timing = ablation.train(loop, warm_steps=scale.warm_steps, steps=scale.steps)
    measured_s = timing.step_s * scale.steps
    return {
        "precision": loop.precision,
        "clips_per_s": timing.clips_per_s,
        "step_s": timing.step_s,
        "data_wait_share": timing.data_wait_share,
        "trainer_memory_mb": timing.memory_mb,
        **sampler.since(max(start, time.perf_counter() - measured_s)),
    }
