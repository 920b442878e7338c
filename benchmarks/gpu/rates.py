"""Part of the GPU suite: clips per second of the graph alone, fed from memory as fast as it takes them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from typing import NamedTuple

from avion_dali.data.planner import Planner
from benchmarks.corpus import FOUR
from benchmarks.gpu.chunks import STYLES, open_manifest
from benchmarks.gpu.correctness import graph_settings, mini_clips, planned
from benchmarks.gpu.device import GpuSampler, sampling
from benchmarks.gpu.parts import NotRunError, Record, Scale, Suite, attempt
from benchmarks.report import Row
from pipelines.graph import GraphInputs, failure_cause, graph_inputs
from pipelines.graph_runner import GraphRunner

BATCHES = 12  # of different clips, fed over and over
_QUEUED = 3  # one more than the graph has under way


class Cell(NamedTuple):
    """What is decoded, and how."""

    style: str  # of the chunks
    size: tuple[int, int]  # of the chunks
    threads: int  # clips that a graph decodes at the same time
    graphs: int = 1  # in this process, each with threads of its own


@dataclass(frozen=True)
class Supply:
    """Batches in memory."""

    batches: Sequence[GraphInputs]  # inputs of the graph
    packets_per_clip: float  # mean number; so many frames are decoded
    kb_per_clip: float  # mean length of a mini clip


def cells(suite: Suite) -> list[Cell]:
    """What is measured, in order of worth; the size that fills the GPU with sessions comes last."""
    scale, style = suite.scale, suite.training_style
    usual, few, many = scale.threads[0], min(scale.threads), max(scale.threads)
    return [
        *(Cell(style, scale.size, threads) for threads in scale.threads),
        *(Cell(other, scale.size, usual) for other in STYLES if other != style),
        Cell(style, scale.size, usual, graphs=2),
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
    settings = graph_settings(suite, batch=suite.scale.batch, threads=cell.threads)
    crew = [_Feeder(GraphRunner(settings), supply, suite.scale) for _ in range(cell.graphs)]
    start = time.perf_counter()
    for feeder in crew:
        feeder.thread.start()
    for feeder in crew:
        feeder.thread.join()
    failures = [feeder.failure for feeder in crew if feeder.failure]
    if failures:
        return {"failure": failures[0]}
    batches_per_s = sum(feeder.batches / feeder.seconds for feeder in crew)
    clips_per_s = batches_per_s * suite.scale.batch
    first_s = max(feeder.first_s for feeder in crew)
    return {
        "clips_per_s": round(clips_per_s, 1),
        "frames_decoded_per_s": round(clips_per_s * supply.packets_per_clip),
        "packets_per_clip": round(supply.packets_per_clip, 1),
        "kb_per_clip": round(supply.kb_per_clip, 1),
        "first_batch_s": round(first_s, 2),
        **sampler.since(start + first_s + suite.scale.warm_s),
    }


@dataclass
class _Feeder:
    """Feeds one graph for a while, in a thread."""

    runner: GraphRunner  # the graph
    supply: Supply  # its batches
    scale: Scale  # how long
    batches: int = 0
    seconds: float = 0.0
    first_s: float = 0.0
    failure: str = ""
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._work, daemon=True)

    def _work(self) -> None:
        try:
            taken = self._taken()
            start = time.perf_counter()
            next(taken)
            self.first_s = time.perf_counter() - start
            _take_for(taken, self.scale.warm_s)
            start = time.perf_counter()
            self.batches = _take_for(taken, self.scale.measure_s)
            self.seconds = time.perf_counter() - start
        except RuntimeError as error:
            self.failure = failure_cause(error)

    def _taken(self) -> Iterator[None]:
        supply = cycle(self.supply.batches)
        for _ in range(_QUEUED):
            self.runner.put(next(supply))
        while True:
            frames, _ = self.runner.take()
            self.runner.put(next(supply))
            # A number of each batch is fetched: frames on a GPU may not be there yet.
            int(frames[-1, -1, -1, -1, -1, -1])
            yield


def _take_for(taken: Iterator[None], seconds: float) -> int:
    """Take batches for at least this long; returns how many."""
    end = time.perf_counter() + seconds
    for count, _ in enumerate(taken, start=1):
        if time.perf_counter() > end:
            return count
    return 0
