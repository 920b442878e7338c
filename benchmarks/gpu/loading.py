"""Parts of the GPU suite about the loader alone: its rate."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Any

from avion_dali.assembly.open_clips import open_clips
from avion_dali.config import DaliConfig
from benchmarks.gpu.chunks import ODD, open_manifest
from benchmarks.gpu.device import GpuSampler, sampling
from benchmarks.gpu.parts import Record, Suite, attempt
from benchmarks.loader.measure import CONTEXT_LENGTH, LoaderBench, measure
from benchmarks.report import Row


def throughput(suite: Suite, record: Record) -> None:
    """DALI's rate with no training beside it, by threads, graphs, codec, profile and size."""
    suite.require_dali()
    style, (*others, usual) = suite.style, suite.scale.graphs
    few = replace(usual, threads=1)
    chunks = ("hevc", "compat", "intra", "vp9", style + ODD)
    cases = [
        (style, usual),
        *((style, each) for each in others),
        *((name, usual) for name in chunks),
        (style, few),
    ]
    record_rates(suite, record, [("dali", name, 0, graphs) for name, graphs in dict.fromkeys(cases)])


def loaders(suite: Suite, record: Record) -> None:
    """The rate of `cpu-fused` by workers, and of DALI with fewer workers than cores."""
    counts, graphs = suite.scale.workers, suite.scale.graphs[-1]
    cases = [("cpu-fused", suite.style, workers, None) for workers in counts]
    record_rates(
        suite, record, [*cases, ("cpu-fused", "compat", 0, None), ("dali", suite.style, counts[-1], graphs)]
    )


def record_rates(suite: Suite, record: Record, cases: list[tuple[str, str, int, DaliConfig | None]]) -> None:
    """Measure loaders one after the other: decoder, chunks, workers (0: one a core), graphs."""
    with sampling() as sampler:
        for decoder, chunks, workers, graphs in cases:
            row: Row = {"measured": "loader", "decoder": decoder, "chunks": chunks, "workers": workers or "all"}
            row |= vars(graphs) if graphs else {}
            options = {"workers": workers, "dali": graphs or DaliConfig()}
            record({**row, **attempt(partial(loader_rate, suite, decoder, chunks, options, sampler))})


def loader_rate(suite: Suite, decoder: str, chunks: str, options: dict[str, Any], sampler: GpuSampler) -> Row:
    """Load for a while; return the cost and the utilization of the GPU."""
    bench = LoaderBench(warm_s=suite.scale.rate_s / 3, seconds=suite.scale.rate_s)
    options |= {"batch_size": suite.scale.batch, "frame_size": suite.scale.frame_size}
    options |= {"decoder": decoder, "device": suite.device, "context_length": CONTEXT_LENGTH}
    with open_clips(open_manifest(suite, chunks), **options) as loader:
        start = time.perf_counter()
        rates = measure(loader, bench) | {"left_to_cpu_fused": loader.stats.decoded_on_cpu}
        return rates | sampler.since(start + bench.warm_s)
