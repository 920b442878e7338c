"""Compares the rates that `avion-dali plan` predicts with those of `benchmarks.loader`.

python -m benchmarks.loader.plan [--profiles NAME ...] [--kinds 3] [--videos FILE ...] [--extra-videos FOLDER]

For every profile, kind of clip and number of workers, costs are measured as `plan --chunks` does it, between
two rounds of the loader on a manifest of its own. Everything is in the page cache, so the disk takes no part.
Linux only: processor time is read from /proc. Where other programs take cores, the rate predicted for what they
leave is the one to compare.

Workers import this module: what only the benchmark needs is imported late.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from avion_dali.cores import available_cores
from avion_dali.data.profiles import PROFILES
from benchmarks.report import Benchmark, Row, markdown, parser_of, select

if TYPE_CHECKING:
    from avion_dali.data.manifest import Manifest
    from benchmarks.corpus import ClipKind
    from benchmarks.loader.measure import LoaderBench

FRAME_SIZE = 224
CLIPS = 400
REQUIREMENT = {"error_below": 0.15}


def compare(
    chunks: Path, scratch: Path, kind: ClipKind, *, manifest: Manifest, bench: LoaderBench
) -> list[Row]:
    """Predict one kind of clips of a chunk folder for every number of workers, and load it."""
    import torch

    from avion_dali.data.planner import Planner
    from avion_dali.inspection.plan_forecast import ModelDemand, forecast
    from avion_dali.inspection.plan_measurements import measure_loader
    from avion_dali.inspection.plan_samples import clip_needs, open_chunks, sample_requests
    from benchmarks.loader.measure import load

    torch.set_num_threads(1)  # as in `load`
    cores, device = available_cores(), torch.device(bench.device)
    planned = open_chunks(chunks, scratch, clip_seconds=kind.seconds)
    planner = Planner(planned, kind.rules(FRAME_SIZE), seed=0)
    needs = [clip_needs(request)[0] for request in sample_requests(planner)]
    decoded, rows = sum(needs) / len(needs), []
    for workers in bench.workers:
        rounds = [load(manifest, kind, "cpu-fused", workers=workers, bench=bench)]
        cost = measure_loader(planner, device=device, workers=workers, seconds=bench.seconds)
        for _ in range(bench.rounds - 1):
            rounds.append(load(manifest, kind, "cpu-fused", workers=workers, bench=bench))
        # Other programs only slow a round down, so the fastest one counts.
        measured = max(rounds, key=lambda row: row["clips_per_s"])
        taken = measured["cores_taken_by_other_programs"]
        predicted, left = (
            forecast(decoded, cost, cores=n, workers=workers, demand=ModelDemand())
            for n in (cores, max(cores - taken, 0.01))
        )
        rows.append(
            {
                "workers": workers,
                "predicted_clips_per_s": predicted.clips_per_s,
                "limited_by": predicted.limit,
                "predicted_worker_ms": predicted.decode_ms,
                "predicted_trainer_ms": cost.trainer_ms,
                "measured_clips_per_s": measured["clips_per_s"],
                "measured_worker_ms": measured["worker_cpu_ms_per_clip"],
                "measured_trainer_ms": measured["trainer_cpu_ms_per_clip"],
                "cores_taken_by_other_programs": taken,
                "predicted_clips_per_s_on_the_cores_left": left.clips_per_s,
                "error": predicted.clips_per_s / measured["clips_per_s"] - 1,
                "error_on_the_cores_left": left.clips_per_s / measured["clips_per_s"] - 1,
            }
        )
    return rows


def tables(rows: list[Row]) -> str:
    """Predicted and measured rates, and the largest error."""
    found = select(rows, "prediction")
    columns = ("profile", "clip", "workers", "predicted_clips_per_s", "measured_clips_per_s", "error")
    worst = max(abs(row["error"]) for row in found)
    left = max(abs(row.get("error_on_the_cores_left", 0.0)) for row in found)
    return (
        markdown(columns, ([row[name] for name in columns] for row in found))
        + f"\n\nLargest error {worst:.1%}; on the cores left by other programs {left:.1%}."
    )


BENCHMARK = Benchmark("plan", tables, requirement=REQUIREMENT)


def main() -> None:
    from benchmarks.media import add_video_options, measure_videos

    parser = parser_of(__doc__)
    add_video_options(parser)
    parser.add_argument("--profiles", nargs="+", default=list(PROFILES), choices=tuple(PROFILES))
    parser.add_argument("--kinds", type=int, default=3, help="kinds of clips, the first ones")
    parser.add_argument("--rounds", type=int, default=2, help="of loading, of which the fastest counts")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    options = parser.parse_args()

    def measure(videos: list[Path], folder: Path) -> list[Row]:
        from benchmarks.corpus import CLIP_KINDS, chunk_sources, kind_manifest
        from benchmarks.loader.measure import LoaderBench
        from benchmarks.loader.runs import worker_counts

        counts = worker_counts(available_cores())
        bench = LoaderBench(
            workers=counts, rounds=options.rounds, seconds=options.seconds, frame_size=FRAME_SIZE
        )
        rows = []
        for profile in options.profiles:
            chunks = chunk_sources(videos, folder / profile, profile)
            for number, kind in enumerate(CLIP_KINDS[: options.kinds]):
                place = folder / f"{profile}-{number}"
                manifest = kind_manifest(chunks, place / "loaded", kind, samples=CLIPS)
                found = compare(chunks, place / "planned", kind, manifest=manifest, bench=bench)
                what = {"measured": "prediction", "profile": profile, "clip": kind.name}
                rows += [{**what, **row} for row in found]
        return rows

    measure_videos(BENCHMARK, options, measure)


if __name__ == "__main__":
    main()
