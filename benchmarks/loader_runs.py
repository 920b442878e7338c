"""What `benchmarks.loader` measures: the product's own pool and loader, read out while they run."""

from __future__ import annotations

import multiprocessing
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import torch

from avion_dali.contracts import ClipBatch, ClipRequest
from avion_dali.data.manifest import Manifest
from avion_dali.data.order import BatchSchedule
from avion_dali.data.planner import Planner
from avion_dali.data.profiles import ProfileName
from avion_dali.decode import cpu_fused, paper_fused
from avion_dali.loading.clip_loader import ClipLoader, LoaderSettings
from avion_dali.loading.frames_strategy import FramesStrategy
from avion_dali.loading.pool import Ticket, WorkerPool
from avion_dali.loading.ring import SharedRing
from avion_dali.loading.strategy import PendingBatch
from avion_dali.loading.worker import DecodeClip, decode_into
from benchmarks.corpus import CLIP_KINDS, FOUR, STRIDED, ClipKind, chunk_sources, kind_manifest, multiply_chunks
from benchmarks.loader import deliver_at_once, sleep_instead, sleep_key
from benchmarks.loader_report import best_of_rounds, speed_ups
from benchmarks.machine import Row, machine_cpu_s, process_cpu_s, process_memory_mb

DECODERS: dict[str, DecodeClip] = {"cpu-fused": cpu_fused.decode_clip, "paper-fused": paper_fused.decode_clip}
MEMORY_PROFILE: ProfileName = "balanced"
SIMULATED_KINDS = (FOUR, STRIDED)
MEMORY_READINGS = 20
START_UP_CLIPS = 50
ENDLESS = 1_000_000  # steps
CONTEXT_LENGTH = 16


@dataclass(frozen=True)
class LoaderBench:
    """How much is measured.

    Args:
        profiles: chunk profiles to load from.
        workers: worker counts that this machine has cores for.
        simulated_workers: worker counts that are simulated.
        rounds: repetitions, one after the other; the best counts.
        seconds: length of each measurement.
        warm_s: loading before it.
        micro_batch: clips of a batch.
        frame_size: side of a frame in pixels.
        memory_clips: clips of the memory measurement.
        device: where batches are delivered.
    """

    profiles: tuple[ProfileName, ...] = ()
    workers: tuple[int, ...] = (1,)
    simulated_workers: tuple[int, ...] = (16, 64)
    rounds: int = 2
    seconds: float = 1.5
    warm_s: float = 1.0
    micro_batch: int = 16
    frame_size: int = 224
    memory_clips: int = 1_000
    device: str = "cpu"


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
    def now(cls, loader: ClipLoader[float]) -> Reading:
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
    manifest: Manifest, kind: ClipKind, pool: WorkerPool, decode_clip: DecodeClip, *, bench: LoaderBench
) -> Iterator[ClipLoader[float]]:
    """Open the product's own loader over a manifest."""
    torch.set_num_threads(1)  # the other cores belong to the workers
    batch = bench.micro_batch
    schedule = BatchSchedule(manifest.num_samples, global_batch=batch, micro_batch=batch)
    planner = Planner(manifest, kind.rules(bench.frame_size), seed=0)
    settings = LoaderSettings(torch.device(bench.device), context_length=CONTEXT_LENGTH)
    strategy = FramesStrategy(decode_clip)
    with ClipLoader(planner, schedule, pool=pool, strategy=strategy, settings=settings) as loader:
        yield loader


def measure(loader: ClipLoader[float], bench: LoaderBench) -> Row:
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


def deliver_in_place(loader: ClipLoader[float]) -> None:
    """Deliver batches as they lie in the ring, as with a GPU, which fetches them without the processor."""

    def frames(batch: PendingBatch[float]) -> torch.Tensor:
        loader.stats.decode_s += sum(seconds for seconds in batch.results if seconds)
        return torch.from_numpy(loader._ring.frames(batch.slot)[: len(batch.requests)]).flatten(0, 1)

    loader._strategy.frames = frames  # type: ignore[method-assign]


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
    with (
        WorkerPool(workers=workers, timeout_s=60) as pool,
        opened_loader(manifest, kind, pool, decode_clip, bench=bench) as loader,
    ):
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
        batch = max(workers, bench.micro_batch)
        with WorkerPool(workers=workers, timeout_s=60) as pool:
            for (profile, name), sleep_s in single.items():
                what = {"measured": "simulated", "profile": profile, "clip": name, "workers": workers}
                wanted = {"sleep_ms": 1000 * sleep_s, "clips_per_s_wanted": round(workers / sleep_s, 1)}
                sized = replace(bench, micro_batch=batch)
                decode_clip = partial(sleep_instead, seconds=seconds)
                rates = simulate(manifests[profile, name], kinds[name], pool, decode_clip, bench=sized)
                rows.append({**what, **wanted, **rates})
    return rows


def simulate(
    manifest: Manifest, kind: ClipKind, pool: WorkerPool, decode_clip: DecodeClip, *, bench: LoaderBench
) -> Row:
    """Measure a loader whose many workers have all started; its batches are left in place."""
    with opened_loader(manifest, kind, pool, decode_clip, bench=bench) as loader:
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
    """What a clip costs besides decoding, in parts, and the loader with a decoder that does nothing."""
    planner = Planner(manifest, kind.rules(bench.frame_size), seed=0)
    start = time.process_time()
    requests = [planner.plan(row, epoch=1) for row in range(manifest.num_samples)]
    plan_s = (time.process_time() - start) / len(requests)
    clips = 5 * len(requests)
    with closing(SharedRing(4, (bench.micro_batch, *planner.rules.clip_shape))) as ring:
        with WorkerPool(workers=1, timeout_s=60) as pool:
            run_clips(pool, deliver_at_once, ring, iter(requests))
            workers_s, own_s = sum(map(process_cpu_s, worker_pids())), time.process_time()
            run_clips(pool, deliver_at_once, ring, islice(cycle(requests), clips))
            own_s = (time.process_time() - own_s) / clips
            workers_s = (sum(map(process_cpu_s, worker_pids())) - workers_s) / clips
        start = time.process_time()
        for number in range(24):
            ring.frames(number % ring.slots).copy()
        copy_s = (time.process_time() - start) / 24 / bench.micro_batch
        clip_mb = ring.clip_bytes / 1e6
    copied, in_place = (
        load(manifest, kind, deliver_at_once, workers=1, bench=bench, in_place=where) for where in (False, True)
    )
    return {
        "measured": "transport",
        "clip": kind.name,
        "clip_mb": round(clip_mb, 2),
        "plan_ms_per_clip": round(1000 * plan_s, 4),
        "pool_trainer_ms_per_clip": round(1000 * own_s, 4),
        "pool_worker_ms_per_clip": round(1000 * workers_s, 4),
        "copy_ms_per_clip": round(1000 * copy_s, 4),
        "trainer_cpu_ms_per_clip": copied["trainer_cpu_ms_per_clip"],
        "trainer_cpu_ms_per_clip_in_place": in_place["trainer_cpu_ms_per_clip"],
        "trainer_ceiling_clips_per_s": round(1000 / copied["trainer_cpu_ms_per_clip"]),
        "trainer_ceiling_clips_per_s_in_place": round(1000 / in_place["trainer_cpu_ms_per_clip"]),
        "clips_per_s_nothing_decoded": in_place["clips_per_s"],
    }


def run_clips(
    pool: WorkerPool, decode_clip: DecodeClip, ring: SharedRing, requests: Iterator[ClipRequest]
) -> None:
    """Hand clips over and wait for them with the ring's places kept busy."""
    places = ring.slots * ring.slot_shape[0]
    pending: deque[Ticket[float]] = deque()
    for number, request in enumerate(requests):
        if len(pending) == places:
            pool.wait(pending.popleft())
        place = ring.place(*divmod(number % places, ring.slot_shape[0]))
        pending.append(pool.schedule(decode_into, decode_clip, request, place))
    for ticket in pending:
        pool.wait(ticket)


def start_up(manifest: Manifest, bench: LoaderBench) -> Row:
    """Seconds until a new pool of one worker has delivered a clip, and its memory after more of them."""
    planner = Planner(manifest, FOUR.rules(bench.frame_size), seed=0)
    requests = [planner.plan(row, epoch=0) for row in range(min(START_UP_CLIPS, manifest.num_samples))]
    with closing(SharedRing(1, (bench.micro_batch, *planner.rules.clip_shape))) as ring:
        start = time.perf_counter()
        with WorkerPool(workers=1, timeout_s=60) as pool:
            pool.wait(pool.schedule(decode_into, cpu_fused.decode_clip, requests[0], ring.place(0, 0)))
            first_clip_s = time.perf_counter() - start
            run_clips(pool, cpu_fused.decode_clip, ring, islice(cycle(requests), START_UP_CLIPS))
            memory = process_memory_mb(worker_pids()[0])
    return {
        "measured": "start-up of one worker",
        "first_clip_s": round(first_clip_s, 3),
        "after_clips": START_UP_CLIPS,
        "worker_memory_mb": memory["VmRSS"],
        "worker_private_memory_mb": memory["RssAnon"],
    }


def memory(manifest: Manifest, bench: LoaderBench) -> Row:
    """Private memory of the trainer's process and of the largest worker, over many clips of many files."""
    workers = max(bench.workers)
    readings: list[tuple[int, float, float]] = []
    every = max(-(-bench.memory_clips // (bench.micro_batch * MEMORY_READINGS)), 1)
    with (
        WorkerPool(workers=workers, timeout_s=60) as pool,
        opened_loader(manifest, FOUR, pool, cpu_fused.decode_clip, bench=bench) as loader,
    ):
        for number, _ in enumerate(loader.batches(0, every * MEMORY_READINGS), start=1):
            if number % every:
                continue
            largest = max(process_memory_mb(pid)["RssAnon"] for pid in worker_pids())
            readings.append((loader.stats.delivered, process_memory_mb()["RssAnon"], largest))
    clips, trainer_mb, worker_mb = (list(column) for column in zip(*readings, strict=True))
    quarter = len(clips) // 4
    return {
        "measured": "memory",
        "files": manifest.num_chunks,
        "workers": workers,
        "clips": clips,
        "trainer_private_mb": trainer_mb,
        "worker_private_mb": worker_mb,
        "trainer_growth_mb_after_a_quarter": round(trainer_mb[-1] - trainer_mb[quarter], 1),
        "worker_growth_mb_after_a_quarter": round(worker_mb[-1] - worker_mb[quarter], 1),
    }


def prepare(videos: list[Path], folder: Path, profiles: tuple[ProfileName, ...], *, files: int) -> Manifests:
    """Chunk the videos in every profile and write a manifest for every kind of clip."""
    manifests: Manifests = {}
    for profile in profiles:
        chunks = chunk_sources(videos, folder / profile, profile)
        for kind in CLIP_KINDS:
            manifests[profile, kind.name] = kind_manifest(
                chunks, folder / f"{profile}_{kind.num_frames}_{kind.seconds:.1f}", kind
            )
    crowd = chunk_sources(videos, folder / "memory", MEMORY_PROFILE)
    multiply_chunks(crowd, files // len(videos))
    manifests["memory", FOUR.name] = kind_manifest(crowd, folder / "memory_manifest", FOUR, samples=4_000)
    return manifests


def run_all(manifests: Manifests, bench: LoaderBench) -> list[Row]:
    """Every measurement; the profile does not matter to what is not about decoding."""
    crowd = manifests["memory", FOUR.name]
    loaded = {key: manifest for key, manifest in manifests.items() if key[0] != "memory"}
    any_profile = bench.profiles[-1]
    rows = loading(loaded, bench)
    return [
        start_up(loaded[any_profile, FOUR.name], bench),
        *rows,
        *speed_ups(rows),
        *(
            transport(loaded[any_profile, kind.name], kind, bench)
            for kind in SIMULATED_KINDS
            if (any_profile, kind.name) in loaded
        ),
        *simulation(loaded, rows, bench),
        memory(crowd, bench),
    ]
