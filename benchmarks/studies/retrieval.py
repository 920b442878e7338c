"""Time and memory of scoring an evaluation of EPIC-KITCHENS-100's size, on made-up features.

python -m benchmarks.studies.retrieval [--clips 9668] [--captions 3842] [--rounds 3]

The retrieval metrics (mean average precision with real and binary relevancies, nDCG, both directions) of one
similarity matrix. Linux only: memory is read from /proc.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from benchmarks.machine import in_fresh_process
from benchmarks.report import Benchmark, Row, every_row, parser_of

WIDTH = 256
Result = TypeVar("Result")
REQUIREMENT = {"retrieval_metrics_s_below": 60.0, "extra_memory_mb_below": 1000.0}


@dataclass(frozen=True)
class Sizes:
    """How large the evaluation is, and how often each case is timed."""

    clips: int = 9668
    captions: int = 3842
    rounds: int = 3


def made_up(sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """Similarity and relevancy, float32 (clips, captions).

    Every clip shows one of the captions, and a fiftieth of the others are relevant by half.
    """
    rng = np.random.default_rng(2)
    shown = rng.integers(0, sizes.captions, sizes.clips)
    text = rng.standard_normal((sizes.captions, WIDTH), dtype=np.float32)
    video = text[shown] + 8 * rng.standard_normal((sizes.clips, WIDTH), dtype=np.float32)
    relevancy = np.float32(0.5) * (rng.random((sizes.clips, sizes.captions), dtype=np.float32) < 0.02)
    relevancy[np.arange(sizes.clips), shown] = 1
    return video @ text.T, relevancy


def retrieval_case(sizes: Sizes) -> Row:
    """All retrieval metrics of one similarity matrix."""
    from avion_dali.metrics.retrieval import retrieval_scores

    similarity, relevancy = made_up(sizes)
    row, scores = timed(lambda: retrieval_scores(similarity, relevancy), sizes.rounds)
    return {
        "measured": "retrieval metrics",
        "clips": sizes.clips,
        "captions": sizes.captions,
        **row,
        "matrix_mb": round(similarity.nbytes / 1e6, 1),
        "mean_average_precision": round(scores.mean_average_precision.average, 6),
        "ndcg": round(scores.ndcg.average, 6),
    }


def timed(run: Callable[[], Result], rounds: int) -> tuple[Row, Result]:
    """Fastest wall and processor seconds of some rounds, the memory they took on top, and the last result."""
    before = peak_memory_mb(reset=True)
    wall, cpu = [], []
    for _ in range(rounds):
        start, start_cpu = time.perf_counter(), time.process_time()
        result = run()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
    extra = peak_memory_mb() - before
    return {"s": round(min(wall), 3), "cpu_s": round(min(cpu), 3), "extra_memory_mb": round(extra, 1)}, result


def peak_memory_mb(*, reset: bool = False) -> float:
    """Largest resident memory of this process so far (MB, 10^6 bytes), or since it was last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024 / 1e6


BENCHMARK = Benchmark("retrieval", every_row, requirement=REQUIREMENT)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--clips", type=int, default=Sizes.clips)
    parser.add_argument("--captions", type=int, default=Sizes.captions)
    parser.add_argument("--rounds", type=int, default=Sizes.rounds, help="of which the fastest counts")
    options = parser.parse_args()
    sizes = Sizes(options.clips, options.captions, options.rounds)
    BENCHMARK.run(options, lambda: [in_fresh_process(retrieval_case, sizes)])


if __name__ == "__main__":
    main()
