"""`--decoder dali` without a GPU: the loader against cpu-fused, the graph alone, and DALI's own readers.

python -m benchmarks.loader.dali [--rounds 3] [--videos FILE ...] [--folder DIR]

DALI's CPU backend decodes VP9 and MJPEG, so chunks are made of these; `benchmarks.gpu` measures NVDEC.
Processor time is counted beside clips per second: other programs disturb it less. Linux only.

Workers import this module: everything heavy is imported late.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.report import Benchmark, Row, every_row, parser_of

REQUIREMENT = {
    "loader_vp9_clips_per_s_of_cpu_fused_at_least": 0.8,
    "loader_mjpeg_clips_per_s_of_cpu_fused_at_least": 0.4,
    "mini_clips_times_whole_chunks_at_least": 4.0,
}
BENCHMARK = Benchmark("dali", every_row, requirement=REQUIREMENT)


def main() -> None:
    from benchmarks.media import add_video_options, measure_videos

    parser = parser_of(__doc__)
    add_video_options(parser)
    parser.add_argument("--rounds", type=int, default=3, help="repetitions, in turn; the best counts")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one loader measurement")
    options = parser.parse_args()

    def measure(videos: list[Path], folder: Path) -> list[Row]:
        from benchmarks.loader import dali_runs

        manifests = dali_runs.prepare(videos, folder)
        return dali_runs.run_all(manifests, rounds=options.rounds, seconds=options.seconds)

    measure_videos(BENCHMARK, options, measure)


if __name__ == "__main__":
    main()
