"""The measured loader, and counters of its processes. Linux only: they are read from /proc."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from avion_dali.assembly.open_clips import open_clips
from avion_dali.contracts import ClipBatch
from avion_dali.data.manifest import Manifest
from avion_dali.data.order import BatchSchedule
from avion_dali.data.planner import Planner
from avion_dali.data.profiles import ProfileName
from avion_dali.loading.clip_loader import ClipLoader, LoaderSettings
from avion_dali.loading.faults import LoaderStats
from avion_dali.loading.frames_strategy import FramesStrategy
from avion_dali.loading.pool import WorkerPool
from avion_dali.loading.ring import SharedRing
from avion_dali.loading.strategy import PendingBatch
from benchmarks.corpus import ClipKind
from benchmarks.machine import machine_cpu_s, process_cpu_s
from benchmarks.report import Row

ENDLESS = 1_000_000  # steps
CONTEXT_LENGTH = 16


@dataclass(frozen=True)
class LoaderBench:
    """Size of the measurement."""

    profiles: tuple[ProfileName, ...] = ()  # chunk profiles to load from
    workers: tuple[int, ...] = (1,)  # worker counts that this machine has cores for
    simulated_workers: tuple[int, ...] = (16, 64)  # worker counts that are simulated
    rounds: int = 2  # repetitions, one after the other; the best counts
    seconds: float = 1.5  # length of each measurement
    warm_s: float = 1.0  # loading before it
    micro_batch: int = 16  # clips of a batch
    frame_size: int = 224  # side of a frame in pixels
    device: str = "cpu"  # where batches are delivered


@dataclass(frozen=True)
class Reading:
    """Clocks and counters at one moment, in seconds and bytes since some past."""

    wall_s: float
    trainer_s: float
    thread_s: float  # of trainer_s, the thread that takes batches
    workers_s: float
    machine_s: float
    bytes_read: int
    decode_s: float
    clips: int

    @classmethod
    def now(cls, stats: LoaderStats) -> Reading:
        """Read all of them; workers are this process's children."""
        pids = worker_pids()
        return cls(
            wall_s=time.perf_counter(),
            trainer_s=time.process_time(),
            thread_s=time.thread_time(),
            workers_s=sum(map(process_cpu_s, pids)),
            machine_s=machine_cpu_s(),
            bytes_read=sum(map(process_read_bytes, pids)),
            decode_s=stats.decode_s,
            clips=stats.delivered,
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
            "trainer_cpu_ms_per_clip": round(1000 * trainer_s / clips, 4),
            "trainer_thread_cpu_ms_per_clip": round(1000 * (self.thread_s - before.thread_s) / clips, 4),
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


def open_loader(
    manifest: Manifest,
    kind: ClipKind,
    bench: LoaderBench,
    *,
    decoder: str | FramesStrategy = "cpu-fused",
    workers: int = 0,
    pool: WorkerPool | None = None,
) -> ClipLoader[Any]:
    """Open the loader that a training has, or the same around a function that stands in for a decoder.

    Args:
        manifest: its clips.
        kind: of the clips.
        bench: batches, frames and device.
        decoder: name of a decoder, or a strategy with a stand-in.
        workers: number of processes.
        pool: processes to use instead; for a stand-in.
    """
    torch.set_num_threads(1)  # the other cores belong to the workers
    if isinstance(decoder, str):
        return open_clips(
            manifest,
            batch_size=bench.micro_batch,
            num_frames=kind.num_frames,
            frame_size=bench.frame_size,
            decoder=decoder,
            device=bench.device,
            workers=workers,
            context_length=CONTEXT_LENGTH,
        )
    batch = bench.micro_batch
    return ClipLoader(
        Planner(manifest, kind.rules(bench.frame_size), seed=0),
        BatchSchedule(manifest.num_samples, global_batch=batch, micro_batch=batch),
        pool=pool or WorkerPool(workers=workers, timeout_s=60),
        strategy=decoder,
        settings=LoaderSettings(torch.device(bench.device), CONTEXT_LENGTH),
        owns_pool=pool is None,
    )


class InPlace(FramesStrategy):
    """Delivers batches directly from the ring, as with a GPU, which copies them without the processor."""

    def open(self, ring: SharedRing, device: torch.device, stats: LoaderStats) -> None:
        """Look at all slots."""
        super().open(ring, device, stats)
        self.slots = [torch.from_numpy(ring.frames(slot)) for slot in range(ring.slots)]
        self.stats = stats

    def frames(self, batch: PendingBatch[float]) -> torch.Tensor:
        """Return a batch, which the slot's next one overwrites."""
        self.stats.decode_s += sum(seconds or 0 for seconds in batch.results)
        return self.slots[batch.slot][: len(batch.clips)].flatten(0, 1)

    def close(self) -> None:
        """Release all views of the memory."""
        self.slots = []
        super().close()


def measure(loader: ClipLoader[Any], bench: LoaderBench) -> Row:
    """Load for a while, then measure in a steady state, without start or end of loading."""
    return measure_batches(loader.batches(0, ENDLESS), loader.stats, bench)


def measure_batches(batches: Iterator[ClipBatch], stats: LoaderStats, bench: LoaderBench) -> Row:
    """Continue a started iteration, and measure it as `measure` does."""
    consume(batches, bench.warm_s)
    before = Reading.now(stats)
    consume(batches, bench.seconds)
    return Reading.now(stats).since(before)


def consume(batches: Iterator[ClipBatch], seconds: float) -> None:
    """Take batches for at least this long, two or more."""
    end = time.perf_counter() + seconds
    for number, _ in enumerate(batches):
        if number and time.perf_counter() > end:
            return


def load(
    manifest: Manifest, kind: ClipKind, decoder: str | FramesStrategy, *, workers: int, bench: LoaderBench
) -> Row:
    """Measure one loader with its own processes."""
    with open_loader(manifest, kind, bench, decoder=decoder, workers=workers) as loader:
        return measure(loader, bench)
