"""`avion-dali plan`: predicts the clips per second of this machine, and recommends how to make chunks.

Decode processes import this module again, so it imports little.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, get_args

from avion_dali.config import ModelSize
from avion_dali.contracts import DecodeError, UserError
from avion_dali.cores import available_cores
from avion_dali.data.profiles import PROFILES, ProfileName
from avion_dali.inspection.plan_forecast import Candidate, ClipCost, Limit, ModelDemand, forecast, recommend

if TYPE_CHECKING:
    import torch

    from avion_dali.data.planner import Planner

AS_GIVEN = "as given"  # in place of a profile's name, for existing chunks
SAMPLE_SECONDS, LEAST_FPS = 10.0, 24
BLOCK = 8 * 1024 * 1024  # size of sequential reads, for equation 3
DISK_SECONDS, MODEL_SECONDS = 0.2, 5.0  # of each measurement
# What limits the clips per second, and what would raise them.
LIMITS: dict[Limit, tuple[str, str]] = {
    "workers": ("workers", "more decode processes (data.workers), more than cores if they wait for the disk"),
    "cores": ("CPU cores", "more cores, a profile with less CPU ms, smaller frames, or --decoder dali"),
    "disk": ("disk", "a faster disk, or a profile that reads fewer bytes per clip"),
    "trainer": ("training process", "more training processes, since each runs a separate loader"),
    "model": ("model", "a faster GPU or a smaller model: the loader already keeps it busy"),
}
COLUMNS = "profile|chunk s|GB|decoded|reads|KB read|eq.3 s|CPU ms|disk ms|clips/s|cores|limited by"
ROW = "{}|{:.0f}|{:,.1f}|{:.1f}|{:.0f}|{:,.0f}|{:,.0f}|{:.1f}|{:.2f}|{:,.0f}|{:.1f}|{}"
EXPLANATION = """\
GB: size of {hours:g} hours of video. decoded, reads, KB read: decoded pictures, reads and bytes per clip, with
the packet index. CPU ms, disk ms: time of a worker and of the disk per clip. eq.3 s: the longest chunk that the
paper allows at these clips/s if chunks are read whole. cores: used at {rate:,.0f} clips/s by all processes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    source = parser.add_argument_group("what is decoded (default: procedural pictures)")
    source.add_argument(
        "--videos", nargs="+", type=Path, default=[], help="10 s of each are encoded and measured"
    )
    source.add_argument("--chunks", type=Path, help="a manifest or a chunk folder, measured as it is")
    source.add_argument("--profiles", nargs="+", default=list(PROFILES), choices=tuple(PROFILES))
    source.add_argument("--chunk-seconds", nargs="+", type=int, default=[5, 15, 60], help="default: 5 15 60")
    source.add_argument(
        "--short-side", type=int, default=288, help="short side of chunks in pixels (default 288)"
    )
    source.add_argument(
        "--hours", type=float, default=100.0, help="length of the dataset in hours (default 100)"
    )
    clip = parser.add_argument_group("clips")
    clip.add_argument("--frames", type=int, default=4, help="frames per clip (default 4)")
    clip.add_argument("--clip-seconds", type=float, default=1.0, help="span of a clip in seconds (default 1)")
    clip.add_argument("--frame-size", type=int, default=224, help="side of a frame in pixels (default 224)")
    model = parser.add_argument_group("the model (default: none, only the loader is measured)")
    model.add_argument("--global-batch", type=int, default=256, help="clips per step (default 256)")
    model.add_argument("--step-seconds", type=float, help="duration of a step without data wait")
    model.add_argument("--model", choices=get_args(ModelSize), help="measure this model instead")
    model.add_argument(
        "--micro-batch", type=int, help="clips per forward pass of --model (default 64; 2 on a CPU)"
    )
    model.add_argument("--processes", type=int, help="training processes (default: one per GPU, at least one)")
    machine = parser.add_argument_group("the machine")
    cores = available_cores()
    machine.add_argument("--workers", type=int, default=cores, help="decode processes (default: one per core)")
    machine.add_argument("--disk", type=Path, help="folder for chunks (default: this one; that of --chunks)")
    machine.add_argument(
        "--seconds", type=float, default=1.0, help="seconds of loading per kind of chunk (default 1)"
    )


def run(options: argparse.Namespace) -> int:
    """Measure, predict and recommend; the exit status is 0."""
    _check(options)
    try:
        with TemporaryDirectory(prefix="avion-plan-") as scratch:
            sources = make_sources(options, Path(scratch))
            costs, read_mb_s = measure(sources, options)
            demand = model_demand(options)
            candidates = [judge(s, costs[s.files], options=options, demand=demand) for s in sources]
    except DecodeError as error:
        raise UserError(f"--chunks: {error}; `avion-dali check` lists what is wrong with chunks") from error
    print(measured_in_words(options, demand, read_mb_s=read_mb_s), end="\n\n")
    print(table(candidates, options, demand=demand, read_mb_s=read_mb_s), end="\n\n")
    print(advice(candidates, demand, read_mb_s=read_mb_s))
    return 0


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
        raise UserError("--step-seconds replaces the measurement of --model; give only one of them")


@dataclass(frozen=True)
class PlannedSource:
    """Chunks of one kind.

    Args:
        profile: name of the profile.
        chunk_seconds: chunk length that these chunks represent.
        files: name of the decoded files; kinds with the same files have the same cost of decoding.
        planner: planner of clips of these chunks.
    """

    profile: str
    chunk_seconds: float
    files: str
    planner: Planner


def make_sources(options: argparse.Namespace, scratch: Path) -> list[PlannedSource]:
    """Open the given chunks, and encode samples in all profiles and chunk lengths."""
    from avion_dali.data.planner import ClipRules, Planner
    from avion_dali.inspection.plan_samples import mean_chunk, open_chunks, write_sample_manifest

    rules, span = ClipRules(options.frames, options.frame_size, training=True), options.clip_seconds
    sources = []
    if options.chunks:
        planner = Planner(open_chunks(options.chunks, scratch, clip_seconds=span), rules, seed=0)
        sources.append(PlannedSource(AS_GIVEN, mean_chunk(planner.manifest)[0], AS_GIVEN, planner))
    if options.videos or not options.chunks:
        for (profile, seconds), root in _encode(options, scratch).items():
            folder = scratch / f"manifest-{profile}-{seconds}"
            manifest = write_sample_manifest(root, folder, clip_seconds=span, chunk_seconds=seconds)
            sources.append(PlannedSource(profile, seconds, root.name, Planner(manifest, rules, seed=0)))
    return sources


def _encode(options: argparse.Namespace, scratch: Path) -> dict[tuple[ProfileName, int], Path]:
    """Encode samples, and return the chunk folder that represents each profile and chunk length."""
    from avion_dali.data.hand_held import draw_pictures
    from avion_dali.inspection import plan_samples

    ways: dict[tuple[ProfileName, int], tuple[ProfileName, float, Path]] = {}
    for profile, length in product(options.profiles, sorted(set(options.chunk_seconds))):
        # The length of a chunk affects decoding only if the chunk is shorter than a GOP.
        encoded_s = length if length * LEAST_FPS < PROFILES[profile].gop else SAMPLE_SECONDS
        ways[profile, length] = (profile, encoded_s, scratch / f"{profile}-{encoded_s:g}")
    tasks, size = list(set(ways.values())), {"seconds": SAMPLE_SECONDS, "short_side": options.short_side}
    for number, video in enumerate(options.videos or [None]):
        _say(f"encoding {SAMPLE_SECONDS:.0f} s of {video or 'procedural pictures'} in {len(tasks)} ways")
        stretch = plan_samples.video_pictures(video, **size) if video else draw_pictures(**size)
        plan_samples.encode_samples(*stretch, tasks=tasks, name=str(number))
    return {way: root for way, (_, _, root) in ways.items()}


def measure(sources: Sequence[PlannedSource], options: argparse.Namespace) -> tuple[dict[str, ClipCost], float]:
    """Measure the cost of loading by files, and the read speed of the disk in MB/s, infinite if unknown."""
    from avion_dali.inspection import plan_measurements as measured
    from avion_dali.inspection.plan_samples import clip_needs, sample_requests

    costs, planners = {}, {source.files: source.planner for source in sources}
    busy = {"workers": min(options.workers, available_cores()), "seconds": options.seconds}
    for files, planner in planners.items():
        _say(f"loading {files}")
        costs[files] = measured.measure_loader(planner, device=_device(), **busy)
    clips = sample_requests(sources[0].planner) if options.chunks and not options.disk else []
    chunks = sorted({Path(part.chunk.path) for clip in clips for part in clip.parts})
    with measured.disk_test_files(options.disk or Path(), chunks) as disk:
        if not disk:
            return costs, math.inf
        all_at_once = {"readers": options.workers, "seconds": DISK_SECONDS}
        for files, planner in planners.items():
            reads = [clip_needs(request)[1] for request in sample_requests(planner)]
            waiting_ms, _ = measured.read_clips(disk, reads, readers=1, seconds=DISK_SECONDS)
            disk_ms, _ = measured.read_clips(disk, reads, **all_at_once)
            costs[files] = replace(costs[files], waiting_ms=waiting_ms, disk_ms=disk_ms)
        return costs, measured.read_clips(disk, [[BLOCK]], **all_at_once)[1]


def _device() -> torch.device:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def model_demand(options: argparse.Namespace) -> ModelDemand:
    """Return the demand of the model for clips and processor time."""
    import torch

    processes = options.processes or max(torch.cuda.device_count(), 1)
    if options.step_seconds:
        # Each process keeps a core busy during the whole step: it launches kernels and waits for them.
        core_ms = 1e3 * options.step_seconds * processes / options.global_batch
        return ModelDemand(options.global_batch / options.step_seconds, processes, core_ms)
    if options.model is None:
        return ModelDemand(processes=processes)
    device = _device()
    micro_batch = options.micro_batch or (64 if device.type == "cuda" else 2)
    _say(f"timing {options.model} on {device}, {micro_batch} clips per pass")
    clip_ms, core_ms = time_model(options, device, micro_batch=micro_batch)
    return ModelDemand(1e3 / clip_ms * processes, processes, core_ms)


def time_model(options: argparse.Namespace, device: torch.device, *, micro_batch: int) -> tuple[float, float]:
    """Time training steps on clips of noise, and return milliseconds and processor milliseconds per clip."""
    import torch

    from avion_dali.assembly.resolve import resolve
    from avion_dali.assembly.run_model import build_model
    from avion_dali.config import DataConfig, ModelConfig, TrainConfig
    from avion_dali.contracts import ClipBatch
    from avion_dali.device_ops.step_key import StepKey
    from avion_dali.engine.distributed import Distributed
    from avion_dali.engine.optimizers import build_optimizer, parameter_groups
    from avion_dali.engine.precision import autocast, resolve_precision
    from avion_dali.engine.timing import synchronize
    from avion_dali.objectives.contrastive import Contrastive

    data = DataConfig(num_frames=options.frames, frame_size=options.frame_size)
    config = TrainConfig(data=data, model=ModelConfig(size=options.model))
    run = resolve(config, Distributed(device=device))
    model = build_model(run, num_classes=0)
    optimizer = build_optimizer(parameter_groups(model, config.optim.weight_decay), config.optim)
    objective, precision = Contrastive(data.normalization), resolve_precision("auto", device)
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
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)

    try:
        step()
        start, core_start, steps = time.perf_counter(), time.process_time(), 0
        while not steps or time.perf_counter() - start < MODEL_SECONDS:
            step()
            steps += 1
    except torch.OutOfMemoryError as error:
        raise UserError(f"--micro-batch {micro_batch} is too large for {device}; lower it") from error
    clips = steps * micro_batch
    return 1e3 * (time.perf_counter() - start) / clips, 1e3 * (time.process_time() - core_start) / clips


def judge(
    source: PlannedSource, cost: ClipCost, *, options: argparse.Namespace, demand: ModelDemand
) -> Candidate:
    """Predict the clips per second of one kind of chunks."""
    from avion_dali.inspection.plan_samples import clip_needs, mean_chunk, sample_requests

    needs = [clip_needs(request) for request in sample_requests(source.planner)]
    decoded, reads = fmean(pictures for pictures, _ in needs), [sizes for _, sizes in needs]
    found = forecast(decoded, cost, cores=available_cores(), workers=options.workers, demand=demand)
    means = (decoded, fmean(map(len, reads)), fmean(map(sum, reads)))
    return Candidate(
        source.profile, source.chunk_seconds, mean_chunk(source.planner.manifest)[1], *means, found
    )


def measured_in_words(options: argparse.Namespace, demand: ModelDemand, *, read_mb_s: float) -> str:
    """Return a description of the measurements."""
    decoded = ", ".join(map(str, filter(None, [*options.videos, options.chunks])))
    clip = f"{options.frames} frames of {options.clip_seconds:g} s at {options.frame_size} pixels"
    model, disk = "none", "not measured: the page cache cannot be dropped here"
    if math.isfinite(demand.clips_per_s):
        model = f"{demand.clips_per_s:,.0f} clips/s, {demand.core_ms:.2f} ms of a core per clip"
    if math.isfinite(read_mb_s):
        disk = f"{read_mb_s:,.0f} MB/s in blocks of 8 MiB, without the page cache"
    return f"""\
decoded   {decoded or "procedural pictures; use --videos or --chunks for your own"}
clips     {clip}, decoder cpu-fused
cores     {available_cores()}, for {options.workers} decode processes
model     {model}
disk      {disk}"""


def table(
    candidates: Sequence[Candidate], options: argparse.Namespace, *, demand: ModelDemand, read_mb_s: float
) -> str:
    """Return the table of profiles and chunk lengths with their forecasts."""
    rate = demand.clips_per_s if math.isfinite(demand.clips_per_s) else 100.0
    rows = [COLUMNS.split("|")]
    for c in candidates:
        found, gb = c.forecast, c.bytes_per_s * 3600 * options.hours / 1e9
        needs = (c.decoded, c.reads, c.read_bytes / 1e3, c.longest_chunk_s(read_mb_s))
        rates = (found.decode_ms, 1e3 / found.ceilings["disk"], found.clips_per_s, rate * found.core_ms / 1e3)
        values = (c.profile, c.chunk_seconds, gb, *needs, *rates, LIMITS[found.limit][0])
        rows.append(ROW.format(*values).split("|"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines, EXPLANATION.format(hours=options.hours, rate=rate)])


def advice(candidates: Sequence[Candidate], demand: ModelDemand, *, read_mb_s: float) -> str:
    """Return the recommended chunks and workers, with the reason."""
    best = recommend(candidates, clips_per_s=demand.clips_per_s, read_mb_s=read_mb_s)
    found, wanted = best.forecast, demand.clips_per_s
    if found.limit == "model":
        why = "the smallest files that keep the model busy"
    elif math.isfinite(wanted):
        why = f"the fastest on this machine, but the model could use {wanted:,.0f} clips/s"
    else:
        why = "the most clips per second and byte; --step-seconds or --model add the demand of a model"
    made = f"--profile {best.profile} --chunk-seconds {best.chunk_seconds:.0f}"
    workers = math.ceil(found.workers_for(wanted) / demand.processes)
    return f"""\
recommended  {"the chunks as they are" if best.profile == AS_GIVEN else made}
because      {why}
predicted    {found.clips_per_s:,.0f} clips/s, limited by: {LIMITS[found.limit][0]}
faster with  {LIMITS[found.limit][1]}
data.workers {workers} for each of {demand.processes} training processes"""
