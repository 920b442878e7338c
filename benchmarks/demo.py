"""The demo's numbers and the time it takes, as the README shows them: `python -m benchmarks.demo`."""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from avion_dali.engine.run_log import LOG_NAME, read_rows
from benchmarks.machine import ROOT, machine_facts, print_rows, write_result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", help="keep the run here; by default it is thrown away")
    options = parser.parse_args()
    machine = machine_facts()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.output_dir or scratch)
        start = time.monotonic()
        command = [sys.executable, "-m", "train.demo", "--output-dir", str(folder)]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        total_s = time.monotonic() - start
        stages = dict(re.findall(r"^--- (.+): (\d+) s$", done.stdout, re.MULTILINE))
        rows = [row for row in read_rows(folder / LOG_NAME) if row["kind"] == "train"]
        row = {
            **{
                name: round(value, 4)
                for name, value in json.loads((folder / "numbers.json").read_text()).items()
            },
            "total_s": round(total_s, 1),
            **{f"{name}, s": int(seconds) for name, seconds in stages.items()},
            "training clips/s, median": round(sorted(r["clips_per_s"] for r in rows)[len(rows) // 2], 1),
            "data wait share, median": round(sorted(r["data_wait_share"] for r in rows)[len(rows) // 2], 4),
        }
    required = {"times chance": 3.0, "share of the gain lost without motion": 1 / 3, "total_s": 300.0}
    print_rows([row])
    print(write_result("demo", [row], machine=machine, baseline=required))


if __name__ == "__main__":
    main()
