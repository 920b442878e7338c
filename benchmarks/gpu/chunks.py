"""Input of the GPU suite: chunks of every profile whose pictures show their number, and clips of them.

Spawned processes import this module.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from av.video.frame import VideoFrame

from avion_dali.contracts import ChunkRef, ClipPart, ClipRequest, CropWindow
from avion_dali.cores import available_cores
from avion_dali.data.crops import random_resized_window
from avion_dali.data.encoding import write_chunk
from avion_dali.data.manifest import Manifest
from avion_dali.data.profiles import PIX_FMT, PROFILES, EncodeProfile
from avion_dali.loading.worker import start_worker
from benchmarks.corpus import FOUR, kind_manifest, mbit_per_s
from benchmarks.gpu.parts import NotRunError, Record, Suite, attempt
from benchmarks.media import FPS, SCENES, pictures

if TYPE_CHECKING:
    from benchmarks.report import Row

# The project's profiles, and HEVC as x265 encodes it by default: with a pyramid of reference pictures.
STYLES: dict[str, EncodeProfile] = {
    **{str(name): profile for name, profile in PROFILES.items()},
    "hevc-pyramid": EncodeProfile(
        "libx265",
        32,
        {
            "preset": "veryfast",
            "crf": "25",
            "x265-params": "log-level=none:pools=none:frame-threads=1:keyint=32:open-gop=0",
        },
    ),
}
_BITS, _DARK, _LIGHT = 10, 30, 225


def draw_number(rgb_HWC: np.ndarray, number: int) -> None:
    """Draw a number as dark and light fields along the picture's top."""
    height, width = rgb_HWC.shape[:2]
    edges = np.linspace(0, width, _BITS + 1).round().astype(int)
    for bit in range(_BITS):
        rgb_HWC[: height // 6, edges[bit] : edges[bit + 1]] = _LIGHT if number >> bit & 1 else _DARK


def read_number(rgb_HWC: np.ndarray) -> int:
    """Number drawn into a whole picture of any size; -1 when a field is neither dark nor light."""
    height, width = rgb_HWC.shape[:2]
    number, side = 0, width / _BITS
    for bit in range(_BITS):
        left, right = round((bit + 0.3) * side), round((bit + 0.7) * side)
        level = rgb_HWC[height // 24 : height // 8, left : max(right, left + 1)].mean()
        if min(abs(level - _DARK), abs(level - _LIGHT)) > 60:
            return -1
        number |= int(level > 128) << bit
    return number


@dataclass(frozen=True)
class _Job:
    """One chunk to encode."""

    path: Path
    style: str
    size: tuple[int, int]
    frames: int
    seed: int


def _encode(job: _Job) -> None:
    job.path.parent.mkdir(parents=True, exist_ok=True)
    write_chunk(job.path, _pictures(job), profile=STYLES[job.style], fps=Fraction(FPS))


def _pictures(job: _Job) -> Iterator[VideoFrame]:
    scene = replace(SCENES["head_mounted_0"], seed=job.seed)
    for number, rgb_HWC in enumerate(pictures(scene, job.frames, job.size)):
        draw_number(rgb_HWC, number)
        yield VideoFrame.from_ndarray(rgb_HWC, format="rgb24").reformat(format=PIX_FMT)


def kinds(suite: Suite) -> list[tuple[str, tuple[int, int]]]:
    """List style and size of all chunks; the training style also in the odd size."""
    return [*((style, suite.scale.size) for style in STYLES), (suite.training_style, suite.scale.other_size)]


def media(suite: Suite, record: Record) -> None:
    """Write all chunks and their manifests."""
    start = time.perf_counter()
    with ProcessPoolExecutor(
        available_cores(),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=start_worker,
        initargs=(os.getpid(),),
    ) as pool:
        begun = [(style, size, list(_begin(pool, suite, style, size))) for style, size in kinds(suite)]
        for style, size, chunks in begun:
            row: Row = {"measured": "media", "style": style, "size": "x".join(map(str, size))}
            numbers = attempt(partial(_finish, suite.manifest_folder(style, size), chunks, suite.scale.samples))
            seconds = round(time.perf_counter() - start, 1)
            record({**row, **numbers, "seconds_since_start": seconds})


def _finish(folder: Path, chunks: Sequence[Future[None]], samples: int) -> Row:
    for chunk in chunks:
        chunk.result()
    manifest = kind_manifest(folder.with_suffix(""), folder, FOUR, samples=samples)
    return {"chunks": manifest.num_chunks, "mbit_per_s": mbit_per_s(manifest)}


def _begin(
    pool: ProcessPoolExecutor, suite: Suite, style: str, size: tuple[int, int]
) -> Iterator[Future[None]]:
    folder = suite.manifest_folder(style, size).with_suffix("")
    for seed in range(suite.scale.sources):
        path = folder / f"source_{seed}" / "0.mp4"
        yield pool.submit(_encode, _Job(path, style, size, suite.scale.seconds * FPS, seed))


def open_manifest(suite: Suite, style: str, size: tuple[int, int] | None = None) -> Manifest:
    """Open the manifest of a style's chunks.

    Raises:
        NotRunError: when it could not be made.
    """
    folder = suite.manifest_folder(style, size or suite.scale.size)
    if not (folder / "manifest.json").exists():
        raise NotRunError(f"there are no {folder.stem} chunks; see the part `media`")
    return Manifest(folder)


def chunks_of(manifest: Manifest) -> list[ChunkRef]:
    """All chunks of a manifest."""
    return [manifest.chunk(row).ref for row in range(manifest.num_chunks)]


def clips_to_check(chunks: Sequence[ChunkRef], *, count: int, frame_size: int) -> list[ClipRequest]:
    """Draw clips of four frames: of one second, from a whole chunk, from its ends, and from two chunks.

    Those with an even sample id show whole pictures, and so their numbers; the others have random windows.
    """
    rng = np.random.default_rng(7)
    last = chunks[0].num_frames - 1
    clips = []
    for number in range(count):
        chunk, other = (chunks[(number // 2 + shift) % len(chunks)] for shift in range(2))
        start = int(rng.integers(last - FPS))
        parts = [
            [(chunk, start + np.sort(rng.choice(FPS, 4, replace=False)))],
            [(chunk, np.array([0, 1, last - 1, last]))],
            [(chunk, np.sort(rng.choice(last, 4, replace=False)))],
            [(chunk, np.array([last - 9, last])), (other, np.array([0, 11]))],
        ][number // 2 % 4]
        width, height = chunk.width // 2 * 2, chunk.height // 2 * 2
        window = CropWindow(0, 0, width, height)
        if number % 2:
            window = random_resized_window(width, height, scale=(0.5, 1.0), ratio=(0.75, 4 / 3), rng=rng)
        clips.append(
            ClipRequest(
                sample_id=number,
                epoch=0,
                parts=tuple(ClipPart(part, tuple(ids.tolist())) for part, ids in parts),
                gather=(0, 1, 2, 3),
                windows=(window,),
                flips=(False,),
                frame_size=frame_size,
            )
        )
    return clips


def shown_numbers(request: ClipRequest) -> list[int]:
    """The numbers that a clip's frames must show."""
    return [frame_id for part in request.parts for frame_id in part.frame_ids]
