"""The numbers of `make demo` and `make demo-finetune`, and the time they take, as the README shows them.

python -m benchmarks.studies.demo [--finetune] [--output-dir DIR]
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

from avion_dali.cli.demo_finetune import FinetuneNumbers, margins
from avion_dali.engine.run_log import LOG_NAME, read_rows
from benchmarks.machine import ROOT
from benchmarks.report import Benchmark, Row, every_row, parser_of, working_folder

DEMO = Benchmark(
    "demo",
    every_row,
    requirement={"times chance": 3.0, "share of the gain lost without motion": 1 / 3, "total_s": 300.0},
)
FINETUNE = Benchmark("demo_finetune", every_row, requirement={"total_s": 480.0})


def run(*arguments: str) -> Row:
    """Run a subcommand of `avion-dali` and read the seconds of its stages from what it prints."""
    start = time.monotonic()
    command = [sys.executable, "-m", "avion_dali", *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    total_s = time.monotonic() - start
    stages = re.findall(r"^--- (.+): (\d+) s$", done.stdout, re.MULTILINE)
    return {"total_s": total_s, **{f"{name}, s": int(seconds) for name, seconds in stages}}


def demo_rows(folder: Path) -> list[Row]:
    """Train the demo."""
    times = run("demo", "--output-dir", str(folder))
    numbers = json.loads((folder / "numbers.json").read_text())
    steps = [row for row in read_rows(folder / LOG_NAME) if row["kind"] == "train"]
    rates = {
        f"{label}, median": statistics.median(row[name] for row in steps)
        for label, name in (("training clips/s", "clips_per_s"), ("data wait share", "data_wait_share"))
    }
    return [{"measured": "demo", **numbers, **times, **rates}]


def finetune_rows(demo: Path, output: Path) -> list[Row]:
    """Fine-tune from the demo, which is run first if it is missing."""
    times = run("demo-finetune", "--demo-dir", str(demo), "--output-dir", str(output))
    numbers = FinetuneNumbers(**json.loads((output / "numbers.json").read_text()))
    rows: list[Row] = []
    for margin in margins(numbers):
        sides = {"this": margin.value, "that": margin.other, "gain": margin.value - margin.other}
        rows.append({"measured": "margin", "what": margin.what, **sides, "least": margin.least})
    return [*rows, {"measured": "time", **times}]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--finetune", action="store_true", help="fine-tune from the demo")
    parser.add_argument("--demo-dir", type=Path, help="of a demo that is there, for --finetune")
    parser.add_argument("--output-dir", type=Path, help="keep the runs here; by default they are removed")
    options = parser.parse_args()

    def measure() -> list[Row]:
        with working_folder(options.output_dir) as folder:
            if options.finetune:
                return finetune_rows(options.demo_dir or folder / "demo", folder / "demo_finetune")
            return demo_rows(folder)

    (FINETUNE if options.finetune else DEMO).run(options, measure)


if __name__ == "__main__":
    main()
