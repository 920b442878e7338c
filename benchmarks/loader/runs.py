"""The real loader on one machine: clips per second by profile, decoder and workers, and what limits them.

python -m benchmarks.loader [--videos FILE ...] [--extra-videos FOLDER] [--folder DIR]

Like figures 2 and 7 of AVION (arXiv 2309.16669). Machines with more workers than this one has cores are
simulated by workers that sleep for as long as they would decode: what the training process does for a clip
(plan, submit, copy out) is real there. Linux only: processor time and memory come from /proc.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from avion_dali.contracts import ClipBatch
from avion_dali.cores import available_cores
from avion_dali.data.manifest import Manifest
from avion_dali.data.order import BatchSchedule
from avion_dali.data.planner import Planner
from avion_dali.data.profiles import PROFILES, ProfileName
from avion_dali.decode import cpu_fused, paper_fused
from avion_dali.loading.cpu_loader import CpuLoader
from avion_dali.loading.filling import LoaderSettings
from avion_dali.loading.pool import DecodePool
from avion_dali.loading.ring import SharedRing
from avion_dali.loading.worker import DecodeClip
from benchmarks.corpus import CLIP_KINDS, FOUR, STRIDED, ClipKind, chunk_sources, kind_manifest, mbit_per_s
from benchmarks.loader import report
from benchmarks.loader.report import best_of_rounds, speed_ups
from benchmarks.loader.stand_ins import deliver_at_once, sleep_instead, sleep_key
from benchmarks.machine import machine_cpu_s, process_cpu_s, process_memory_mb
from benchmarks.media import add_video_options, chosen_videos
from benchmarks.report import Benchmark, Row, parser_of, working_folder

DECODERS: dict[str, DecodeClip] = {"cpu-fused": cpu_fused.decode_clip, "paper-fused": paper_fused.decode_clip}
SIMULATED_KINDS = (FOUR, STRIDED)
WANTED_PROFILES: tuple[ProfileName, ...] = ("compat", "balanced", "fast", "intra")
START_UP_CLIPS = 50
ENDLESS = 1_000_000  # steps
CONTEXT_LENGTH = 16
REQUIREMENT = {
    "speed_up_1_to_2_workers_at_least": 1.95,
    "first_clip_s_below": 1.0,
    "worker_memory_mb_below": 150.0,
}


@dataclass(frozen=True)
class LoaderBench:
    """How much is measured."""

    profiles: tuple[ProfileName, ...] = ()  # chunk profiles to load from
    workers: tuple[int, ...] = (1,)  # worker counts that this machine has cores for
    simulated_workers: tuple[int, ...] = (16, 64)  # worker counts that are simulated
    rounds: int = 2  # repetitions, one after the other; the best counts
    seconds: float = 1.5  # length of each measurement
    warm_s: float = 1.0  # loading before it
    micro_batch: int = 16  # clips of a batch
    frame_size: int = 224  # side of a frame in pixels
    device: str = "cpu"  # where batches are delivered


Manifests = dict[tuple[str, str], Manifest]  # by profile and name of the clip kind


@dataclass(frozen=True)
class Reading:
    """Clocks and counters at one moment, in seconds and bytes since some past."""

    wall_s: float
    trainer_s: float
    workers_s: float
    machine_s: float
    bytes_read: int
    decode_s: float
    clips: int

    @classmethod
    def now(cls, loader: CpuLoader) -> Reading:
        """Read all of them; workers are this process's children."""
        pids = worker_pids()
        return cls(
            wall_s=time.perf_counter(),
            trainer_s=time.process_time(),
            workers_s=sum(map(process_cpu_s, pids)),
            machine_s=machine_cpu_s(),
            bytes_read=sum(map(process_read_bytes, pids)),
            decode_s=loader.stats.decode_s,
            clips=loader.stats.delivered,
        )

    def since(self, before: Reading) -> Row:
        """Rates between an earlier reading and this one."""
        clips, elapsed_s = self.clips - before.clips, self.wall_s - before.wall_s
        trainer_s, workers_s = self.trainer_s - before.trainer_s, self.workers_s - before.workers_s
        others_s = self.machine_s - before.machine_s - trainer_s - workers_s
        return {
            "clips": clips,
            "clips_per_s": round(clips / elapsed_s, 1),
            "cores_busy": round((trainer_s + workers_s) / elapsed_s, 2),
            "worker_cpu_ms_per_clip": round(1000 * workers_s / clips, 3),
            "worker_ms_per_clip": round(1000 * (self.decode_s - before.decode_s) / clips, 3),
            "trainer_cpu_ms_per_clip": round(1000 * trainer_s / clips, 3),
            "kb_read_per_clip": round((self.bytes_read - before.bytes_read) / clips / 1e3, 1),
            "cores_taken_by_other_programs": round(max(others_s, 0) / elapsed_s, 2),
        }


def worker_pids() -> list[int]:
    """Process ids of all workers."""
    return [worker.pid for worker in multiprocessing.active_children() if worker.pid]


def process_read_bytes(pid: int) -> int:
    """Bytes a process has read from files, cached or not; 0 where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/io").read_text().split()
    except OSError:
        return 0
    return int(fields[fields.index("rchar:") + 1])


@contextmanager
def opened_loader(
    manifest: Manifest, kind: ClipKind, pool: DecodePool, bench: LoaderBench
) -> Iterator[CpuLoader]:
    """Open the product's own loader over a manifest."""
    torch.set_num_threads(1)  # the other cores belong to the workers
    batch = bench.micro_batch
    schedule = BatchSchedule(manifest.num_samples, global_batch=batch, micro_batch=batch)
    planner = Planner(manifest, kind.rules(bench.frame_size), seed=0)
    settings = LoaderSettings(torch.device(bench.device), context_length=CONTEXT_LENGTH)
    with closing(CpuLoader(planner, schedule, pool, settings)) as loader:
        yield loader


def measure(loader: CpuLoader, bench: LoaderBench) -> Row:
    """Load for a while, then measure for a while. Both ends lie in full swing: nothing starts or drains."""
    batches = loader.batches(0, ENDLESS)
    consume(batches, bench.warm_s)
    before = Reading.now(loader)
    consume(batches, bench.seconds)
    return Reading.now(loader).since(before)


def consume(batches: Iterator[ClipBatch], seconds: float) -> None:
    """Take batches for at least this long, two or more."""
    end = time.perf_counter() + seconds
    for number, _ in enumerate(batches):
        if number and time.perf_counter() > end:
            return


def deliver_in_place(loader: CpuLoader) -> None:
    """Deliver batches as they lie in the ring, as with a GPU, which fetches them without the processor."""
    copier = loader._copier
    copier.copy = lambda slot, rows: copier._slots[slot][:rows].flatten(0, 1)  # type: ignore[method-assign]


def load(
    manifest: Manifest,
    kind: ClipKind,
    decode_clip: DecodeClip,
    *,
    workers: int,
    bench: LoaderBench,
    in_place: bool = False,
) -> Row:
    """Measure one loader with a pool of its own."""
    pool = DecodePool(decode_clip, workers=workers, clip_timeout_s=60)
    with closing(pool), opened_loader(manifest, kind, pool, bench) as loader:
        if in_place:
            deliver_in_place(loader)
        return measure(loader, bench)


def loading(manifests: Manifests, bench: LoaderBench) -> list[Row]:
    """All profiles, kinds of clips, decoders and worker counts, in rounds; the best round of each."""
    rows = []
    for _ in range(bench.rounds):
        for (profile, _), kind in [(key, k) for key in manifests for k in CLIP_KINDS if k.name == key[1]]:
            for decoder, workers in [(d, w) for d in DECODERS for w in bench.workers]:
                manifest = manifests[profile, kind.name]
                what = {"measured": "loading", "profile": profile, "clip": kind.name, "decoder": decoder}
                rates = load(manifest, kind, DECODERS[decoder], workers=workers, bench=bench)
                rows.append({**what, "workers": workers, **rates})
    return best_of_rounds(rows)


def simulation(manifests: Manifests, measured: list[Row], bench: LoaderBench) -> list[Row]:
    """What the trainer's process can feed when decoding has all the cores it wants."""
    kinds = {kind.name: kind for kind in SIMULATED_KINDS}
    single = {
        (row["profile"], row["clip"]): row["worker_cpu_ms_per_clip"] / 1000
        for row in measured
        if row["workers"] == min(bench.workers) and row["decoder"] == "cpu-fused" and row["clip"] in kinds
    }
    seconds = {sleep_key(profile, kinds[name].num_frames): s for (profile, name), s in single.items()}
    rows: list[Row] = []
    for workers in bench.simulated_workers:
        pool = DecodePool(partial(sleep_instead, seconds=seconds), workers=workers, clip_timeout_s=60)
        batch = max(workers, bench.micro_batch)
        with closing(pool):
            for (profile, name), sleep_s in single.items():
                what = {"measured": "simulated", "profile": profile, "clip": name, "workers": workers}
                wanted = {"sleep_ms": 1000 * sleep_s, "clips_per_s_wanted": round(workers / sleep_s, 1)}
                rates = simulate(manifests[profile, name], kinds[name], pool, replace(bench, micro_batch=batch))
                rows.append({**what, **wanted, **rates})
    return rows


def simulate(manifest: Manifest, kind: ClipKind, pool: DecodePool, bench: LoaderBench) -> Row:
    """Measure a loader whose many workers have all started; its batches are left in place."""
    with opened_loader(manifest, kind, pool, bench) as loader:
        deliver_in_place(loader)
        batches = loader.batches(0, ENDLESS)
        next(batches)
        settle()
        consume(batches, bench.warm_s)
        before = Reading.now(loader)
        consume(batches, bench.seconds)
        rates = Reading.now(loader).since(before)
    return {name: value for name, value in rates.items() if name != "kb_read_per_clip"}


def settle() -> None:
    """Wait until the workers, idle now, no longer start up."""
    before = -1.0
    while (used_s := sum(map(process_cpu_s, worker_pids()))) - before > 0.02:
        before = used_s
        time.sleep(0.5)


def transport(manifest: Manifest, kind: ClipKind, bench: LoaderBench) -> Row:
    """What a clip costs the training process: the loader with a decoder that does nothing."""
    copied, in_place = (
        load(manifest, kind, deliver_at_once, workers=1, bench=bench, in_place=where) for where in (False, True)
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
    """Seconds until a new pool of one worker has delivered a clip, and its memory after more of them."""
    planner = Planner(manifest, FOUR.rules(bench.frame_size), seed=0)
    requests = [planner.plan(row % manifest.num_samples, epoch=0) for row in range(START_UP_CLIPS)]
    with closing(SharedRing(1, (1, *planner.rules.clip_shape))) as ring:
        start = time.perf_counter()
        with closing(DecodePool(cpu_fused.decode_clip, workers=1, clip_timeout_s=60)) as pool:
            pool.wait(pool.submit(requests[0], ring, 0))
            first_clip_s = time.perf_counter() - start
            for request in requests:
                pool.wait(pool.submit(request, ring, 0))
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
    """Every measurement; the profile does not matter to what is not about decoding."""
    any_profile = bench.profiles[-1]
    rows = loading(manifests, bench)
    shown = [kind for kind in SIMULATED_KINDS if (any_profile, kind.name) in manifests]
    return [
        start_up(manifests[any_profile, FOUR.name], bench),
        *rows,
        *speed_ups(rows),
        *(transport(manifests[any_profile, kind.name], kind, bench) for kind in shown),
        *simulation(manifests, rows, bench),
    ]


def worker_counts(cores: int) -> tuple[int, ...]:
    """One, its doubles, and all cores."""
    return (*(2**k for k in range(cores.bit_length()) if 2**k < cores), cores)


BENCHMARK = Benchmark("loader", report.tables, report.draw, REQUIREMENT)


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

    def measure_all() -> list[Row]:
        videos, skipped = chosen_videos(options)
        with working_folder(options.folder) as folder:
            manifests = prepare(videos, folder, bench.profiles)
            rates = {profile: mbit_per_s(manifests[profile, FOUR.name]) for profile in bench.profiles}
            rows = run_all(manifests, bench)
        rows[0] |= {"videos": [path.name for path in videos], "chunk_mbit_per_s": rates}
        return [*rows, *skipped]

    BENCHMARK.run(options, measure_all)
