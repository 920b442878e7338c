"""Does `avion-dali plan` predict what the loader delivers? Its rates against those of `benchmarks.loader`.

python -m benchmarks.loader.plan [--videos FILE ...] [--extra-videos FOLDER]

Costs are fitted on clips of 1, 8 and 24 frames of one second, decoded in one process without a loader. Then the
clips of `benchmarks.loader`, of other lengths and spans, are predicted for every number of workers and loaded.
Everything is in the page cache, so the disk takes no part. Linux only: processor time is read from /proc. Where
other programs take cores, the rate predicted for what they leave is the one to compare.

Workers import this module: what only the benchmark needs is imported late.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from avion_dali.cores import available_cores
from avion_dali.data.profiles import PROFILES
from benchmarks.report import Benchmark, Row, markdown, parser_of, working_folder

if TYPE_CHECKING:
    from avion_dali.inspection.capacity import DecodeCost, Machine
    from benchmarks.corpus import ClipKind
    from benchmarks.loader.runs import LoaderBench

FRAME_SIZE = 224
TIMED_FRAMES = (1, 8, 24)
CLIPS = 400
REQUIREMENT = {"error_below": 0.15}


def measure_machine(chunks: Path, folder: Path, seconds: float) -> Machine:
    """Measure what no profile changes."""
    import torch

    from avion_dali.inspection import measuring
    from avion_dali.inspection.capacity import Machine
    from avion_dali.inspection.sampling import sample_requests
    from benchmarks.corpus import ClipKind, kind_manifest

    manifest = kind_manifest(chunks, folder, ClipKind("timed", TIMED_FRAMES[-1], 1.0))
    requests = sample_requests(manifest, num_frames=TIMED_FRAMES[-1], frame_size=FRAME_SIZE)
    slowdown = measuring.measure_slowdown(requests, seconds=seconds / 2)
    counts = (TIMED_FRAMES[0], TIMED_FRAMES[-1])
    trainer = measuring.measure_trainer(
        manifest, device=torch.device("cpu"), frame_size=FRAME_SIZE, frame_counts=counts, clips=800
    )
    return Machine(available_cores(), measuring.physical_cores(), slowdown, trainer)


def predictions(chunks: Path, folder: Path, *, machine: Machine, bench: LoaderBench) -> list[Row]:
    """Fit a profile's costs, then predict and load every kind of clip with every number of workers."""
    from avion_dali.inspection.measuring import measure_decode_cost
    from benchmarks.corpus import CLIP_KINDS, ClipKind, kind_manifest

    timed = kind_manifest(chunks, folder / "timed", ClipKind("timed", TIMED_FRAMES[-1], 1.0))
    cost = measure_decode_cost(timed, frame_counts=TIMED_FRAMES, frame_size=FRAME_SIZE, seconds=bench.seconds)
    rows = []
    for number, kind in enumerate(CLIP_KINDS):
        found = compare(chunks, folder / str(number), kind, cost=cost, machine=machine, bench=bench)
        rows += [{"measured": "prediction", "profile": chunks.name, "clip": kind.name, **row} for row in found]
    return rows


def compare(
    chunks: Path, folder: Path, kind: ClipKind, *, cost: DecodeCost, machine: Machine, bench: LoaderBench
) -> list[Row]:
    """Predict one kind of clips for every number of workers, and load it."""
    from avion_dali.decode.cpu_fused import decode_clip
    from avion_dali.inspection.capacity import forecast, mean_needs
    from avion_dali.inspection.sampling import clip_needs, sample_requests
    from benchmarks.corpus import kind_manifest
    from benchmarks.loader.runs import load

    manifest = kind_manifest(chunks, folder, kind, samples=CLIPS)
    requests = sample_requests(manifest, num_frames=kind.num_frames, frame_size=FRAME_SIZE, count=CLIPS)
    needs = mean_needs([clip_needs(request) for request in requests])
    rows = []
    for workers in bench.workers:
        predicted = forecast(needs, cost, machine, num_frames=kind.num_frames, workers=workers)
        rounds = [load(manifest, kind, decode_clip, workers=workers, bench=bench) for _ in range(bench.rounds)]
        # Other programs only ever slow a round down, so the fastest one counts.
        measured = max(rounds, key=lambda row: row["clips_per_s"])
        taken = measured["cores_taken_by_other_programs"]
        left = replace(machine, cores=max(machine.cores - taken, 0.01))
        on_cores_left = forecast(needs, cost, left, num_frames=kind.num_frames, workers=workers)
        rows.append(
            {
                "workers": workers,
                "predicted_clips_per_s": predicted.clips_per_s,
                "bound_by": predicted.binds,
                "predicted_worker_ms": predicted.decode_ms,
                "predicted_trainer_ms": predicted.core_ms - predicted.decode_ms,
                "measured_clips_per_s": measured["clips_per_s"],
                "measured_worker_ms": measured["worker_cpu_ms_per_clip"],
                "measured_trainer_ms": measured["trainer_cpu_ms_per_clip"],
                "cores_taken_by_other_programs": taken,
                "predicted_clips_per_s_on_the_cores_left": on_cores_left.clips_per_s,
                "error": predicted.clips_per_s / measured["clips_per_s"] - 1,
            }
        )
    return rows


def tables(rows: list[Row]) -> str:
    """Predicted and measured rates, and the largest error."""
    found = [row for row in rows if row["measured"] == "prediction"]
    columns = ("profile", "clip", "workers", "predicted_clips_per_s", "measured_clips_per_s", "error")
    worst = max(abs(row["error"]) for row in found)
    return (
        markdown(columns, ([row[name] for name in columns] for row in found))
        + f"\n\nLargest error {worst:.1%}."
    )


BENCHMARK = Benchmark("plan", tables, requirement=REQUIREMENT)


def main() -> None:
    from benchmarks.media import add_video_options, chosen_videos

    parser = parser_of(__doc__)
    add_video_options(parser)
    parser.add_argument("--profiles", nargs="+", default=list(PROFILES), choices=tuple(PROFILES))
    parser.add_argument("--rounds", type=int, default=2, help="of loading, of which the fastest counts")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    options = parser.parse_args()

    def measure() -> list[Row]:
        from benchmarks.corpus import chunk_sources
        from benchmarks.loader.runs import LoaderBench, worker_counts

        workers = worker_counts(available_cores())
        bench = LoaderBench(
            workers=workers, rounds=options.rounds, seconds=options.seconds, frame_size=FRAME_SIZE
        )
        videos, rows = chosen_videos(options)
        machine = None
        with working_folder(options.folder) as folder:
            for profile in options.profiles:
                chunks = chunk_sources(videos, folder / profile, profile)
                machine = machine or measure_machine(chunks, folder / "machine", options.seconds)
                rows += predictions(chunks, folder / f"manifests-{profile}", machine=machine, bench=bench)
        return rows

    BENCHMARK.run(options, measure)


if __name__ == "__main__":
    main()
