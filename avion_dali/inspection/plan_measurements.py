"""Measurements of `avion-dali plan`: runs the loader for some seconds, and reads the disk without page cache.

Decode processes import this module, so Arrow and torch are imported only in the functions that use them.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import islice, repeat
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from avion_dali.contracts import ClipRequest, DecodeError, UserError
from avion_dali.decode.cpu_fused import decode_clip
from avion_dali.inspection.plan_forecast import ClipCost

if TYPE_CHECKING:
    import torch

    from avion_dali.data.planner import Planner

_BATCH, _PREFETCH = 16, 2
_ENDLESS = 1_000_000  # steps
_PAGE, _MIB = 4 * 1024, 1024 * 1024
_BLOCK, _TEST_FILE_BYTES = 8 * _MIB, 256 * _MIB


def decode_and_note_time(request: ClipRequest, frames_VTHWC: np.ndarray) -> None:
    """Decode a clip as training does, then overwrite its first 2 bytes with the processor time of decoding.

    The frames are not needed, and in this way the worker reports its time through the unchanged loader.

    Args:
        request: the clip.
        frames_VTHWC: uint8 (V, T, H, W, C), filled with the clip; its first 2 bytes become float16 ms.
    """
    start = time.thread_time()
    decode_clip(request, frames_VTHWC)
    frames_VTHWC.reshape(-1)[:2] = np.array([1e3 * (time.thread_time() - start)], np.float16).view(np.uint8)


def measure_loader(planner: Planner, *, device: torch.device, workers: int, seconds: float) -> ClipCost:
    """Run the loader and the decoder of training for a while.

    Args:
        planner: planner of the clips to load, which are training clips of one view.
        device: device to which batches are delivered.
        workers: number of decode processes.
        seconds: duration of the measurement after the loader has started; at least one batch is measured.

    Returns:
        Processor time per clip, which hardly depends on other programs, unlike a rate.

    Raises:
        DecodeError: when a clip cannot be read.
        UserError: when shared memory is too small for three batches.
    """
    from avion_dali.data.order import BatchSchedule
    from avion_dali.data.tokens import CONTEXT_LENGTH
    from avion_dali.inspection.plan_samples import clip_needs
    from avion_dali.loading.clip_loader import ClipLoader, LoaderSettings
    from avion_dali.loading.frames_strategy import FramesStrategy
    from avion_dali.loading.pool import WorkerPool

    request = planner.plan(0, epoch=0)
    # This reports a missing chunk before processes start.
    decode_clip(request, np.empty(request.frames_shape, np.uint8))
    batch = min(max(workers, _BATCH), planner.manifest.num_samples)
    schedule = BatchSchedule(planner.manifest.num_samples, global_batch=batch, micro_batch=batch)
    settings = LoaderSettings(device, CONTEXT_LENGTH, prefetch_batches=_PREFETCH, max_bad_fraction=1.0)
    strategy = FramesStrategy(decode_and_note_time)
    with (
        WorkerPool(workers=workers, timeout_s=60) as pool,
        ClipLoader(planner, schedule, pool=pool, strategy=strategy, settings=settings) as loader,
    ):
        batches = loader.batches(0, _ENDLESS)
        for _ in islice(batches, _PREFETCH + 1):  # these are scheduled before all workers have started
            pass
        began, core_began = time.perf_counter(), time.process_time()
        notes: list[torch.Tensor] = []
        drawn: list[tuple[int, int]] = []
        while not notes or time.perf_counter() - began < seconds:
            clips = next(batches)
            for e in clips.errors:
                raise DecodeError(e.path, e.frame_ids, decoder="cpu-fused", kind=e.kind, cause=e.cause)
            notes.append(clips.frames_BTHWC.flatten(1)[:, :2].clone())
            drawn += [(row, clips.epoch) for row in clips.sample_ids.tolist()]
        trainer_s = time.process_time() - core_began
        noted_ms = np.concatenate([note_B2.cpu().numpy() for note_B2 in notes]).view(np.float16)
    decoded = fmean(clip_needs(planner.plan(row, epoch))[0] for row, epoch in drawn)
    return ClipCost(fmean(noted_ms.ravel().tolist()), 1e3 * trainer_s / len(drawn), decoded)


@contextmanager
def disk_test_files(place: Path, chunks: Sequence[Path]) -> Iterator[list[int]]:
    """Open files to read from.

    Args:
        place: a file, or a folder in which a temporary file of 256 MiB can be written.
        chunks: files to use instead of `place`; may be empty.

    Yields:
        File descriptors; none on systems other than Linux, where the page cache cannot be dropped.

    Raises:
        UserError: when the file cannot be read or written.
    """
    if not hasattr(os, "posix_fadvise"):
        yield []
        return
    with ExitStack() as stack:
        try:
            if not chunks and not place.is_file():
                file = stack.enter_context(tempfile.NamedTemporaryFile(dir=place, prefix=".disk-test-"))
                file.writelines(repeat(os.urandom(_BLOCK), _TEST_FILE_BYTES // _BLOCK))
                file.flush()
                os.fsync(file.fileno())  # only pages that are on the disk can be dropped from memory
                chunks = [Path(file.name)]
            opened = [stack.enter_context(open(path, "rb")) for path in chunks or [place]]
        except OSError as error:
            advice = "choose a large file, or a folder with 256 MiB of free space"
            raise UserError(f"--disk {place} cannot be tested ({error}); {advice}") from error
        yield [file.fileno() for file in opened]


def read_clips(
    files: Sequence[int], clips: Sequence[Sequence[int]], *, readers: int, seconds: float
) -> tuple[float, float]:
    """Read at random offsets as clips do, without this machine's page cache.

    Args:
        files: file descriptors.
        clips: bytes of every read of each clip.
        readers: number of simultaneous readers.
        seconds: duration.

    Returns:
        Milliseconds per clip and 10^6 bytes per second, over all readers together.
    """
    sizes = [os.fstat(file).st_size for file in files]
    for file in files:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()

    def read(seed: int) -> list[int]:
        rng, done = np.random.default_rng(seed), list[int]()
        while not done or time.perf_counter() - start < seconds:
            done.append(0)
            for size in clips[int(rng.integers(len(clips)))]:
                number = int(rng.integers(len(files)))
                offset = int(rng.integers(max(sizes[number] - size, 0) // _PAGE + 1)) * _PAGE
                # Larger than the block, because the kernel keeps large pages that a range covers only in part.
                around = (max(offset - _MIB, 0), size + 2 * _MIB)
                os.posix_fadvise(files[number], *around, os.POSIX_FADV_DONTNEED)
                done[-1] += len(os.pread(files[number], size, offset))
        return done

    with ThreadPoolExecutor(readers) as threads:
        done = [num_bytes for one in threads.map(read, range(readers)) for num_bytes in one]
    elapsed_s = time.perf_counter() - start
    return 1e3 * elapsed_s / len(done), sum(done) / 1e6 / elapsed_s
