"""Part of the GPU suite: clips per second of the graph alone, with input from memory."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import NamedTuple

from avion_dali.data.planner import Planner
from benchmarks.corpus import FOUR
from benchmarks.gpu.chunks import STYLES, open_manifest
from benchmarks.gpu.correctness import graph_settings, mini_clips, planned
from benchmarks.gpu.device import GpuSampler, sampling
from benchmarks.gpu.parts import NotRunError, Record, Suite, attempt
from benchmarks.report import Row
from pipelines.graph import GraphInputs, failure_cause, graph_inputs
from pipelines.graph_runner import GraphRunner

BATCHES = 12  # of different clips, fed over and over
_QUEUED = 3  # one more than the graph has under way


class Cell(NamedTuple):
    """The decoded clips and the settings of the graph."""

    style: str  # of the chunks
    size: tuple[int, int]  # of the chunks
    threads: int  # clips that are decoded at the same time


@dataclass(frozen=True)
class Supply:
    """Batches in memory."""

    batches: Sequence[GraphInputs]  # inputs of the graph
    packets_per_clip: float  # mean number; so many frames are decoded
    kb_per_clip: float  # mean length of a mini clip


def cells(suite: Suite) -> list[Cell]:
    """List the cases by importance; the size that fills the GPU with sessions is last."""
    scale, style = suite.scale, suite.training_style
    usual, few, many = scale.threads[0], min(scale.threads), max(scale.threads)
    return [
        *(Cell(style, scale.size, threads) for threads in scale.threads),
        *(Cell(other, scale.size, usual) for other in STYLES if other != style),
        *(Cell(style, scale.other_size, threads) for threads in dict.fromkeys((usual, few, many))),
    ]


def throughput(suite: Suite, record: Record) -> None:
    """Rates of the graph by threads, codec, profile and size, and how busy the decoders are meanwhile."""
    suite.require_device()
    supplies: dict[tuple[str, tuple[int, int]], Supply | str] = {}
    with sampling() as sampler:
        for cell in cells(suite):
            key = (cell.style, cell.size)
            if key not in supplies:
                supplies[key] = supply_or_reason(suite, *key)
            supply = supplies[key]
            row: Row = {"measured": "throughput", **cell._asdict(), "size": "x".join(map(str, cell.size))}
            if isinstance(supply, str):
                record({**row, "not_run": supply})
            else:
                record({**row, **attempt(partial(rate, suite, cell, supply, sampler))})


def supply_or_reason(suite: Suite, style: str, size: tuple[int, int]) -> Supply | str:
    """Batches of training clips, or why DALI decodes none of them."""
    try:
        return make_supply(suite, style, size)
    except NotRunError as error:
        return str(error)


def make_supply(suite: Suite, style: str, size: tuple[int, int]) -> Supply:
    """Batches of training clips, planned and collected as the loader does.

    Raises:
        NotRunError: when DALI decodes too few of them.
    """
    batch = suite.scale.batch
    planner = Planner(open_manifest(suite, style, size), FOUR.rules(suite.scale.frame_size), seed=0)
    rows = min(BATCHES * batch, planner.manifest.num_samples) // batch * batch
    requests = [planner.plan(row, epoch=0) for row in range(rows)]
    minis, packets = mini_clips(suite, requests, planned)
    fit = [request for request in requests if request.sample_id in minis]
    fit = fit[: len(fit) // batch * batch]
    inputs = [
        graph_inputs([(clip, minis[clip.sample_id]) for clip in fit[first : first + batch]])
        for first in range(0, len(fit), batch)
    ]
    if not inputs:
        raise NotRunError(f"DALI decodes only {len(minis)} of {len(requests)} clips")
    num_bytes = sum(len(mini.data) for mini in minis.values())
    return Supply(inputs, packets / len(minis), num_bytes / len(minis) / 1e3)


def rate(suite: Suite, cell: Cell, supply: Supply, sampler: GpuSampler) -> Row:
    """Decode for a while."""
    scale = suite.scale
    runner = GraphRunner(graph_settings(suite, batch=scale.batch, threads=cell.threads))
    start = time.perf_counter()
    try:
        taken = batches_taken(runner, supply)
        next(taken)
        first_s = time.perf_counter() - start
        take_for(taken, scale.warm_s)
        warm = time.perf_counter()
        batches = take_for(taken, scale.measure_s)
        seconds = time.perf_counter() - warm
    except RuntimeError as error:
        return {"failure": failure_cause(error)}
    clips_per_s = batches * scale.batch / seconds
    return {
        "clips_per_s": round(clips_per_s, 1),
        "frames_decoded_per_s": round(clips_per_s * supply.packets_per_clip),
        "packets_per_clip": round(supply.packets_per_clip, 1),
        "kb_per_clip": round(supply.kb_per_clip, 1),
        "first_batch_s": round(first_s, 2),
        **sampler.since(warm),
    }


def batches_taken(runner: GraphRunner, supply: Supply) -> Iterator[None]:
    """Feed a graph endlessly; yields when a batch is finished."""
    inputs = cycle(supply.batches)
    for _ in range(_QUEUED):
        runner.put(next(inputs))
    while True:
        frames, _ = runner.take()
        runner.put(next(inputs))
        # A number of each batch is fetched: frames on a GPU may not be there yet.
        int(frames[-1, -1, -1, -1, -1, -1])
        yield


def take_for(taken: Iterator[None], seconds: float) -> int:
    """Take batches for at least this long; returns how many."""
    end = time.perf_counter() + seconds
    for count, _ in enumerate(taken, start=1):
        if time.perf_counter() > end:
            return count
    return 0
