"""Compares the loss curves of two decoders in the demo's training, with several seeds and the same chunks.

python -m benchmarks.train.curves --decoders paper-fused cpu-fused
python -m benchmarks.train.curves --decoders dali cpu-fused   # on VP9 chunks, which DALI decodes without a GPU

A seed fixes weights, order and crops, so two runs of one seed differ by their decoder alone; runs of different
seeds show how far curves lie apart anyway. The claim: the mean curves of the decoders are closer than that.

Workers import this module: what needs torch is imported late.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from avion_dali.assembly.decoder_choice import decoder_names
from avion_dali.cli.demo import chunk_profile, demo_config, make_data, train_and_report
from benchmarks.report import Benchmark, Row, every_row, names, parser_of, select, working_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from avion_dali.config import TrainConfig

WINDOW = 29  # steps whose losses are averaged; one step's loss is mostly that of its clips
DECODERS = tuple(name for name in decoder_names() if name != "auto")
REQUIREMENT = {"difference of the mean curves": "below the spread of the seeds, the mean over the training"}


@dataclass(frozen=True)
class Run:
    """One training."""

    decoder: str  # what decoded
    seed: int  # of weights, order and crops
    losses: tuple[float, ...]  # of each optimizer step
    map_avg: float  # final held-out mAP
    lost_when_frozen: float  # fraction of the mAP above chance that is lost without motion


def train_run(config: TrainConfig) -> Run:
    """Train and evaluate as the demo does, every step's loss kept."""
    from avion_dali.engine.run_log import LOG_NAME, read_rows

    config = replace(config, run=replace(config.run, log_every=1, eval_every=config.optim.epochs))
    numbers = train_and_report(config)
    rows = [row for row in read_rows(Path(config.output_dir) / LOG_NAME) if row["kind"] == "train"]
    return Run(
        decoder=config.decoder,
        seed=config.run.seed,
        losses=tuple(row["loss"] for row in rows),
        map_avg=numbers.map_avg,
        lost_when_frozen=numbers.lost_when_frozen,
    )


def train_all(folder: Path, decoders: list[str], *, seeds: int, epochs: int) -> list[Run]:
    """Train each seed with one decoder after the other, so that a change of the machine's load meets both."""
    profile = chunk_profile("dali" if "dali" in decoders else decoders[0])
    manifests = make_data(folder / "data", profile)
    runs = []
    for seed in range(seeds):
        for decoder in decoders:
            config = demo_config(folder / f"{decoder}_{profile}_{epochs}_{seed}", manifests, decoder=decoder)
            config = replace(
                config, optim=replace(config.optim, epochs=epochs), run=replace(config.run, seed=seed)
            )
            runs.append(train_run(config))
    return runs


def windowed(losses: tuple[float, ...]) -> list[float]:
    """Means over `WINDOW` steps each; what is left at the end is not shown."""
    ends = range(0, len(losses) + 1, WINDOW)
    return [statistics.fmean(losses[start:end]) for start, end in pairwise(ends)]


def compare(runs: list[Run], decoders: tuple[str, str]) -> list[Row]:
    """Mean curves, their difference and the seeds' spread at each window, final scores, and the verdict.

    The spread is the standard deviation over seeds, of the decoder where it is larger.
    """
    curves = {name: [windowed(run.losses) for run in runs if run.decoder == name] for name in decoders}
    steps = []
    for place, columns in enumerate(zip(*(zip(*curves[name], strict=True) for name in decoders), strict=True)):
        means = [statistics.fmean(column) for column in columns]
        steps.append(
            {
                "measured": "step",
                "step": WINDOW * (place + 1),
                **{f"mean loss, {name}": mean for name, mean in zip(decoders, means, strict=True)},
                **{f"losses by seed, {name}": list(c) for name, c in zip(decoders, columns, strict=True)},
                "difference": means[0] - means[1],
                "spread": max(statistics.stdev(column) for column in columns),
                "range": max(max(column) - min(column) for column in columns),
            }
        )
    finals = [_final(name, [run for run in runs if run.decoder == name]) for name in decoders]
    return [*steps, *finals, _verdict(steps, runs, finals)]


def _final(decoder: str, runs: list[Run]) -> Row:
    scores = [run.map_avg for run in runs]
    return {
        "measured": "final",
        "decoder": decoder,
        "map_avg": statistics.fmean(scores),
        "map_avg_std": statistics.stdev(scores),
        "map_avg_by_seed": scores,
        "lost_when_frozen_by_seed": [run.lost_when_frozen for run in runs],
    }


def _verdict(steps: list[Row], runs: list[Run], finals: list[Row]) -> Row:
    pairs = [(a, b) for a in runs for b in runs if a.seed == b.seed and a.decoder < b.decoder]
    difference = statistics.fmean(abs(row["difference"]) for row in steps)
    spread = statistics.fmean(row["spread"] for row in steps)
    worst = max(steps, key=lambda row: abs(row["difference"]))
    return {
        "measured": "verdict",
        "seeds": len(pairs),
        "mean |difference| of the mean curves": difference,
        "mean spread of the seeds": spread,
        "ratio": difference / spread,
        "claim holds": difference < spread,
        "points where |difference| < spread": sum(abs(row["difference"]) < row["spread"] for row in steps),
        "points": len(steps),
        "largest |difference|": abs(worst["difference"]),
        "its step and spread": [worst["step"], worst["spread"]],
        "largest |difference| of one step's loss, same seed": max(
            abs(x - y) for a, b in pairs for x, y in zip(a.losses, b.losses, strict=True)
        ),
        "first step whose losses differ, by seed": [_first_difference(a, b) for a, b in pairs],
        "difference of mean mAP": finals[0]["map_avg"] - finals[1]["map_avg"],
        "std of mAP over seeds, the larger": max(row["map_avg_std"] for row in finals),
    }


def _first_difference(a: Run, b: Run) -> int | None:
    """The first step, from 1; None when all losses are equal to the last bit."""
    unequal = (
        step for step, losses in enumerate(zip(a.losses, b.losses, strict=True), 1) if len({*losses}) > 1
    )
    return next(unequal, None)


def tables(rows: list[Row]) -> str:
    """Final scores and the verdict; the curves are in the picture."""
    return every_row([row for row in rows if row["measured"] != "step"])


def draw(rows: list[Row]) -> Figure:
    """Draw every seed's curve and the means, and below them the means' difference and the seeds' spread."""
    from matplotlib.figure import Figure

    steps = select(rows, "step")
    at = [row["step"] for row in steps]
    decoders = names(select(rows, "final"), "decoder")
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for decoder, color, line in zip(decoders, ("#d62728", "#1f77b4"), ("-", "--"), strict=True):
        by_seed = [row.get(f"losses by seed, {decoder}", []) for row in steps]
        for losses in zip(*by_seed, strict=True):
            top.plot(at, losses, line, color=color, linewidth=0.8, alpha=0.4)
        means = [row[f"mean loss, {decoder}"] for row in steps]
        top.plot(at, means, line, color=color, label=f"{decoder}, mean")
    top.set(ylabel=f"training loss, mean of {WINDOW} steps", title="faint: one line per seed")
    top.legend()
    spreads = [row["spread"] for row in steps]
    label = "± standard deviation over seeds"
    bottom.fill_between(at, [-s for s in spreads], spreads, color="#cccccc", label=label)
    bottom.plot(at, [row["difference"] for row in steps], color="black", label=" - ".join(decoders))
    bottom.set(xlabel="optimizer step", ylabel="difference of means")
    bottom.legend(fontsize=8)
    return figure


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--decoders", nargs=2, choices=DECODERS, default=("paper-fused", "cpu-fused"))
    parser.add_argument("--seeds", type=int, default=3, help="trainings with each decoder, at least 2")
    parser.add_argument("--epochs", type=int, default=4, help="of each training; the demo has 8")
    parser.add_argument("--folder", type=Path, help="keep data and runs here; by default they are removed")
    options = parser.parse_args()
    if options.seeds < 2 or len(set(options.decoders)) < 2:
        parser.error("two different decoders and at least two seeds are needed")

    def measure() -> list[Row]:
        with working_folder(options.folder) as folder:
            runs = train_all(folder, options.decoders, seeds=options.seeds, epochs=options.epochs)
        return compare(runs, tuple(options.decoders))

    benchmark = Benchmark(f"curves_{'_'.join(options.decoders)}", tables, draw, REQUIREMENT)
    benchmark.run(options, measure)


if __name__ == "__main__":
    main()
