"""Measures what a machine's disk and processor do for clips.

Decode processes import this module, so Arrow and torch are imported by the functions that need them.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import cycle, islice
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from avion_dali.contracts import ClipRequest, UserError
from avion_dali.cores import available_cores
from avion_dali.decode.cpu_fused import decode_clip
from avion_dali.inspection.capacity import DecodeCost, DiskSpeed, TrainerCost, fit_decode_cost, fit_read_cost
from avion_dali.loading.worker import DecodeClip, start_worker

if TYPE_CHECKING:
    import torch

    from avion_dali.data.manifest import Manifest
    from avion_dali.data.planner import Planner

_KIB = 1024
_SMALL_READ, _LARGE_READ = 64 * _KIB, 1024 * _KIB
_TEST_FILE_BYTES = 256 * 1024 * _KIB
_PAGE = 4 * _KIB
_START_TIMEOUT_S = 60.0
# Beyond 32 MB, glibc fetches memory from the system anew for every batch, as it does in most trainings.
_TRAINER_BATCH_BYTES = 36_000_000
_barrier: Barrier | None = None


def time_decoding(requests: Sequence[ClipRequest], *, processes: int, seconds: float) -> np.ndarray:
    """Time clips in processes like the loader's workers, all at once.

    Args:
        requests: clips, decoded in turn, again and again.
        processes: how many decode these clips at a time.
        seconds: of processor time in each process.

    Returns:
        float64 (processes, len(requests)), processor milliseconds of each clip, the least of several times;
        NaN where its turn never came.

    Raises:
        DecodeError: when a clip cannot be read.
    """
    spawn = multiprocessing.get_context("spawn")
    started = (os.getpid(), spawn.Barrier(processes))
    with ProcessPoolExecutor(processes, spawn, initializer=_start_timing, initargs=started) as pool:
        # All wait for each other before they begin, so none takes two tasks.
        tasks = [pool.submit(_time_clips, list(requests), seconds) for _ in range(processes)]
        return np.stack([task.result() for task in tasks])


def _start_timing(parent_pid: int, barrier: Barrier) -> None:
    global _barrier
    _barrier = barrier
    start_worker(parent_pid)


def _time_clips(requests: Sequence[ClipRequest], seconds: float) -> np.ndarray:
    """Decode clips in turn for some seconds of processor time, from when all processes are ready."""
    # The loader's workers write all over the ring, so nothing of it stays in the processor's caches.
    largest = max(int(np.prod(request.frames_shape)) for request in requests)
    memory = np.zeros(max(largest, 32 * 1024 * _KIB), np.uint8)
    least, offset, left_s = np.full(len(requests), np.nan), 0, seconds
    decode_clip(requests[0], memory[: int(np.prod(requests[0].frames_shape))].reshape(requests[0].frames_shape))
    assert _barrier is not None, "the process was not started by time_decoding"
    _barrier.wait(_START_TIMEOUT_S)
    for number in cycle(range(len(requests))):
        shape = requests[number].frames_shape
        size = int(np.prod(shape))
        offset = 0 if offset + size > len(memory) else offset
        start = time.thread_time()
        decode_clip(requests[number], memory[offset : offset + size].reshape(shape))
        spent_s = time.thread_time() - start
        offset, left_s = offset + size, left_s - spent_s
        least[number] = np.fmin(least[number], 1e3 * spent_s)
        if left_s < 0:
            break
    return least


def measure_decode_cost(
    manifest: Manifest, *, frame_counts: Sequence[int], frame_size: int, seconds: float
) -> DecodeCost:
    """Time clips of several lengths in one process and find what their parts cost.

    Args:
        manifest: whose chunks are decoded.
        frame_counts: clip lengths T to time, interleaved.
        frame_size: side of the frames in pixels.
        seconds: of processor time.
    """
    from avion_dali.inspection.sampling import clip_needs, sample_requests

    of_each = [sample_requests(manifest, num_frames=n, frame_size=frame_size) for n in frame_counts]
    requests = [request for group in zip(*of_each, strict=True) for request in group]
    ms = time_decoding(requests, processes=1, seconds=seconds)[0]
    timed = np.flatnonzero(np.isfinite(ms)).tolist()
    return fit_decode_cost([clip_needs(requests[number]) for number in timed], ms[timed].tolist())


def measure_slowdown(requests: Sequence[ClipRequest], *, seconds: float) -> float:
    """Compare the processor time of clips with all cores decoding and with one.

    Args:
        requests: clips.
        seconds: of processor time in each process, alone and together.

    Returns:
        The median ratio, at least 1.
    """
    cores = available_cores()
    if cores == 1:
        return 1.0
    alone = time_decoding(requests, processes=1, seconds=seconds)
    together = time_decoding(requests, processes=cores, seconds=seconds)
    return max(float(np.nanmedian(together / alone)), 1.0)


def physical_cores() -> int:
    """Return the cores this process may use, hyper-threads not counted; all where nothing is known of them."""
    if not hasattr(os, "sched_getaffinity"):
        return available_cores()
    siblings = set()
    for cpu in os.sched_getaffinity(0):
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(topology.read_text() if topology.exists() else str(cpu))
    return len(siblings)


def deliver_at_once(request: ClipRequest, frames_VTHWC: np.ndarray) -> None:
    """Stand in for a decoder: what remains is the training process's own work.

    Args:
        request: the clip.
        frames_VTHWC: made grey, so that the memory is really there.
    """
    frames_VTHWC.fill(128)


def deliver_one_by_one(request: ClipRequest, frames_VTHWC: np.ndarray) -> None:
    """Stand in for a decoder that is slow enough for the training process to sleep between clips.

    Args:
        request: the clip.
        frames_VTHWC: made grey.
    """
    frames_VTHWC.fill(128)
    time.sleep(2e-3)


def measure_trainer(
    manifest: Manifest, *, device: torch.device, frame_size: int, frame_counts: tuple[int, int], clips: int
) -> TrainerCost:
    """Measure what the loader costs the training process, with workers that do not decode.

    Args:
        manifest: any.
        device: where clips are delivered.
        frame_size: side of the frames in pixels.
        frame_counts: two clip lengths T to measure, ascending; those in question are best.
        clips: how many to deliver for each of three measurements.

    Returns:
        Processor time of this process.

    Raises:
        UserError: when shared memory has not even the room that this takes, 72 MB or four clips.
    """
    from avion_dali.data.planner import ClipRules, Planner

    low, high = frame_counts
    batch = min(math.ceil(_TRAINER_BATCH_BYTES / (high * frame_size**2 * 3)), manifest.num_samples)

    def milliseconds(num_frames: int, decode_clip: DecodeClip) -> float:
        rules = ClipRules(num_frames, frame_size, training=True)
        return _trainer_ms(Planner(manifest, rules, seed=0), device, decode_clip, batch=batch, clips=clips)

    few, many = milliseconds(low, deliver_at_once), milliseconds(high, deliver_at_once)
    slow = milliseconds(high, deliver_one_by_one)
    per_frame = max((many - few) / (high - low), 0.0)
    return TrainerCost(max(many - high * per_frame, 0.0), per_frame, max(slow - many, 0.0))


def _trainer_ms(
    planner: Planner, device: torch.device, decode_clip: DecodeClip, *, batch: int, clips: int
) -> float:
    from avion_dali.data.order import BatchSchedule
    from avion_dali.data.text import CONTEXT_LENGTH
    from avion_dali.loading.clip_loader import ClipLoader, LoaderSettings
    from avion_dali.loading.frames_strategy import FramesStrategy
    from avion_dali.loading.pool import WorkerPool

    schedule = BatchSchedule(planner.manifest.num_samples, global_batch=batch, micro_batch=batch)
    settings = LoaderSettings(device, CONTEXT_LENGTH, prefetch_batches=1)
    strategy = FramesStrategy(decode_clip)
    with (
        WorkerPool(workers=1, timeout_s=30) as pool,
        ClipLoader(planner, schedule, pool=pool, strategy=strategy, settings=settings) as loader,
    ):
        warm_up = settings.prefetch_batches + 1
        batches = loader.batches(0, warm_up + math.ceil(clips / batch))
        for _ in islice(batches, warm_up):
            pass
        start = time.process_time()
        delivered = sum(len(clip_batch) for clip_batch in batches)
        return 1e3 * (time.process_time() - start) / delivered


@contextmanager
def disk_test_files(place: Path) -> Iterator[list[Path]]:
    """Give files to read from: the ones named, or a temporary one of random bytes on the same disk.

    Args:
        place: a file, or a folder that a file of up to 256 MiB can be written to for the moment.

    Yields:
        Paths of files.

    Raises:
        UserError: when nothing can be read or written there.
    """
    if place.is_file():
        yield [place]
        return
    block = os.urandom(8 * 1024 * _KIB)
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".disk-test-") as file:
            for _ in range(_TEST_FILE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())  # pages that are not yet on the disk cannot be dropped from memory
            yield [Path(file.name)]
    except OSError as error:
        raise UserError(
            f"--disk {place}: cannot write a test file there ({error.strerror}); name a large file, "
            "or a folder with 256 MiB to spare"
        ) from error


def measure_disk(files: Sequence[Path], *, readers: int, seconds: float = 0.4) -> DiskSpeed | None:
    """Measure reads of a disk, dropping what is read from the page cache first.

    Only this machine's cache is dropped: one inside the disk, or of a host that lends it, still helps.

    Args:
        files: on that disk, together much larger than 1 MiB.
        readers: decode processes that will read at a time.
        seconds: for each of five measurements.

    Returns:
        The speeds, or None where the page cache cannot be dropped (not Linux).
    """
    if not hasattr(os, "posix_fadvise"):
        return None
    with ExitStack() as stack:
        opened = [stack.enter_context(open(path, "rb", buffering=0)).fileno() for path in files]

        def at_random(size: int, threads: int) -> tuple[float, float]:
            return _read_at_random(opened, size, threads=threads, seconds=seconds)

        small_together = at_random(_SMALL_READ, readers)
        return DiskSpeed(
            sequential_mb_s=_read_in_order(opened, seconds),
            random_reads_per_s=1e3 / small_together[1],
            alone=fit_read_cost(at_random(_SMALL_READ, 1), at_random(_LARGE_READ, 1)),
            together=fit_read_cost(small_together, at_random(_LARGE_READ, readers)),
            readers=readers,
        )


def _read_in_order(files: Sequence[int], seconds: float) -> float:
    """Read files from their beginning until the time is over; returns 10^6 bytes per second."""
    start, done = time.perf_counter(), 0
    for file in files:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        offset = 0
        while data := os.pread(file, _LARGE_READ, offset):
            offset += len(data)
            done += len(data)
            if time.perf_counter() - start > seconds:
                return done / 1e6 / (time.perf_counter() - start)
    return done / 1e6 / (time.perf_counter() - start)


def _read_at_random(files: Sequence[int], size: int, *, threads: int, seconds: float) -> tuple[float, float]:
    """Read blocks at random places; returns the mean bytes of a read, and milliseconds per read over all."""
    sizes = [os.fstat(file).st_size for file in files]
    for file in files:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    end = time.perf_counter() + seconds

    def read(seed: int) -> list[int]:
        rng, lengths = np.random.default_rng(seed), []
        while time.perf_counter() < end:
            number = int(rng.integers(len(files)))
            pages = max(sizes[number] - size, 0) // _PAGE
            offset = int(rng.integers(pages + 1)) * _PAGE
            # More than the block: the kernel keeps large pages that a range covers in part only.
            around = (max(offset - _LARGE_READ, 0), size + 2 * _LARGE_READ)
            os.posix_fadvise(files[number], *around, os.POSIX_FADV_DONTNEED)
            lengths.append(len(os.pread(files[number], size, offset)))
        return lengths

    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        lengths = [length for one in pool.map(read, range(threads)) for length in one]
    return float(np.mean(lengths)), 1e3 * (time.perf_counter() - start) / len(lengths)
