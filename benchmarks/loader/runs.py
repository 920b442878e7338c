"""The real loader on one machine: clips per second by profile, decoder and workers, and what limits them.

python -m benchmarks.loader [--videos FILE ...] [--extra-videos FOLDER] [--folder DIR]

Like figures 2 and 7 of AVION (arXiv 2309.16669). Machines with more workers than this one has cores are
simulated by workers that sleep for as long as they would decode: what the training process does for a clip
(submit, collect) is real there. Linux only: processor time and memory come from /proc.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from avion_dali.cores import available_cores
from avion_dali.data.manifest import Manifest
from avion_dali.data.profiles import PROFILES, ProfileName
from avion_dali.loading.clip_loader import ClipLoader
from avion_dali.loading.frames_strategy import FramesStrategy
from avion_dali.loading.pool import WorkerPool
from benchmarks.corpus import CLIP_KINDS, FOUR, STRIDED, ClipKind, chunk_sources, kind_manifest, mbit_per_s
from benchmarks.loader import report
from benchmarks.loader.measure import (
    ENDLESS,
    InPlace,
    LoaderBench,
    load,
    measure_batches,
    open_loader,
    worker_pids,
)
from benchmarks.loader.report import best_of_rounds
from benchmarks.loader.stand_ins import deliver_at_once, sleep_instead, sleep_key
from benchmarks.machine import process_cpu_s, process_memory_mb
from benchmarks.media import add_video_options, measure_videos
from benchmarks.report import Benchmark, Row, parser_of

DECODERS = ("cpu-fused", "paper-fused")
SIMULATED_KINDS = (FOUR, STRIDED)
WANTED_PROFILES: tuple[ProfileName, ...] = ("compat", "balanced", "fast", "intra")
START_UP_CLIPS = 50
REQUIREMENT = {
    "speed_up_1_to_2_workers_at_least": 1.95,
    "first_clip_s_below": 1.0,
    "worker_memory_mb_below": 150.0,
}
Manifests = dict[tuple[str, str], Manifest]  # by profile and name of the clip kind


def loading(manifests: Manifests, bench: LoaderBench) -> list[Row]:
    """All profiles, kinds of clips, decoders and worker counts, in rounds; the best round of each."""
    rows = []
    for _ in range(bench.rounds):
        for (profile, _), kind in [(key, k) for key in manifests for k in CLIP_KINDS if k.name == key[1]]:
            for decoder, workers in [(d, w) for d in DECODERS for w in bench.workers]:
                manifest = manifests[profile, kind.name]
                what = {"measured": "loading", "profile": profile, "clip": kind.name, "decoder": decoder}
                rates = load(manifest, kind, decoder, workers=workers, bench=bench)
                rows.append({**what, "workers": workers, **rates})
    return best_of_rounds(rows)


def simulation(manifests: Manifests, measured: list[Row], bench: LoaderBench) -> list[Row]:
    """Measure the trainer's rate when decoding has enough cores; no frames are written or copied."""
    kinds = {kind.name: kind for kind in SIMULATED_KINDS}
    single = {
        (row["profile"], row["clip"]): row["worker_cpu_ms_per_clip"] / 1000
        for row in measured
        if row["workers"] == min(bench.workers) and row["decoder"] == "cpu-fused" and row["clip"] in kinds
    }
    seconds = {sleep_key(profile, kinds[name].num_frames): s for (profile, name), s in single.items()}
    strategy = InPlace(partial(sleep_instead, seconds=seconds))
    rows: list[Row] = []
    for workers in bench.simulated_workers:
        many = replace(bench, micro_batch=max(4 * workers, bench.micro_batch), frame_size=32)
        with WorkerPool(workers=workers, timeout_s=60) as pool:
            for (profile, name), sleep_s in single.items():
                what = {"measured": "simulated", "profile": profile, "clip": name, "workers": workers}
                wanted = {"sleep_ms": 1000 * sleep_s, "clips_per_s_wanted": round(workers / sleep_s, 1)}
                loader = open_loader(manifests[profile, name], kinds[name], many, decoder=strategy, pool=pool)
                rows.append({**what, **wanted, **measure_settled(loader, many)})
    return rows


def measure_settled(loader: ClipLoader[Any], bench: LoaderBench) -> Row:
    """Measure a loader whose many workers have all started, then close it."""
    with loader:
        batches = loader.batches(0, ENDLESS)
        next(batches)
        settle()
        return measure_batches(batches, loader.stats, bench)


def settle() -> None:
    """Wait until the workers, idle now, no longer start up."""
    before = -1.0
    while (used_s := sum(map(process_cpu_s, worker_pids()))) - before > 0.02:
        before = used_s
        time.sleep(0.5)


def transport(manifest: Manifest, kind: ClipKind, bench: LoaderBench) -> Row:
    """Measure the cost of a clip in the training process, with a decoder that does nothing."""
    copied, in_place = (
        load(manifest, kind, strategy(deliver_at_once), workers=1, bench=bench)
        for strategy in (FramesStrategy, InPlace)
    )
    return {
        "measured": "transport",
        "clip": kind.name,
        "trainer_cpu_ms_per_clip": copied["trainer_cpu_ms_per_clip"],
        "trainer_cpu_ms_per_clip_in_place": in_place["trainer_cpu_ms_per_clip"],
        "trainer_ceiling_clips_per_s": round(1000 / copied["trainer_cpu_ms_per_clip"]),
        "trainer_ceiling_clips_per_s_in_place": round(1000 / in_place["trainer_cpu_ms_per_clip"]),
        "clips_per_s_nothing_decoded": in_place["clips_per_s"],
    }


def start_up(manifest: Manifest, bench: LoaderBench) -> Row:
    """Seconds until a new loader with one worker has delivered a clip, and its memory after more of them."""
    start = time.perf_counter()
    with open_loader(manifest, FOUR, replace(bench, micro_batch=1), workers=1) as loader:
        batches = loader.batches(0, START_UP_CLIPS)
        next(batches)
        first_clip_s = time.perf_counter() - start
        deque(batches, maxlen=0)
        memory = process_memory_mb(worker_pids()[0])
    return {
        "measured": "start-up of one worker",
        "first_clip_s": first_clip_s,
        "after_clips": START_UP_CLIPS,
        "worker_memory_mb": memory["VmRSS"],
        "worker_private_memory_mb": memory["RssAnon"],
    }


def prepare(videos: list[Path], folder: Path, profiles: tuple[ProfileName, ...]) -> Manifests:
    """Chunk the videos in every profile and write a manifest for every kind of clip."""
    manifests: Manifests = {}
    for profile in profiles:
        chunks = chunk_sources(videos, folder / profile, profile)
        for kind in CLIP_KINDS:
            named = folder / f"{profile}_{kind.num_frames}_{kind.seconds:.1f}"
            manifests[profile, kind.name] = kind_manifest(chunks, named, kind)
    return manifests


def run_all(manifests: Manifests, bench: LoaderBench) -> list[Row]:
    """Run all measurements; those without decoding use one profile."""
    any_profile = bench.profiles[-1]
    rows = loading(manifests, bench)
    shown = [kind for kind in SIMULATED_KINDS if (any_profile, kind.name) in manifests]
    return [
        start_up(manifests[any_profile, FOUR.name], bench),
        *rows,
        *(transport(manifests[any_profile, kind.name], kind, bench) for kind in shown),
        *simulation(manifests, rows, bench),
    ]


def worker_counts(cores: int) -> tuple[int, ...]:
    """One, its doubles, and all cores."""
    return (*(2**k for k in range(cores.bit_length()) if 2**k < cores), cores)


BENCHMARK = Benchmark("loader", report.tables, requirement=REQUIREMENT)


def main() -> None:
    parser = parser_of(__doc__)
    add_video_options(parser)
    parser.add_argument("--profiles", nargs="+", choices=list(PROFILES), default=WANTED_PROFILES)
    parser.add_argument("--rounds", type=int, default=2, help="repetitions; the best counts")
    parser.add_argument("--seconds", type=float, default=1.5, help="length of one measurement")
    simulated = LoaderBench.simulated_workers
    parser.add_argument("--simulated-workers", type=int, nargs="*", default=simulated, help="that sleep")
    options = parser.parse_args()
    cores = available_cores()
    bench = LoaderBench(
        profiles=tuple(options.profiles),
        workers=worker_counts(cores),
        simulated_workers=tuple(n for n in options.simulated_workers if n > cores),
        rounds=options.rounds,
        seconds=options.seconds,
    )

    def measure_all(videos: list[Path], folder: Path) -> list[Row]:
        manifests = prepare(videos, folder, bench.profiles)
        rates = {profile: mbit_per_s(manifests[profile, FOUR.name]) for profile in bench.profiles}
        rows = run_all(manifests, bench)
        rows[0] |= {"videos": [path.name for path in videos], "chunk_mbit_per_s": rates}
        return rows

    measure_videos(BENCHMARK, options, measure_all)
