"""All measurements that need a GPU: NVDEC, the loader, a training with it, and the models alone.

python -m benchmarks.gpu --output DIR [--budget-s 480] [--parts ...] [--device cpu --quick]

Meant for one GPU and 16 cores or more, unattended. Every part runs in a process of its own, so that it survives
the failure of the others; one that takes too long is killed. `DIR/gpu_suite.json` and `DIR/summary.md` are
written anew after each part, and whatever a killed part had found by then is in them. What a part printed is in
`DIR/parts`. `--device cpu` tries the suite itself on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from avion_dali.child_process import die_with_parent
from benchmarks.gpu import report
from benchmarks.gpu.parts import (
    QUICK,
    NotRunError,
    Part,
    PartFunction,
    PartResult,
    Recorder,
    Scale,
    Suite,
    first_line,
)
from benchmarks.machine import ROOT, machine_facts
from benchmarks.report import Benchmark, every_row, write_result

BUDGET_S = 480.0
_LEAST_S = 5.0  # a part with less time than this is not started
_STACKS_S = 0.5
_TAIL_LINES = 30

# In order of worth: module, function, seconds expected on an H200, and those after which it is killed (or when
# the budget is spent). What is expected fits into the budget; nothing of it has been seen on a GPU yet.
PARTS = (
    Part("machine", "benchmarks.gpu.device", "machine", limit_s=60, expected_s=12),
    Part("media", "benchmarks.gpu.chunks", "media", limit_s=120, expected_s=45),
    Part("correctness", "benchmarks.gpu.correctness", "correctness", limit_s=90, expected_s=35),
    Part("throughput", "benchmarks.gpu.rates", "throughput", limit_s=120, expected_s=50),
    Part("training", "benchmarks.gpu.loading", "training", limit_s=100, expected_s=40),
    Part("train_steps", "benchmarks.gpu.models", "train_steps", limit_s=160, expected_s=95),
    Part("model_memory", "benchmarks.gpu.models", "model_memory", limit_s=100, expected_s=50),
    Part("backends", "benchmarks.gpu.loading", "backends", limit_s=60, expected_s=30),
)


BENCHMARK = Benchmark("gpu_suite", every_row, requirement=report.REQUIREMENT)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="benchmarks.gpu"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for results and media")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds for all parts (480)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny: tries the suite, measures nothing")
    parser.add_argument("--parts", nargs="+", choices=[p.name for p in PARTS], help="default: all, in order")
    # How the suite calls itself for one part.
    parser.add_argument("--only", nargs=3, metavar=("NAME", "MODULE", "FUNCTION"), help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run all parts, or a single part in its process."""
    options = build_parser().parse_args(argv)
    options.output = options.output.resolve()
    if options.only:
        run_here(options)
    parts = [part for part in PARTS if options.parts is None or part.name in options.parts]
    results = run_parts(parts, options)
    print((options.output / "summary.md").read_text())
    print("\n".join(report.ending(results)))
    return int(any(result.outcome in ("failed", "killed") for result in results))


def run_parts(parts: Sequence[Part], options: argparse.Namespace) -> list[PartResult]:
    """Run parts one after the other, and write the results after each."""
    (options.output / "parts").mkdir(parents=True, exist_ok=True)
    facts = machine_facts()
    deadline = time.monotonic() + options.budget_s
    results: list[PartResult] = []
    for part in parts:
        seconds = min(part.limit_s, deadline - time.monotonic())
        if seconds < _LEAST_S:
            reason = f"no time left of {options.budget_s:.0f} s"
            results.append(PartResult(part.name, "not run", reason))
        else:
            results.append(run_apart(part, options, seconds=seconds))
        print(report.outcome_line(results[-1]), file=sys.stderr, flush=True)
        write_all(results, facts, options.output)
    return results


def run_apart(part: Part, options: argparse.Namespace, *, seconds: float) -> PartResult:
    """Run a part in a separate process."""
    path = options.output / "parts" / f"{part.name}.json"
    path.unlink(missing_ok=True)  # of an earlier run
    command = [sys.executable, "-m", "benchmarks.gpu", "--output", str(options.output)]
    command += ["--device", options.device, *(["--quick"] if options.quick else [])]
    command += ["--only", part.name, part.module, part.function]
    start = time.monotonic()
    with path.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
        overran = False
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            overran = True
            process.send_signal(signal.SIGUSR1)  # the log shows where it hangs
            time.sleep(_STACKS_S)
        finally:
            process.kill()  # its own processes die with it
            process.wait()
    result = PartResult.read(path)
    result.seconds = round(time.monotonic() - start, 1)
    if result.outcome == "under way":
        result.outcome = "killed" if overran else "failed"
        result.reason = f"not done after {seconds:.0f} s" if overran else how_it_ended(process.returncode)
    if result.outcome in ("failed", "killed"):
        lines = path.with_suffix(".log").read_text(errors="replace").splitlines()
        result.output_tail = "\n".join(lines[-_TAIL_LINES:])
    return result


def how_it_ended(status: int) -> str:
    """Describe a process's exit status."""
    return f"its process was killed by {signal.Signals(-status).name}" if status < 0 else f"status {status}"


def run_here(options: argparse.Namespace) -> None:
    """Run one part in this process, then end it."""
    die_with_parent(os.getppid())
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    name, module, function = options.only
    recorder = Recorder(options.output / "parts" / f"{name}.json")
    suite = Suite(options.output, options.device, QUICK if options.quick else Scale())
    try:
        part: PartFunction = getattr(importlib.import_module(module), function)
        part(suite, recorder.add)
        recorder.finish("done")
    except NotRunError as error:
        recorder.finish("not run", str(error))
    except Exception as error:  # the process boundary: a part may fail in any way, the others continue
        traceback.print_exc()
        recorder.finish("failed", first_line(error))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # libraries may hang when they end, which is not measured


def write_all(results: Sequence[PartResult], facts: dict[str, Any], folder: Path) -> None:
    """Write the JSON and the summary of the parts so far."""
    ends = [
        {"measured": "part", **{name: value for name, value in vars(result).items() if name != "rows"}}
        for result in results
    ]
    rows = [{**row, "part": result.part} for result in results for row in result.rows]
    write_result(BENCHMARK, [*ends, *rows], machine=facts, folder=folder)
    (folder / "summary.md").write_text(report.summary(results, facts))
