"""What fine-tuning brings at small size, as the README shows it: `python -m benchmarks.demo_finetune`."""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from avion_dali.cli.demo_finetune import FinetuneNumbers, margins
from benchmarks.machine import ROOT, machine_facts, print_rows, write_result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo-dir", help="take data and pre-training of this demo; by default both are made")
    parser.add_argument("--output-dir", help="keep the runs here; by default they are thrown away")
    options = parser.parse_args()
    machine = machine_facts()
    with tempfile.TemporaryDirectory() as scratch:
        demo = Path(options.demo_dir or Path(scratch) / "demo")
        output = Path(options.output_dir or Path(scratch) / "demo_finetune")
        folders = ["--demo-dir", str(demo), "--output-dir", str(output)]
        start = time.monotonic()
        command = [sys.executable, "-m", "train.demo_finetune", *folders]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        total_s = time.monotonic() - start
        numbers = FinetuneNumbers(**json.loads((output / "numbers.json").read_text()))
    stages = dict(re.findall(r"^--- (.+): (\d+) s$", done.stdout, re.MULTILINE))
    rows = [
        {
            "what": margin.what,
            "this": round(margin.value, 4),
            "that": round(margin.other, 4),
            "gain": round(margin.value - margin.other, 4),
        }
        for margin in margins(numbers)
    ]
    rows.append({"total_s": round(total_s, 1), **{f"{name}, s": int(s) for name, s in stages.items()}})
    required = {margin.what: margin.least for margin in margins(numbers)}
    print_rows(rows)
    print(write_result("demo_finetune", rows, machine=machine, baseline={**required, "total_s": 480.0}))


if __name__ == "__main__":
    main()
