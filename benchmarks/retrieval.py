"""Time and memory of scoring an evaluation of EPIC-KITCHENS-100's size, on made-up features.

python -m benchmarks.retrieval [--clips 9668] [--captions 3842] [--classes 3806] [--rounds 3]

Three cases: the relevancy of all clips to all captions by verb and noun classes; the retrieval metrics (graded
and binary mean average precision, nDCG, both directions) of one similarity matrix; the recognition metrics of
one matrix of probabilities. Each runs in a process of its own; twenty queries are compared with a plain loop.
Linux only: memory is read from /proc.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.machine import Row, machine_facts, print_rows, write_result

VERBS, NOUNS, WIDTH = 97, 300, 256
CHECKED_QUERIES = 20
REQUIREMENT = {"retrieval_metrics_s_below": 60.0, "extra_memory_mb_below": 1000.0}


@dataclass(frozen=True)
class Sizes:
    """How large the evaluation is, and how often each case is timed."""

    clips: int
    captions: int
    classes: int
    rounds: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=9668)
    parser.add_argument("--captions", type=int, default=3842)
    parser.add_argument("--classes", type=int, default=3806)
    parser.add_argument("--rounds", type=int, default=3, help="of which the fastest counts")
    options = parser.parse_args()
    sizes = Sizes(options.clips, options.captions, options.classes, options.rounds)
    facts = machine_facts()
    rows = measure_all(sizes)
    print_rows(rows)
    print(write_result("retrieval", rows, machine=facts, baseline=REQUIREMENT))


def measure_all(sizes: Sizes) -> list[Row]:
    """Every case in a fresh process, so that one's memory is not another's."""
    context = multiprocessing.get_context("spawn")
    rows = []
    for case in (relevancy_case, retrieval_case, recognition_case):
        with context.Pool(1) as pool:
            rows.append(pool.apply(case, (sizes,)))
    return rows


def caption_classes(count: int, seed: int) -> tuple[np.ndarray, list[list[int]]]:
    """Verb and nouns of made-up captions; frequent ones are as frequent as in kitchens (a power law)."""
    rng = np.random.default_rng(seed)
    verbs = np.minimum(rng.zipf(1.5, count) - 1, VERBS - 1)
    nouns = [np.minimum(rng.zipf(1.5, rng.integers(1, 4)) - 1, NOUNS - 1).tolist() for _ in range(count)]
    return verbs, nouns


def class_grades(sizes: Sizes):
    """Grades of the manifest's kind, and which caption each clip shows."""
    from avion_dali.data.relevancy import ClassGrades

    verbs, nouns = caption_classes(sizes.captions, seed=0)
    meanings: dict[tuple[int, frozenset[int]], int] = {}
    numbers = [meanings.setdefault((v, frozenset(n)), len(meanings)) for v, n in zip(verbs, nouns, strict=True)]
    has_noun = np.zeros((len(meanings), NOUNS), dtype=np.float32)
    for row, (_, members) in enumerate(meanings):
        has_noun[row, list(members)] = 1
    shown = np.random.default_rng(1).integers(0, sizes.captions, sizes.clips)
    of_caption = np.array(numbers)
    return ClassGrades(of_caption[shown], of_caption, np.array([v for v, _ in meanings]), has_noun), shown


def made_up(sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """Similarity and relevancy, float32 (clips, captions); every clip shows one of the captions."""
    grades, shown = class_grades(sizes)
    rng = np.random.default_rng(2)
    text = rng.standard_normal((sizes.captions, WIDTH), dtype=np.float32)
    video = text[shown] + 2 * rng.standard_normal((sizes.clips, WIDTH), dtype=np.float32)
    return video @ text.T, grades.of(np.arange(sizes.clips), None)


def relevancy_case(sizes: Sizes) -> Row:
    """Relevancy of all clips to all captions by their classes."""
    grades, _ = class_grades(sizes)
    row, relevancy = timed(lambda: grades.of(np.arange(sizes.clips), None), sizes.rounds)
    return {"case": "relevancy by classes", "clips": sizes.clips, "captions": sizes.captions, **row} | {
        "matrix_mb": round(relevancy.nbytes / 1e6, 1)
    }


def retrieval_case(sizes: Sizes) -> Row:
    """All retrieval metrics of one similarity matrix."""
    from avion_dali.metrics.retrieval import retrieval_scores

    similarity, relevancy = made_up(sizes)
    row, scores = timed(lambda: retrieval_scores(similarity, relevancy), sizes.rounds)
    return {
        "case": "retrieval metrics",
        "clips": sizes.clips,
        "captions": sizes.captions,
        **row,
        "matrix_mb": round(similarity.nbytes / 1e6, 1),
        "mean_average_precision": round(scores.mean_average_precision.average, 6),
        "ndcg": round(scores.ndcg.average, 6),
        "largest_difference_from_a_loop": check_queries(similarity, relevancy),
    }


def recognition_case(sizes: Sizes) -> Row:
    """All recognition metrics of one matrix of probabilities."""
    from avion_dali.metrics.classification import class_scores, softmax

    rng = np.random.default_rng(2)
    labels = rng.integers(0, sizes.classes, sizes.clips)
    logits = rng.standard_normal((sizes.clips, sizes.classes), dtype=np.float32)
    logits[np.arange(sizes.clips), labels] += 3
    probabilities = softmax(logits)
    del logits
    verbs, nouns = (rng.integers(0, n, sizes.classes) for n in (VERBS, NOUNS))
    row, scores = timed(
        lambda: class_scores(probabilities, labels, verbs=verbs.tolist(), nouns=nouns.tolist()), sizes.rounds
    )
    best = probabilities.argmax(axis=1)
    return {
        "case": "recognition metrics",
        "clips": sizes.clips,
        "classes": sizes.classes,
        **row,
        "matrix_mb": round(probabilities.nbytes / 1e6, 1),
        "top1": round(scores.top1, 6),
        "largest_difference_from_a_loop": abs(scores.top1 - float((best == labels).mean())),
    }


def timed(run, rounds: int):
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


def check_queries(similarity: np.ndarray, relevancy: np.ndarray) -> float:
    """Largest difference of some clips' graded average precision and nDCG from a loop over ranks."""
    from avion_dali.metrics.retrieval import retrieval_scores

    differences = []
    for query in np.linspace(0, len(similarity) - 1, CHECKED_QUERIES).astype(int):
        rows = slice(query, query + 1)
        scores = retrieval_scores(similarity[rows], relevancy[rows])
        expected = loop_scores(similarity[query], relevancy[query])
        found = (scores.mean_average_precision.video_to_text, scores.ndcg.video_to_text)
        differences += [abs(a - b) for a, b in zip(found, expected, strict=True)]
    return float(max(differences))


def loop_scores(similarity: np.ndarray, relevancy: np.ndarray) -> tuple[float, float]:
    """Graded average precision and nDCG of one query, rank by rank."""
    grades = [float(relevancy[i]) for i in np.argsort(-similarity, kind="stable")]
    credit = precision = gain = 0.0
    relevant = sum(grade > 0 for grade in grades)
    for rank, grade in enumerate(grades, start=1):
        credit += grade
        precision += credit / rank if grade == 1 else 0.0
        gain += grade / math.log2(rank + 1) if rank <= relevant else 0.0
    ideal = sum(grade / math.log2(rank + 1) for rank, grade in enumerate(sorted(grades, reverse=True), start=1))
    return precision / grades.count(1.0), gain / ideal


if __name__ == "__main__":
    main()
