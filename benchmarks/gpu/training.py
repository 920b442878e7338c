"""Parts of the GPU suite: whole trainings, built as `avion-dali pretrain` builds them."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from avion_dali.assembly.blocking_sync import use_blocking_sync
from avion_dali.assembly.training import training as open_training
from avion_dali.config import DaliConfig, DataConfig, ModelConfig, ObjectiveConfig, OptimConfig, TrainConfig
from avion_dali.contracts import ClipBatch
from avion_dali.cores import available_cores
from avion_dali.engine.distributed import Distributed
from avion_dali.loading.faults import LoaderStats
from benchmarks.corpus import FOUR, STRIDED, repeat_chunk
from benchmarks.gpu.chunks import chunks_of, manifest_of, open_manifest
from benchmarks.gpu.device import GpuSampler, sampling
from benchmarks.gpu.parts import NotRunError, Record, Suite, attempt
from benchmarks.loader.measure import Reading
from benchmarks.media import FPS
from benchmarks.report import Row
from benchmarks.train import ablation
from benchmarks.train.ablation import AblationBench

EXTRAPOLATED_CLIPS = 20_000_000  # about five epochs of Ego4D's narrations
NO_LOADER = "one batch again and again"  # in place of a decoder: the ceiling of what the others can reach


@dataclass(frozen=True)
class Fed:
    """A training, and what feeds it."""

    decoder: str  # name of the decoder, or `NO_LOADER`
    graphs: DaliConfig | None = None  # of `dali`
    encoder: str = "vit"  # `videomae` is pre-trained, others are trained with texts
    compile: bool = False
    long: bool = False  # so many steps that hours can be extrapolated

    def described(self) -> Row:
        """Return the columns of a row that say what this is."""
        how = vars(self.graphs) if self.graphs else {"workers": available_cores()}
        return {"decoder": self.decoder, "encoder": self.encoder, "compile": self.compile, **how}

    def config(self, suite: Suite, batch: int) -> TrainConfig:
        """Return the configuration of this training."""
        masked = self.encoder == "videomae"
        size, side = suite.scale.model, suite.scale.frame_size
        clips: dict[str, Any] = {"num_frames": 16, "sampling": "strided"} if masked else {"num_frames": 4}
        manifest = open_manifest(suite, suite.style, STRIDED if masked else FOUR)
        return TrainConfig(
            output_dir=tempfile.mkdtemp(prefix="run_", dir=suite.work),
            decoder="cpu-fused" if self.decoder == NO_LOADER else self.decoder,
            data=DataConfig(train_manifest=str(manifest.folder), frame_size=side, **clips),
            model=ModelConfig(encoder=self.encoder, size=size, compile=self.compile),
            objective=ObjectiveConfig(name="masked-video" if masked else "contrastive"),
            optim=OptimConfig(global_batch=batch, micro_batch=batch, epochs=1_000),
            dali=self.graphs or DaliConfig(),
        )


class RepeatedBatch:
    """A loader that never waits."""

    steps_per_epoch, accum_steps = 1_000, 1

    def __init__(self, batch: ClipBatch) -> None:
        self.batch, self.stats = batch, LoaderStats()

    def batches(self, first_step: int, last_step: int) -> Iterator[ClipBatch]:
        """Yield the batch for every step."""
        for _ in range(first_step, last_step):
            self.stats.delivered += len(self.batch)
            yield self.batch

    def close(self) -> None: ...


def training(suite: Suite, record: Record) -> None:
    """The model's ceiling, and a training that `cpu-fused` feeds from all cores."""
    record_trainings(suite, record, [Fed(NO_LOADER), Fed("cpu-fused")])


def long_training(suite: Suite, record: Record) -> None:
    """A training that `cpu-fused` feeds for so many steps that hours can be extrapolated."""
    record_trainings(suite, record, [Fed("cpu-fused", long=True)])


def dali_training(suite: Suite, record: Record) -> None:
    """Trainings that DALI feeds, by threads and graphs, the usual ones for long, then of compiled blocks."""
    suite.require_dali()
    *others, usual = [Fed("dali", graphs) for graphs in suite.scale.graphs]
    compiled = [replace(usual, compile=True)] if suite.device == "cuda" else []
    record_trainings(suite, record, [replace(usual, long=True), *others, *compiled])


def dali_training_blocking(suite: Suite, record: Record) -> None:
    """The same where the process sleeps while it waits for the GPU, which is set before CUDA starts."""
    if problem := use_blocking_sync(0) if suite.device == "cuda" else None:
        raise NotRunError(problem)
    suite.require_dali()
    record_trainings(suite, record, [Fed("dali", graphs) for graphs in suite.scale.blocking])


def videomae(suite: Suite, record: Record) -> None:
    """VideoMAE's pre-training: its ceiling, and fed by each decoder."""
    feeds = {NO_LOADER: None, "cpu-fused": None, "dali": suite.scale.graphs[-1]}
    record_trainings(suite, record, [Fed(name, graphs, "videomae") for name, graphs in feeds.items()])


def record_trainings(suite: Suite, record: Record, trainings: list[Fed]) -> None:
    """Run trainings one after the other."""
    with sampling() as sampler:
        for fed in trainings:
            numbers = attempt(partial(first_that_fits, suite, fed, sampler))
            record({"measured": "training", "model": suite.scale.model, **fed.described(), **numbers})


def first_that_fits(suite: Suite, fed: Fed, sampler: GpuSampler) -> Row:
    """Train with the batch size, or what is left of it when it was halved until the GPU's memory held it."""
    batch = suite.scale.batch
    while batch:
        try:
            return {"batch": batch, **train(suite, fed, batch, sampler)}
        except torch.OutOfMemoryError:
            batch //= 2
    raise NotRunError("the model does not fit")


def train(suite: Suite, fed: Fed, batch: int, sampler: GpuSampler) -> Row:
    """Return the time of a step and its parts, when the loader has reached a steady state."""
    scale = suite.scale
    finish = torch.cuda.synchronize if suite.device == "cuda" else lambda: None
    if suite.device == "cuda":
        torch.cuda.empty_cache()  # DALI's memory is outside of PyTorch's
    start = time.perf_counter()
    device = torch.device("cuda", 0) if suite.device == "cuda" else torch.device("cpu")
    with open_training(fed.config(suite, batch), Distributed(device=device)) as loop:
        if fed.decoder == NO_LOADER:
            loop.loader = RepeatedBatch(next(loop.loader.batches(0, 1)))
        numbers = loop.steps(0, loop.last_step)
        next(numbers)
        first_s = time.perf_counter() - start
        take(numbers, scale.warm_steps, seconds=scale.longest_s)
        finish()
        loop.timer.window()
        stats: Any = loop.loader.stats
        before, start = Reading.now(stats), time.perf_counter()
        take(numbers, scale.long_steps if fed.long else scale.steps, seconds=scale.longest_s)
        finish()
        timing = loop.timer.window()
        used = Reading.now(stats).since(before)
        row = {"precision": loop.precision, "first_step_s": round(first_s, 1), **dataclasses.asdict(timing)}
    row |= {name: used[name] for name in ("cores_busy", "worker_cpu_ms_per_clip", "trainer_cpu_ms_per_clip")}
    if fed.long:
        row["hours_for_20m_clips"] = round(EXTRAPOLATED_CLIPS / timing.clips_per_s / 3600, 2)
    return {**row, "left_to_cpu_fused": stats.decoded_on_cpu, **sampler.since(start)}


def take(numbers: Iterator[Any], steps: int, *, seconds: float) -> None:
    """Take steps, but no more after some seconds."""
    end = time.perf_counter() + seconds
    for _ in islice(numbers, steps):
        if time.perf_counter() > end:
            return


def table_4(suite: Suite, record: Record) -> None:
    """Four rows of the paper's table 4, through the project's own loader and loop, the last with DALI."""
    scale, batch = suite.scale, min(64, suite.scale.batch)
    steps, workers = min(10, scale.steps), max(1, available_cores() - 1)
    bench = AblationBench(suite.device, scale.model, scale.frame_size, (batch,), workers, steps)
    for case in (
        ablation.Case("300 s", "after decoding", "math"),
        ablation.Case("15 s", "merged", "sdpa"),
        ablation.Case("15 s", "merged, packet plan", "sdpa", "balanced"),
        ablation.Case("15 s", "by DALI", "sdpa", "balanced" if suite.device == "cuda" else "vp9"),
    ):
        row = {"measured": "table 4", "batch": batch, **vars(case)}
        record({**row, **attempt(partial(table_row, suite, case, bench))})


def table_row(suite: Suite, case: ablation.Case, bench: AblationBench) -> Row:
    """Train a few steps on chunks of this length, made of the carried ones by repetition."""
    chunk = chunks_of(open_manifest(suite, case.profile))[0]
    name = f"{case.profile}_{case.chunk.removesuffix(' s')}"
    target = suite.work / name / "repeated" / "0.mp4"
    if not target.exists():
        repeat_chunk(Path(chunk.path), target, int(case.chunk.removesuffix(" s")) * FPS // chunk.num_frames)
    manifest = manifest_of(suite, suite.work / name, f"{name}.manifest")
    row = ablation.run_case(case, manifest, bench, batch=bench.batches[0], folder=suite.work / "table")
    return {**row, "measured": "table 4"}
