"""`avion-dali plan`: how many clips per second this machine would deliver, how chunks should be made, and why.

Light: decode processes import the modules of the command again.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, get_args

from avion_dali.config import ModelSize
from avion_dali.contracts import DecodeError, UserError
from avion_dali.cores import available_cores
from avion_dali.data.profiles import PROFILES, ProfileName
from avion_dali.inspection.capacity import (
    Candidate,
    DecodeCost,
    Machine,
    ModelDemand,
    forecast,
    longest_chunk_s,
    mean_needs,
    recommend,
)

if TYPE_CHECKING:
    import torch

    from avion_dali.data.manifest import Manifest

AS_GIVEN = "as given"  # what stands for a profile's name where chunks exist
SAMPLE_SECONDS = 10.0
TRAINER_CLIPS = 400
MODEL_SECONDS = 5.0
BINDING = {
    "workers": "too few workers",
    "reads": "cores and reads",
    "cores": "cores",
    "disk": "disk",
    "trainer": "training process",
    "model": "model",
}
COLUMNS = (
    "chunk s",
    "Mbit/s",
    "GB",
    "decoded",
    "reads",
    "KB read",
    "KB whole",
    "eq.3 s",
    "CPU ms",
    "clips/s",
    "cores",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    source = parser.add_argument_group("what is decoded (default: procedural pictures)")
    source.add_argument("--videos", nargs="+", type=Path, default=[], help="10 s of each are tried")
    source.add_argument("--chunks", type=Path, help="a manifest, or a chunk folder: judged as it is")
    source.add_argument("--profiles", nargs="+", default=list(PROFILES), choices=tuple(PROFILES))
    source.add_argument("--chunk-seconds", nargs="+", type=int, default=[5, 15, 60], help="default: 5 15 60")
    source.add_argument("--short-side", type=int, default=288, help="of chunks, in pixels (default 288)")
    source.add_argument("--hours", type=float, default=100.0, help="of the whole corpus (default 100)")
    clip = parser.add_argument_group("clips")
    clip.add_argument("--frames", type=int, default=4, help="of a clip (default 4)")
    clip.add_argument("--clip-seconds", type=float, default=1.0, help="span of a clip (default 1)")
    clip.add_argument("--frame-size", type=int, default=224, help="side of a frame in pixels (default 224)")
    model = parser.add_argument_group("the model (default: none, the loader is judged alone)")
    model.add_argument("--global-batch", type=int, default=256, help="clips of a step (default 256)")
    model.add_argument("--step-seconds", type=float, help="seconds of a step without waiting for data")
    model.add_argument("--model", choices=get_args(ModelSize), help="or: timed here")
    model.add_argument("--micro-batch", type=int, help="clips of a pass of --model (default 64; 2 on a CPU)")
    model.add_argument("--processes", type=int, help="training processes (default: one a GPU, at least one)")
    machine = parser.add_argument_group("the machine")
    machine.add_argument("--workers", type=int, help="decode processes (default: one a core)")
    machine.add_argument(
        "--disk", type=Path, help="folder for the chunks (default: this one; that of --chunks)"
    )
    machine.add_argument("--seconds", type=float, default=1.0, help="of timing for each profile (default 1)")


def run(options: argparse.Namespace) -> int:
    """Measure, predict and recommend; status 0."""
    _check(options)
    workers = options.workers or available_cores()
    with TemporaryDirectory(prefix="avion-plan-") as scratch, _decode_errors():
        sources = make_sources(options, Path(scratch))
        _say("timing decoding")
        costs = decode_costs(sources, options)
        machine = measure_machine(sources, options, workers=workers)
        demand = model_demand(options)
        candidates = [judge(s, costs[s.profile], machine, options=options, demand=demand) for s in sources]
    print(machine_in_words(machine, options, demand), end="\n\n")
    print(table(candidates, machine, options, demand), end="\n\n")
    print(advice(candidates, machine, demand))
    return 0


@contextmanager
def _decode_errors() -> Iterator[None]:
    try:
        yield
    except DecodeError as error:
        raise UserError(f"--chunks: {error}; `avion-dali check` lists what is wrong with chunks") from error


def _say(what: str) -> None:
    print(f"--- {what}", file=sys.stderr, flush=True)


def _check(options: argparse.Namespace) -> None:
    positive = ("frames", "clip_seconds", "frame_size", "hours", "global_batch", "step_seconds", "micro_batch")
    for name in (*positive, "processes", "workers", "seconds"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} {value} must be more than 0")
    if min(options.chunk_seconds) < 1:
        raise UserError(f"--chunk-seconds {min(options.chunk_seconds)} must be at least 1")
    if options.short_side < 16 or options.short_side % 16:
        raise UserError(f"--short-side {options.short_side} must be a positive multiple of 16")
    if options.step_seconds and options.model:
        raise UserError("--step-seconds states what --model would measure; give one of them")


@dataclass(frozen=True)
class Source:
    """Chunks of one kind: their profile, the length they stand for, and a manifest of clips of them."""

    profile: str
    chunk_seconds: float
    manifest: Manifest


def make_sources(options: argparse.Namespace, scratch: Path) -> list[Source]:
    """Encode samples in all profiles and lengths, and open what was given."""
    from avion_dali.inspection.sampling import write_sample_manifest

    sources = [_given(options, scratch)] if options.chunks else []
    if options.videos or not options.chunks:
        for (profile, seconds), root in _encode(options, scratch).items():
            folder = scratch / f"manifest-{profile}-{seconds}"
            manifest = write_sample_manifest(
                root, folder, clip_seconds=options.clip_seconds, chunk_seconds=seconds
            )
            sources.append(Source(profile, seconds, manifest))
    return sources


def _given(options: argparse.Namespace, scratch: Path) -> Source:
    from avion_dali.data.manifest import Manifest
    from avion_dali.inspection.sampling import chunk_figures, link_some_chunks, write_sample_manifest

    if (options.chunks / "manifest.json").is_file():
        manifest = Manifest(options.chunks)
    else:
        links = link_some_chunks(options.chunks, scratch)
        manifest = write_sample_manifest(links, scratch / "manifest", clip_seconds=options.clip_seconds)
    return Source(AS_GIVEN, chunk_figures(manifest).chunk_seconds, manifest)


def _encode(options: argparse.Namespace, scratch: Path) -> dict[tuple[ProfileName, int], Path]:
    """Encode stretches of video; returns the chunk folder that stands for each profile and chunk length."""
    from avion_dali.inspection.sampling import cuts_gops, encode_samples, procedural_pictures, video_pictures

    roots: dict[tuple[ProfileName, int], Path] = {}
    tasks: dict[Path, tuple[ProfileName, float, Path]] = {}
    for profile in options.profiles:
        for length in sorted(set(options.chunk_seconds)):
            encoded_s = float(length) if cuts_gops(profile, length) else SAMPLE_SECONDS
            root = roots[profile, length] = scratch / f"{profile}-{encoded_s:g}"
            tasks[root] = (profile, encoded_s, root)
    size = {"seconds": SAMPLE_SECONDS, "short_side": options.short_side}
    for number, video in enumerate(options.videos or [None]):
        _say(f"encoding {SAMPLE_SECONDS:.0f} s of {video or 'procedural pictures'} in {len(tasks)} ways")
        pictures = procedural_pictures(**size) if video is None else video_pictures(video, **size)
        encode_samples(pictures, list(tasks.values()), name=str(number))
    return roots


def decode_costs(sources: Sequence[Source], options: argparse.Namespace) -> dict[str, DecodeCost]:
    """Time clips of three lengths for each profile, on its longest chunks."""
    from avion_dali.inspection.measuring import measure_decode_cost

    return {
        source.profile: measure_decode_cost(
            source.manifest,
            frame_counts=sorted({1, options.frames, 2 * options.frames}),
            frame_size=options.frame_size,
            seconds=options.seconds,
        )
        for source in {source.profile: source for source in sources}.values()
    }


def measure_machine(sources: Sequence[Source], options: argparse.Namespace, *, workers: int) -> Machine:
    """Measure what does not depend on the profile."""
    from avion_dali.inspection import measuring
    from avion_dali.inspection.sampling import sample_requests

    manifest = sources[0].manifest
    requests = sample_requests(manifest, num_frames=options.frames, frame_size=options.frame_size)
    _say("timing all cores together")
    slowdown = measuring.measure_slowdown(requests, seconds=options.seconds / 2)
    _say("reading the disk")
    paths: AbstractContextManager[list[Path]]
    if options.chunks and not options.disk:
        paths = nullcontext(sorted({Path(part.chunk.path) for r in requests for part in r.parts}))
    else:
        paths = measuring.disk_test_files(options.disk or Path())
    with paths as files:
        disk = measuring.measure_disk(files, readers=workers)
    _say("timing the training process's share")
    counts = (1, max(options.frames, 2))
    size = {"frame_size": options.frame_size, "clips": TRAINER_CLIPS}
    trainer = measuring.measure_trainer(manifest, device=_device(), frame_counts=counts, **size)
    return Machine(available_cores(), measuring.physical_cores(), slowdown, trainer, disk)


def _device() -> torch.device:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def model_demand(options: argparse.Namespace) -> ModelDemand:
    """Return the rate at which the model takes clips, and what it takes of the processor."""
    import torch

    processes = options.processes or max(torch.cuda.device_count(), 1)
    if options.step_seconds:
        # Each process keeps a core busy for as long as a step lasts: it launches kernels and waits for them.
        core_ms = 1e3 * options.step_seconds * processes / options.global_batch
        return ModelDemand(options.global_batch / options.step_seconds, processes, core_ms)
    if options.model is None:
        return ModelDemand(processes=processes)
    device = _device()
    micro_batch = options.micro_batch or (64 if device.type == "cuda" else 2)
    _say(f"timing {options.model} on {device}, {micro_batch} clips a pass")
    clip_ms, core_ms = time_model(options, device, micro_batch)
    return ModelDemand(1e3 / clip_ms * processes, processes, core_ms)


def time_model(options: argparse.Namespace, device: torch.device, micro_batch: int) -> tuple[float, float]:
    """Time training steps on clips of noise; returns milliseconds and processor milliseconds of a clip."""
    import torch

    from avion_dali.assembly.model import build_model
    from avion_dali.assembly.resolve import resolve
    from avion_dali.config import DataConfig, ModelConfig, TrainConfig
    from avion_dali.contracts import ClipBatch
    from avion_dali.device_ops.randomness import StepKey
    from avion_dali.engine.distributed import Distributed
    from avion_dali.engine.optim import build_optimizer, parameter_groups
    from avion_dali.engine.precision import autocast, gradient_scaler, resolve_precision
    from avion_dali.engine.timing import synchronize
    from avion_dali.objectives.contrastive import Contrastive

    data = DataConfig(num_frames=options.frames, frame_size=options.frame_size)
    config = TrainConfig(data=data, model=ModelConfig(size=options.model))
    run = resolve(config, Distributed(device=device))
    model = build_model(run, num_classes=0)
    optimizer = build_optimizer(parameter_groups(model, config.optim.weight_decay), config.optim)
    objective, precision = Contrastive(data.normalization), resolve_precision("auto", device)
    scaler = gradient_scaler(precision, device)
    size = (micro_batch, options.frames, options.frame_size, options.frame_size, 3)
    batch = ClipBatch(
        frames_BTHWC=torch.randint(256, size, dtype=torch.uint8, device=device),
        tokens_BL=torch.ones(micro_batch, config.model.context_length, dtype=torch.int64, device=device),
        labels_B=None,
        sample_ids=torch.arange(micro_batch).numpy(),
        view_ids=torch.zeros(micro_batch, dtype=torch.int64).numpy(),
        valid=torch.ones(micro_batch, dtype=torch.bool).numpy(),
    )

    def step() -> None:
        with autocast(precision, device):
            loss, _ = objective.loss(objective.outputs(model, batch, StepKey(0, 0)))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        synchronize(device)

    try:
        step()
        start, core_start, steps = time.perf_counter(), time.process_time(), 0
        while not steps or time.perf_counter() - start < MODEL_SECONDS:
            step()
            steps += 1
    except torch.OutOfMemoryError as error:
        raise UserError(f"--micro-batch {micro_batch} is too much for {device}; lower it") from error
    clips = steps * micro_batch
    return 1e3 * (time.perf_counter() - start) / clips, 1e3 * (time.process_time() - core_start) / clips


def judge(
    source: Source, cost: DecodeCost, machine: Machine, *, options: argparse.Namespace, demand: ModelDemand
) -> Candidate:
    """Predict what one kind of chunks delivers."""
    from avion_dali.inspection.sampling import chunk_figures, clip_needs, sample_requests

    requests = sample_requests(source.manifest, num_frames=options.frames, frame_size=options.frame_size)
    needs, figures = mean_needs([clip_needs(r) for r in requests]), chunk_figures(source.manifest)
    # The files that were encoded may be shorter than those they stand for.
    needs = replace(needs, chunk_bytes=needs.chunk_bytes * source.chunk_seconds / figures.chunk_seconds)
    workers = options.workers or available_cores()
    rates = forecast(needs, cost, machine, num_frames=options.frames, workers=workers, demand=demand)
    bytes_per_hour = figures.bytes_per_hour
    return Candidate(source.profile, source.chunk_seconds, bytes_per_hour, figures.mbit_per_s, needs, rates)


def machine_in_words(machine: Machine, options: argparse.Namespace, demand: ModelDemand) -> str:
    """Say what was measured besides decoding."""
    decoded = ", ".join(map(str, filter(None, [*options.videos, options.chunks])))
    clip = f"{options.frames} frames of {options.clip_seconds:g} s at {options.frame_size} pixels"
    disk, trainer_ms = machine.disk, machine.trainer.ms(options.frames)
    lines = [
        f"decoded   {decoded or 'procedural pictures; --videos or --chunks take your own'}",
        f"clips     {clip}, decoder cpu-fused",
        f"cores     {machine.cores} ({machine.physical_cores} without hyper-threads); "
        f"with all of them decoding a clip takes {machine.busy_slowdown:.2f} x its processor time",
        f"training  {trainer_ms:.2f} ms of a core a clip for planning, collecting and copying",
    ]
    if math.isfinite(demand.clips_per_s):
        lines.append(f"model     {demand.clips_per_s:,.0f} clips/s, {demand.core_ms:.2f} ms of a core a clip")
    if disk is None:
        return "\n".join([*lines, "disk      not measured: the page cache cannot be dropped here"])
    speeds = (
        f"{disk.sequential_mb_s:,.0f} MB/s in order, {disk.random_reads_per_s:,.0f} reads/s of 64 KiB at random"
    )
    return "\n".join([*lines, f"disk      {speeds} by {disk.readers} readers, nothing cached by this machine"])


def table(
    candidates: Sequence[Candidate], machine: Machine, options: argparse.Namespace, demand: ModelDemand
) -> str:
    """Show what every profile and chunk length delivers."""
    rate = demand.clips_per_s if math.isfinite(demand.clips_per_s) else 100.0
    rows = [["profile", *COLUMNS, "bound by"]]
    for c in candidates:
        numbers = (
            f"{c.chunk_seconds:.0f}",
            f"{c.mbit_per_s:.2f}",
            f"{c.bytes_per_hour * options.hours / 1e9:,.1f}",
            f"{c.needs.decoded:.1f}",
            f"{c.needs.reads:.0f}",
            f"{c.needs.read_bytes / 1e3:,.0f}",
            f"{c.needs.chunk_bytes / 1e3:,.0f}",
            f"{_longest_s(c, machine):,.0f}" if machine.disk else "-",
            f"{c.forecast.decode_ms:.1f}",
            f"{c.forecast.clips_per_s:,.0f}",
            f"{c.forecast.cores_for(rate):.1f}",
        )
        rows.append([c.profile, *numbers, BINDING[c.forecast.binds]])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines, _EXPLANATION.format(hours=options.hours, rate=rate)])


_EXPLANATION = """\
GB: of {hours:g} hours of video. A clip decodes this many coded pictures and reads this much through the packet
index. KB whole: what reading its whole chunk would take; eq.3 s: the longest chunk that the paper then allows
at these clips/s. Cores: all that {rate:,.0f} clips/s keep busy, those of the training process included."""


def _longest_s(candidate: Candidate, machine: Machine) -> float:
    assert machine.disk is not None
    rate, speed = candidate.forecast.clips_per_s, machine.disk.sequential_mb_s
    return longest_chunk_s(clips=rate, mbit_per_s=candidate.mbit_per_s, step_s=1.0, read_mb_s=speed)


def advice(candidates: Sequence[Candidate], machine: Machine, demand: ModelDemand) -> str:
    """Recommend chunks and workers, and say why."""
    read_mb_s = machine.disk.sequential_mb_s if machine.disk else math.inf
    best = recommend(candidates, clips_per_s=demand.clips_per_s, read_mb_s=read_mb_s)
    rates, wanted = best.forecast, demand.clips_per_s
    if rates.binds == "model":
        why = "the smallest files that keep the model busy"
    elif math.isfinite(wanted):
        why = f"the fastest here, though the model could take {wanted:,.0f} clips/s"
    else:
        why = "the most clips per second for its bytes; --step-seconds or --model ask for what a model needs"
    workers = math.ceil(rates.workers_for(wanted) / demand.processes)
    chunks = f"--profile {best.profile} --chunk-seconds {best.chunk_seconds:.0f}"
    if best.profile == AS_GIVEN:
        chunks = "the chunks as they are"
    return (
        f"recommended  {chunks}\n"
        f"because      {why}\n"
        f"predicted    {rates.clips_per_s:,.0f} clips/s, bound by: {BINDING[rates.binds]}\n"
        f"data.workers {workers} for each of {demand.processes} training processes"
    )
