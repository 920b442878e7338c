"""Held-out retrieval against the batch a contrastive loss compares within: figure 6 of AVION, at demo scale.

python -m benchmarks.train.batch_size [--batches 8 16 32 64] [--seeds 2] [--epochs 4] [--jobs 2]

Every training sees the same clips in the same number of epochs, so one with a larger batch takes fewer steps.
The demo's learning rate was chosen for batches of `RATE_BATCH`; for others it is kept (`fixed`) or multiplied
by the square root of the ratio (`sqrt`: Krizhevsky 2014, arXiv 1404.5997). Batches above `MICRO_BATCH` are
accumulated from that many clips at a time, with cached features, and give the loss of the whole batch.
Losses of different batches are not compared: more captions to choose from make the task harder.

Workers import this module: what needs torch is imported late.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from avion_dali.cli.demo import chunk_profile, demo_config, make_data, train_and_report
from benchmarks.report import Benchmark, Row, markdown, parser_of, select, working_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from avion_dali.config import TrainConfig

Rule = Literal["fixed", "sqrt"]
RULES: tuple[Rule, ...] = ("fixed", "sqrt")
RATE_BATCH = 16  # of the demo's configuration, which its learning rate belongs to
MICRO_BATCH = 16
BATCHES = (8, 16, 32, 64)
SCALED = f"rate x sqrt(batch / {RATE_BATCH})"


@dataclass(frozen=True)
class Setting:
    """Settings of a training."""

    global_batch: int  # clips of a step, each compared with the captions of all
    rule: Rule  # how the learning rate follows
    seed: int  # of weights, order and crops

    @property
    def rate_factor(self) -> float:
        """Factor of the demo's learning rate."""
        return math.sqrt(self.global_batch / RATE_BATCH) if self.rule == "sqrt" else 1.0

    @property
    def name(self) -> str:
        """Folder of the training."""
        return f"batch{self.global_batch}_{self.rule}_seed{self.seed}"


def settings(batches: tuple[int, ...], seeds: int) -> Iterator[Setting]:
    """List all trainings, rule by rule and seed by seed; at `RATE_BATCH` the rules are one."""
    for rule, seed, batch in product(RULES, range(seeds), batches):
        if batch != RATE_BATCH or rule == RULES[0]:
            yield Setting(batch, rule, seed)


def configured(base: TrainConfig, setting: Setting, *, epochs: int) -> TrainConfig:
    """Change the demo's configuration to a setting's.

    Raises:
        UserError: the batch is no multiple of the micro-batch.
    """
    optim = replace(
        base.optim,
        global_batch=setting.global_batch,
        micro_batch=min(setting.global_batch, MICRO_BATCH),
        epochs=epochs,
        learning_rate=base.optim.learning_rate * setting.rate_factor,
        warmup_learning_rate=base.optim.warmup_learning_rate * setting.rate_factor,
    )
    run = replace(base.run, seed=setting.seed, eval_every=epochs)
    return replace(base, output_dir=str(Path(base.output_dir) / setting.name), optim=optim, run=run)


def train(base: TrainConfig, setting: Setting, epochs: int) -> Row:
    """Train and evaluate as the demo does; existing results are kept.

    Raises:
        RuntimeError: a signal stopped the training early.
    """
    from avion_dali.engine.run_log import LOG_NAME, read_rows

    config = configured(base, setting, epochs=epochs)
    numbers = train_and_report(config)
    end = next(row for row in reversed(read_rows(Path(config.output_dir) / LOG_NAME)) if row["kind"] == "end")
    if end["stopped_by"]:
        raise RuntimeError(f"{setting.name} was stopped by {end['stopped_by']} after step {end['step']}")
    return {
        "measured": "run",
        **vars(setting),
        "learning_rate": config.optim.learning_rate,
        "steps": end["step"],
        "samples": end["step"] * setting.global_batch,
        "map_avg": numbers.map_avg,
        "chance": numbers.chance,
        "lost_when_frozen": numbers.lost_when_frozen,
    }


def use_one_thread() -> None:
    """Compute on one thread in this process."""
    import torch

    torch.set_num_threads(1)


def train_all(base: TrainConfig, chosen: list[Setting], *, epochs: int, jobs: int) -> list[Row]:
    """Train all settings, some at the same time, each on one thread."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=use_one_thread) as pool:
        under_way = [pool.submit(train, base, setting, epochs) for setting in chosen]
        return [run.result() for run in under_way]


def compare(runs: list[Row]) -> list[Row]:
    """Average over seeds.

    At `RATE_BATCH` one training counts for both rules.
    """
    means: list[Row] = []
    for rule in RULES:
        for batch in sorted({run["global_batch"] for run in runs}):
            own = select(runs, "run", global_batch=batch, rule=RULES[0] if batch == RATE_BATCH else rule)
            means += [_mean(own, rule)] if own else []
    return [*runs, *means]


def _mean(runs: list[Row], rule: Rule) -> Row:
    scores = [run["map_avg"] for run in runs]
    return {
        "measured": "mean",
        **{name: runs[0][name] for name in ("global_batch", "learning_rate", "steps")},
        "rule": rule,
        "map_avg": statistics.fmean(scores),
        "range": max(scores) - min(scores),
        "map_avg_by_seed": scores,
        **{name: statistics.fmean(run[name] for run in runs) for name in ("lost_when_frozen", "chance")},
    }


def tables(rows: list[Row]) -> str:
    """Held-out mAP by batch and rule, the mean over seeds."""
    means = {(row["global_batch"], row["rule"]): row for row in select(rows, "mean")}
    lines = []
    for batch in sorted({batch for batch, _ in means}):
        fixed, scaled = (means[batch, rule] for rule in RULES)
        lines.append([batch, fixed["steps"], f"{fixed['map_avg']:.3f}", f"{scaled['map_avg']:.3f}"])
    return markdown(("global batch", "steps", "mAP, same rate", f"mAP, {SCALED}"), lines)


def draw(rows: list[Row]) -> Figure:
    """Draw held-out mAP against the batch, a line for each rule and a dot for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axis = figure.subplots()
    means = select(rows, "mean")
    styles = zip(RULES, ("same learning rate", SCALED), ("#1f77b4", "#d62728"), ("-", "--"), strict=True)
    for rule, label, color, line in styles:
        own = select(means, "mean", rule=rule)
        batches = [row["global_batch"] for row in own]
        axis.plot(batches, [row["map_avg"] for row in own], line, color=color, label=label)
        for row in own:
            scores = row["map_avg_by_seed"]
            axis.plot([row["global_batch"]] * len(scores), scores, "o", color=color, markersize=4, alpha=0.6)
    axis.axhline(means[0]["chance"], color="grey", linestyle=":", label="chance")
    batches = sorted({row["global_batch"] for row in means})
    axis.set_xscale("log", base=2)
    axis.set_xticks(batches, list(map(str, batches)))
    axis.set(xlabel="global batch (clips per step)", ylabel="held-out average mAP", ylim=(0, None))
    axis.set_title("equal clips seen; dots: one seed", fontsize=10)
    axis.legend(fontsize=8)
    return figure


BENCHMARK = Benchmark("batch_size", tables, draw)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES), help="global batches")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each setting")
    parser.add_argument("--epochs", type=int, default=4, help="of each training; the demo has 8")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at the same time, on one core each")
    parser.add_argument("--folder", type=Path, help="keep data and runs here; by default they are removed")
    options = parser.parse_args()
    if any(batch < 1 or batch % min(batch, MICRO_BATCH) for batch in options.batches):
        parser.error(f"batches must be multiples of {MICRO_BATCH}, or smaller")

    def measure() -> list[Row]:
        with working_folder(options.folder) as folder:
            manifests = make_data(folder / "data", chunk_profile("cpu-fused"))
            base = demo_config(folder / f"{options.epochs}epochs", manifests, decoder="cpu-fused")
            chosen = list(settings(tuple(options.batches), options.seeds))
            return compare(train_all(base, chosen, epochs=options.epochs, jobs=options.jobs))

    BENCHMARK.run(options, measure)


if __name__ == "__main__":
    main()
