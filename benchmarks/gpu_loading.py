"""Parts of the GPU suite about the product's own loader: its rate, a training that it feeds, its memory."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch
from avion_dali.assembly.loaders import Loaders

from avion_dali.assembly.resolve import resolve
from avion_dali.config import DataConfig, ModelConfig, OptimConfig, TrainConfig
from avion_dali.contracts import ClipBatch, UserError
from avion_dali.cores import available_cores
from avion_dali.engine.distributed import Distributed
from avion_dali.loading.faults import LoaderStats
from benchmarks.ablation import AblationBench, build_loop
from benchmarks.gpu_corpus import open_manifest
from benchmarks.gpu_parts import NotRunError, Record, Suite, attempt
from benchmarks.gpu_sampling import GpuSampler, sampling
from benchmarks.loader_runs import CONTEXT_LENGTH, ENDLESS, LoaderBench, measure, worker_pids
from benchmarks.machine import Row, process_memory_mb

READINGS = 20  # of memory
Decoder = Literal["dali", "cpu-fused"]
Loader = Any  # a `ClipLoader` of any strategy, or what stands in for one


@dataclass(frozen=True)
class Source:
    """What is loaded, and by what.

    Args:
        style: of the chunks.
        decoder: who decodes.
        workers: decode processes; 0 for one a core.
        size: of the chunks; None for the usual one.
    """

    style: str
    decoder: Decoder
    workers: int = 0
    size: tuple[int, int] | None = None

    def row(self, measured: str) -> Row:
        """What a row says of it."""
        workers = self.workers or available_cores()
        return {"measured": measured, "style": self.style, "decoder": self.decoder, "workers": workers}


@contextmanager
def opened_loader(suite: Suite, source: Source, *, micro_batch: int) -> Iterator[Loader]:
    """Open the loader that a training with this configuration has.

    Raises:
        NotRunError: when its chunks could not be made, or it does not work here.
    """
    manifest = open_manifest(suite, source.style, source.size)
    config = TrainConfig(
        output_dir=str(suite.folder / "run"),
        decoder=source.decoder,
        data=DataConfig(frame_size=suite.scale.frame_size, workers=source.workers),
        model=ModelConfig(context_length=CONTEXT_LENGTH),
        optim=OptimConfig(global_batch=micro_batch, micro_batch=micro_batch),
    )
    try:
        loaders = Loaders(resolve(config, Distributed(device=torch.device(suite.device))))
    except UserError as error:
        raise NotRunError(str(error)) from error
    try:
        yield loaders.training(manifest)
    except UserError as error:
        raise NotRunError(str(error)) from error
    finally:
        loaders.close()


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
    """Load for a while; what it costs, and how busy the GPU is meanwhile."""
    with opened_loader(suite, source, micro_batch=suite.scale.batch) as loader:
        start = time.perf_counter()
        numbers = measure(loader, bench)
        numbers |= sampler.since(start + bench.warm_s)
        return {**numbers, "left_to_cpu_fused": loader.stats.decoded_on_cpu}


class RepeatedBatch:
    """A loader that never waits: the ceiling of what a training can reach.

    Args:
        batch: delivered again and again.
    """

    steps_per_epoch, accum_steps = 1_000, 1

    def __init__(self, batch: ClipBatch) -> None:
        self.batch, self.stats = batch, LoaderStats()

    def batches(self, first_step: int, last_step: int) -> Iterator[ClipBatch]:
        """Yield the batch for every step."""
        for _ in range(first_step, last_step):
            self.stats.delivered += len(self.batch)
            yield self.batch

    def close(self) -> None:
        """Nothing to end."""


def training(suite: Suite, record: Record) -> None:
    """Train a few steps from each decoder: what share of the time is spent waiting for clips."""
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
    """The same training from one batch that is there already.

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
    """Time of a step, and how much of it waits, once everything is in full swing."""
    scale = suite.scale
    bench = AblationBench(suite.device, scale.model, scale.frame_size, (micro_batch,), workers=0)
    loop = build_loop(loader, bench, batch=micro_batch, folder=suite.folder / "run")
    steps = loop.steps(0, ENDLESS)
    deque(islice(steps, scale.warm_steps), maxlen=0)
    loop.timer.window()
    start = time.perf_counter()
    deque(islice(steps, scale.steps), maxlen=0)
    timing = loop.timer.window()
    return {
        "precision": loop.precision,
        "clips_per_s": round(timing.clips_per_s, 1),
        "step_s": round(timing.step_s, 4),
        "data_wait_share": round(timing.data_wait_share, 4),
        "trainer_memory_mb": round(timing.memory_mb),
        **sampler.since(start),
    }


def memory(suite: Suite, record: Record) -> None:
    """Memory of the trainer, the largest worker and the GPU over many batches, at both sizes."""
    suite.require_device()
    style = suite.training_style
    for size in (suite.scale.size, suite.scale.other_size):
        source = Source(style, "dali", size=size)
        row = source.row("memory") | {"size": "x".join(map(str, size))}
        record(row | attempt(partial(memory_of, suite, source)))


def memory_of(suite: Suite, source: Source) -> Row:
    """Load many batches and read memory now and then."""
    batches = suite.scale.memory_batches
    every = max(batches // READINGS, 1)
    end = time.perf_counter() + suite.scale.memory_s
    readings: list[dict[str, float]] = []
    with sampling() as sampler, opened_loader(suite, source, micro_batch=suite.scale.batch) as loader:
        for number, _ in enumerate(loader.batches(0, batches), start=1):
            is_late = time.perf_counter() > end
            if is_late or number % every == 0:
                readings.append({"batches": number, **memory_now(sampler)})
            if is_late:
                break
    columns = {name: [reading[name] for reading in readings] for name in readings[-1]}
    quarter = len(readings) // 4
    growth = {
        f"{name}_growth_after_a_quarter": round(values[-1] - values[quarter], 1)
        for name, values in columns.items()
        if name != "batches"
    }
    return {"batches_read": readings[-1]["batches"], **growth, **columns}


def memory_now(sampler: GpuSampler) -> dict[str, float]:
    """Private memory of this process and of the largest worker, and what all use of the GPU, in MB."""
    workers = max(process_memory_mb(pid)["RssAnon"] for pid in worker_pids())
    on_gpu = sampler.memory_mb()
    return {
        "trainer_mb": process_memory_mb()["RssAnon"],
        "largest_worker_mb": workers,
        **({} if on_gpu is None else {"gpu_mb": on_gpu}),
    }


def first_batch(suite: Suite, record: Record) -> None:
    """Seconds until a loader is there and has delivered; in a fresh process, and once more."""
    suite.require_device()
    for decoder in ("dali", "cpu-fused"):
        source = Source(suite.training_style, decoder)
        for turn in ("first in its process", "again"):
            row = source.row("first batch") | {"turn": turn}
            record(row | attempt(partial(time_first_batch, suite, source)))


def time_first_batch(suite: Suite, source: Source) -> Row:
    """Make a loader and take two batches."""
    clock = [time.perf_counter()]
    with opened_loader(suite, source, micro_batch=suite.scale.batch) as loader:
        clock.append(time.perf_counter())
        for batch in loader.batches(0, 2):
            int(batch.frames_BTHWC[-1, -1, -1, -1, -1])  # it is there when a number of it is
            clock.append(time.perf_counter())
    names = ("loader_made_s", "first_batch_s", "second_batch_s")
    return {name: round(b - a, 3) for name, a, b in zip(names, clock, clock[1:], strict=False)}
