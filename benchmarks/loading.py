"""The worker pool on one machine: start-up, memory of a worker, clips per second, and what transport costs.

python -m benchmarks.loading [--clips 300]

Linux only: memory and processor time are read from /proc.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from fractions import Fraction
from itertools import cycle, islice
from pathlib import Path

import av
import numpy as np

from avion_dali.contracts import ChunkRef, ClipRequest
from avion_dali.data.encoding import ChunkWriter
from avion_dali.data.manifest import Chunk, Manifest, Sample, write_manifest
from avion_dali.data.planner import ClipRules, Planner
from avion_dali.data.profiles import PROFILES
from avion_dali.decode import cpu_fused
from avion_dali.loading.pool import DecodePool, Ticket
from avion_dali.loading.ring import SharedRing
from avion_dali.loading.worker import DecodeClip
from benchmarks.machine import (
    Row,
    machine_cpu_s,
    machine_facts,
    print_rows,
    process_cpu_s,
    process_memory_mb,
    write_result,
)

WIDTH, HEIGHT, FPS, SECONDS = 512, 288, 30, 15
RULES = ClipRules(num_frames=4, frame_size=224, training=True)
SLOT_CLIPS, SLOTS = 16, 4
MEMORY_AFTER_CLIPS = 50
TRANSPORT_CLIPS = 2_000
REQUIREMENT = {"first_clip_s_below": 1.0, "worker_memory_mb_below": 150.0}


def deliver_at_once(request: ClipRequest, frames: np.ndarray) -> None:
    """A decoder that does nothing: what remains is the cost of the pool."""


def write_chunk(path: Path) -> None:
    """Write a chunk of the `balanced` profile, about as hard to encode as hand-held video.

    A scene under a moving camera, a fainter one that moves the other way (what motion search cannot
    predict), and sensor noise.
    """
    rng = np.random.default_rng(0)
    scene = _texture(rng, (HEIGHT + 200, WIDTH + 200))
    noise = rng.normal(0, 4, (HEIGHT, WIDTH, 3))
    with ChunkWriter(path, PROFILES["balanced"], fps=Fraction(FPS)) as writer:
        for frame in range(SECONDS * FPS):
            y, x = (int(100 + 99 * f(frame / 20)) for f in (np.sin, np.cos))
            near = scene[y : y + HEIGHT, x : x + WIDTH]
            far = scene[x : x + HEIGHT, y : y + WIDTH]
            shift = tuple(rng.integers(0, (HEIGHT, WIDTH)))
            picture = 0.9 * near + 0.1 * far + np.roll(noise, shift, axis=(0, 1))
            rgb = np.clip(picture, 0, 255).astype(np.uint8)
            writer.write(av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(format="yuv420p"))
        writer.finish()


def _texture(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Noise at five scales, (H, W, 3) around 128, as photographs have detail at every scale."""
    height, width = size
    layers = []
    for scale in (4, 8, 16, 32, 64):
        coarse = rng.normal(0, 5 * scale**0.4, (height // scale + 1, width // scale + 1, 3))
        layers.append(np.kron(coarse, np.ones((scale, scale, 1)))[:height, :width])
    return 128 + np.sum(layers, axis=0)


def write_small_manifest(folder: Path) -> Manifest:
    """Write one chunk and a manifest of one-second clips of it, and open that."""
    path = folder / "0.mp4"
    write_chunk(path)
    ref = ChunkRef(str(path), path.stat().st_size, SECONDS * FPS, WIDTH, HEIGHT)
    starts = np.linspace(0, SECONDS - 1, 400).tolist()
    samples = (Sample(0, 1, start, start + 1.0, text="") for start in starts)
    chunk = Chunk(ref, video="0", start_s=0.0, fps=Fraction(FPS), codec="h264")
    write_manifest(folder / "manifest", chunk_root=folder, chunks=[chunk], samples=samples)
    return Manifest(folder / "manifest")


def run_clips(pool: DecodePool, ring: SharedRing, requests: Iterator[ClipRequest]) -> list[float]:
    """Decode clips with the ring's places kept busy; returns the seconds each took in its worker."""
    places = SLOTS * SLOT_CLIPS
    pending: deque[Ticket] = deque()
    seconds = []
    for number, request in enumerate(requests):
        if len(pending) == places:
            seconds.append(pool.wait(pending.popleft()))
        offset = (number % places) * ring.clip_bytes
        pending.append(pool.submit(request, ring, offset))
    return seconds + [pool.wait(ticket) for ticket in pending]


def start_up(requests: list[ClipRequest], ring: SharedRing) -> Row:
    """Seconds until a new pool of one worker has delivered a clip, and its memory after more of them."""
    start = time.perf_counter()
    with closing(DecodePool(cpu_fused.decode_clip, workers=1, clip_timeout_s=30)) as pool:
        pool.wait(pool.submit(requests[0], ring, 0))
        first_clip_s = time.perf_counter() - start
        run_clips(pool, ring, islice(cycle(requests), MEMORY_AFTER_CLIPS))
        (worker,) = multiprocessing.active_children()
        memory = process_memory_mb(worker.pid or "self")
    return {
        "measured": "start-up of one worker",
        "first_clip_s": round(first_clip_s, 3),
        "after_clips": MEMORY_AFTER_CLIPS,
        "worker_memory_mb": memory["VmRSS"],
        "worker_private_memory_mb": memory["RssAnon"],
    }


def throughput(
    requests: list[ClipRequest], ring: SharedRing, *, workers: int, clips: int, decode_clip: DecodeClip
) -> Row:
    """Clips per second of a warm pool."""
    with closing(DecodePool(decode_clip, workers=workers, clip_timeout_s=30)) as pool:
        run_clips(pool, ring, islice(cycle(requests), 2 * SLOT_CLIPS))
        workers_before, own_before, machine_before = workers_cpu_s(), time.process_time(), machine_cpu_s()
        start = time.perf_counter()
        seconds = run_clips(pool, ring, islice(cycle(requests), clips))
        elapsed = time.perf_counter() - start
        workers_s, own_s = workers_cpu_s() - workers_before, time.process_time() - own_before
        others_s = machine_cpu_s() - machine_before - workers_s - own_s
    milliseconds = [1000 * s for s in seconds]
    return {
        "measured": decode_clip.__module__.rpartition(".")[2]
        if decode_clip is not deliver_at_once
        else "no-op",
        "workers": workers,
        "clips": clips,
        "clips_per_s": round(clips / elapsed, 1),
        "elapsed_ms_per_clip": round(1000 * elapsed / clips, 3),
        "worker_cpu_ms_per_clip": round(1000 * workers_s / clips, 3),
        "worker_ms_p50": round(statistics.median(milliseconds), 3),
        "worker_ms_p90": round(statistics.quantiles(milliseconds, n=10)[-1], 3),
        "cores_taken_by_other_programs": round(max(others_s, 0) / elapsed, 2),
    }


def workers_cpu_s() -> float:
    """Processor seconds of all workers so far."""
    return sum(process_cpu_s(worker.pid) for worker in multiprocessing.active_children() if worker.pid)


def copying(ring: SharedRing) -> Row:
    """What it costs to take a micro-batch out of the ring."""
    start, rounds = time.perf_counter(), 50
    for number in range(rounds):
        ring.frames(number % SLOTS).copy()
    return {
        "measured": "copy out of the ring",
        "clip_mb": round(ring.clip_bytes / 1e6, 2),
        "copy_ms_per_clip": round(1000 * (time.perf_counter() - start) / rounds / SLOT_CLIPS, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=300, help="decoded for each throughput row")
    options = parser.parse_args()
    machine = machine_facts()
    ring = SharedRing(SLOTS, (SLOT_CLIPS, *RULES.clip_shape))
    with tempfile.TemporaryDirectory() as folder, closing(ring):
        manifest = write_small_manifest(Path(folder))
        chunk_facts = {"chunk": f"{WIDTH}x{HEIGHT} balanced, {SECONDS} s, {FPS} fps"}
        chunk_facts["chunk_mbit_per_s"] = f"{manifest.chunk(0).ref.size_bytes * 8 / SECONDS / 1e6:.2f}"
        planner = Planner(manifest, RULES, seed=0)
        rows_in_random_order = np.random.default_rng(0).permutation(manifest.num_samples).tolist()
        requests = [planner.plan(row, epoch=0) for row in rows_in_random_order]
        decode = cpu_fused.decode_clip
        rows = [
            {**start_up(requests, ring), **chunk_facts},
            *(throughput(requests, ring, workers=n, clips=options.clips, decode_clip=decode) for n in (1, 2)),
            throughput(requests, ring, workers=1, clips=TRANSPORT_CLIPS, decode_clip=deliver_at_once),
            copying(ring),
        ]
    print_rows(rows)
    print(write_result("loading", rows, machine=machine, baseline=REQUIREMENT))


if __name__ == "__main__":
    main()
