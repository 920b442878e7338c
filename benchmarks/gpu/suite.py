"""All measurements that need a GPU, in three stages of a few minutes; README.md beside this file says more.

python -m benchmarks.gpu --make-media DIR
python -m benchmarks.gpu --stage 1|2|3 --media DIR --output DIR [--limit-s 200] [--device cpu]

Every part of a stage runs in a process of its own, so that it survives the failure of the others; one that
takes too long is killed, and one that even then does not end, stuck in the driver, is left behind. Results are
written anew whenever there are more, so whatever a killed part or stage had found by then is in them.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from avion_dali.child_process import die_with_parent
from avion_dali.files import atomic_write_text
from benchmarks.gpu import report
from benchmarks.gpu.parts import TINY, NotRunError, Part, PartResult, Scale, Suite, first_line
from benchmarks.machine import ROOT, machine_facts
from benchmarks.report import Benchmark, Row, every_row, rounded, write_result

_LEAST_S = 5.0  # a part with less time than this is not started
_STACKS_S = 0.5  # for the stacks of a process that is killed
_KILLED_S = 5.0  # for the driver to let go of it
_POLL_S = 1.0
_LOG_BYTES = 1_000_000  # of each part

# Each stage in order of worth, so that what the limit cuts off matters least.
STAGES: dict[int, tuple[Part, ...]] = {
    1: (
        Part("probe", ".device.probe", 40),
        Part("steps", ".models.steps", 90),
        Part("training", ".training.training", 45),
        Part("tests", ".checks.tests_of_models", 75),
        Part("long_training", ".training.long_training", 75),
        Part("compile_tests", ".checks.tests_of_compilation", 60),
    ),
    2: (
        Part("frames", ".correctness.frames", 60),
        Part("dali_training", ".training.dali_training", 100),
        Part("throughput", ".loading.throughput", 45),
        Part("dali_training_blocking", ".training.dali_training_blocking", 40),
        Part("dali_tests", ".checks.tests_of_dali", 60),
    ),
    3: (
        Part("memory", ".models.memory", 70),
        Part("videomae", ".training.videomae", 50),
        Part("table_4", ".training.table_4", 80),
        Part("loaders", ".loading.loaders", 50),
    ),
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="benchmarks.gpu"
    )
    names = [part.name for parts in STAGES.values() for part in parts]
    parser.add_argument("--make-media", type=Path, metavar="DIR", help="encode the chunks there, then end")
    parser.add_argument("--media", type=Path, metavar="DIR", help="the chunks that --make-media made")
    parser.add_argument("--stage", type=int, choices=STAGES, help="which measurements")
    parser.add_argument("--parts", nargs="+", choices=names, metavar="PART", help=f"of {', '.join(names)}")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for the three files of results")
    parser.add_argument("--limit-s", type=float, default=200.0, help="seconds for all parts (%(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal, tiny")
    # How the suite calls itself for one part.
    parser.add_argument("--only", nargs=3, metavar=("WORK", "NAME", "FUNCTION"), help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Make media, run a stage, or a single part in its process."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if options.make_media:
        from benchmarks.gpu.chunks import make_media

        return make_media(options.make_media, small=options.device == "cpu")
    if not options.media or not list(options.media.glob("*/*/0.mp4")):
        parser.error(f"--media {options.media} has no chunks; make them with --make-media DIR")
    if options.only:
        run_here(options)
    if not options.output or not (options.stage or options.parts):
        parser.error("--output, and --stage or --parts, are needed")
    chosen = [part for parts in STAGES.values() for part in parts if part.name in (options.parts or ())]
    name = "gpu_parts" if chosen else f"gpu_stage{options.stage}"
    with tempfile.TemporaryDirectory(prefix="avion_gpu_", ignore_cleanup_errors=True) as work:
        stage = Stage(name, options.output.resolve(), Path(work), options.media.resolve(), options.device)
        stage.run(chosen or STAGES[options.stage], limit_s=options.limit_s)
    print("\n".join(report.ending(stage.results)))
    return int(any(result.outcome in ("failed", "killed") for result in stage.results))


@dataclass
class Stage:
    """Some parts, one after the other, and the files of what they found."""

    name: str  # of the files
    output: Path  # where they are
    work: Path
    media: Path
    device: str
    results: list[PartResult] = field(default_factory=list)  # of the parts so far
    facts: dict[str, Any] = field(default_factory=machine_facts)

    def run(self, parts: Sequence[Part], *, limit_s: float) -> None:
        """Run the parts, and write the results whenever there are more."""
        deadline = time.monotonic() + limit_s
        for part in parts:
            seconds = deadline - time.monotonic()
            if self.device == "cuda":  # a rehearsal may be slow
                seconds = min(seconds, part.limit_s)
            if seconds < _LEAST_S:
                self.results.append(PartResult(part.name, "not run", f"no time left of {limit_s:.0f} s"))
            else:
                self.results.append(PartResult(part.name))
                self.results[-1] = self._run_apart(part, seconds)
            print(report.outcome_line(self.results[-1]), file=sys.stderr, flush=True)
            self._write()

    def _run_apart(self, part: Part, seconds: float) -> PartResult:
        """Run a part in a separate process."""
        path = self.work / f"{part.name}.json"
        command = [sys.executable, "-m", "benchmarks.gpu", "--media", str(self.media), "--device", self.device]
        command += ["--only", str(self.work), part.name, part.function]
        # Models of many sizes follow each other in one process; tiny ones gain nothing from several threads.
        environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ}
        environment |= {"OMP_NUM_THREADS": "1"} if self.device == "cpu" else {}
        start = time.monotonic()
        with path.with_suffix(".log").open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        ended = self._wait(process, path, start + seconds)
        how = "" if ended else f"not done after {seconds:.0f} s{end_process(process)}"
        result = PartResult.read(path)
        result.seconds = round(time.monotonic() - start, 1)
        if result.outcome == "under way":
            result.outcome = "failed" if ended else "killed"
            result.reason = how or f"its process ended with status {process.returncode}"
        return result

    def _wait(self, process: subprocess.Popen[bytes], path: Path, end: float) -> bool:
        """Wait for a process, and write what it has found so far; False when it took too long."""
        while (left := end - time.monotonic()) > 0:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=min(_POLL_S, left))
                return True
            found = PartResult.read(path)
            if len(found.rows) > len(self.results[-1].rows):
                self.results[-1] = found
                self._write()
        return False

    def _write(self) -> None:
        """Write results, summary and log."""
        card = (self.facts["gpus"] or [self.facts["cpu"]])[0]
        ends = [{"measured": "part", **vars(result), "rows": len(result.rows)} for result in self.results]
        rows = [{**row, "part": result.part} for result in self.results for row in result.rows]
        benchmark = Benchmark(self.name, every_row, requirement=report.REQUIREMENT)
        rows = [{**row, "card": card} for row in [*ends, *rows]]
        write_result(benchmark, rows, machine=self.facts, folder=self.output)
        atomic_write_text(self.output / f"{self.name}.md", report.summary(self.results, self.facts))
        logs = [(path.name, path.read_bytes()[-_LOG_BYTES:]) for path in sorted(self.work.glob("*.log"))]
        text = "\n".join(f"==== {name}\n{log.decode(errors='replace')}" for name, log in logs)
        atomic_write_text(self.output / f"{self.name}.log", text)


def end_process(process: subprocess.Popen[bytes]) -> str:
    """Kill a process with its stacks in its log; returns what to add to the reason when it does not end."""
    process.send_signal(signal.SIGUSR1)
    time.sleep(_STACKS_S)
    process.kill()  # its own processes die with it
    try:
        process.wait(timeout=_KILLED_S)
    except subprocess.TimeoutExpired:
        return ", and killing did not end it: it is stuck in the driver"
    return ""


def run_here(options: argparse.Namespace) -> None:
    """Run one part in this process, then end it."""
    die_with_parent(os.getppid())
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    work, name, path = options.only
    result, start = PartResult(name), time.monotonic()

    def record(row: Row) -> None:
        result.rows.append(rounded({**row, "at_s": time.monotonic() - start}))
        result.write(Path(work) / f"{name}.json")

    suite = Suite(Path(work), options.media, options.device, TINY if options.device == "cpu" else Scale())
    module, _, function = path.rpartition(".")
    try:
        suite.require_device()
        getattr(importlib.import_module(module, "benchmarks.gpu"), function)(suite, record)
        result.outcome = "done"
    except NotRunError as error:
        result.outcome, result.reason = "not run", str(error)
    except BaseException as error:  # the process boundary: a part may fail in any way, the others continue
        traceback.print_exc()
        result.outcome, result.reason = "failed", first_line(error)
    result.write(Path(work) / f"{name}.json")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # libraries may hang when they end, which is not measured
