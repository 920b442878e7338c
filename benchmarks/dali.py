"""`--decoder dali` without a GPU: the loader against cpu-fused, the graph step by step, and DALI's own readers.

python -m benchmarks.dali [--rounds 3] [--videos FILE ...] [--folder DIR]

DALI's CPU backend decodes VP9 and MJPEG, so chunks are made of these. What NVDEC does, `benchmarks.gpu_suite`
measures. Processor time is counted beside clips per second: other programs disturb it less. Linux only.

Workers import this module: everything heavy is imported late.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

REQUIREMENT = {
    "loader_vp9_clips_per_s_of_cpu_fused_at_least": 0.8,
    "loader_mjpeg_clips_per_s_of_cpu_fused_at_least": 0.4,
    "mini_clips_times_whole_chunks_at_least": 4.0,
    "first_batch_s_below": 10.0,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="repetitions, in turn; the best counts")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one loader measurement")
    parser.add_argument("--videos", type=Path, nargs="+", help="load from these instead of procedural videos")
    parser.add_argument("--folder", type=Path, help="keep chunks here; by default they are thrown away")
    parser.add_argument("--first-batch", nargs=2, metavar=("DECODER", "MANIFEST"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.first_batch:
        from benchmarks.dali_runs import print_when_first_batch_is_there

        print_when_first_batch_is_there(*options.first_batch)
    else:
        measure_and_report(options)


def measure_and_report(options: argparse.Namespace) -> None:
    """Run everything and write the JSON."""
    from benchmarks import corpus, dali_runs
    from benchmarks.machine import machine_facts, print_rows, write_result

    machine = machine_facts()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        videos = options.videos or corpus.write_sources(folder / "videos", corpus.SourceSettings())
        manifests = dali_runs.prepare(videos, folder)
        rows = dali_runs.run_all(manifests, rounds=options.rounds, seconds=options.seconds)
    print_rows(rows)
    print(write_result("dali", rows, machine=machine, baseline=REQUIREMENT))


if __name__ == "__main__":
    main()
