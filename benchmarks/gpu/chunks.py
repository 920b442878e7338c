"""Input of the GPU suite: chunks of every style whose pictures show their number, and clips of them.

Spawned processes import this module.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
from av.video.frame import VideoFrame

from avion_dali.contracts import ChunkRef, ClipPart, ClipRequest, CropWindow
from avion_dali.cores import available_cores
from avion_dali.data.crops import random_resized_window
from avion_dali.data.encoding import write_chunk
from avion_dali.data.manifest import Manifest
from avion_dali.data.profiles import PIX_FMT, PROFILES, EncodeProfile
from avion_dali.loading.worker import start_worker
from benchmarks.corpus import FOUR, ClipKind, kind_manifest
from benchmarks.gpu.parts import NotRunError, Suite
from benchmarks.media import FPS, SCENES, pictures

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
ODD = "-odd"  # of a size that is no multiple of 16, so that NVDEC codes it larger than it is shown
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
    size: tuple[int, int]  # (width, height) in pixels
    frames: int
    seed: int


def encode(job: _Job) -> None:
    """Write a chunk."""
    job.path.parent.mkdir(parents=True, exist_ok=True)
    write_chunk(job.path, _pictures(job), profile=STYLES[job.style], fps=Fraction(FPS))


def _pictures(job: _Job) -> Iterator[VideoFrame]:
    scene = replace(SCENES["head_mounted_0"], seed=job.seed)
    for number, rgb_HWC in enumerate(pictures(scene, job.frames, job.size)):
        draw_number(rgb_HWC, number)
        yield VideoFrame.from_ndarray(rgb_HWC, format="rgb24").reformat(format=PIX_FMT)


def media_jobs(folder: Path, *, small: bool) -> Iterator[_Job]:
    """List the chunks: four of the style that is trained on, one of each other, and two of an odd size."""
    size, odd, frames = ((128, 96), (126, 96), 60) if small else ((512, 288), (382, 288), 150)
    for style in STYLES:
        long = style == "balanced" and not small
        for seed in range(4 if long else 1):
            path = folder / style / f"source_{seed}" / "0.mp4"
            yield _Job(path, style, size, 2 * frames if long else frames, seed)
    for style in ("balanced", "vp9"):
        yield _Job(folder / f"{style}{ODD}" / "source_0" / "0.mp4", style, odd, frames, 0)


def make_media(folder: Path, *, small: bool) -> int:
    """Encode all chunks, and print how long they are; returns the exit status."""
    jobs = list(media_jobs(folder, small=small))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(available_cores(), spawn, start_worker, (os.getpid(),)) as pool:
        list(pool.map(encode, jobs))
    print(f"{len(jobs)} chunks in {folder}: {sum(job.path.stat().st_size for job in jobs) / 2**20:.1f} MiB")
    return 0


def kinds(suite: Suite) -> list[str]:
    """All styles that should be there, also in the odd size; the one that is trained on is first."""
    names = [*STYLES, f"balanced{ODD}", f"vp9{ODD}"]
    return sorted(names, key=lambda name: name.removesuffix(ODD) != suite.style)


def open_manifest(suite: Suite, chunks: str, kind: ClipKind = FOUR) -> Manifest:
    """Open a manifest of clips of a style's chunks; the first call makes it."""
    if not (suite.media / chunks).is_dir():
        raise NotRunError(f"{suite.media} has no {chunks} chunks; make them with --make-media")
    return manifest_of(suite, suite.media / chunks, f"{chunks}_{kind.num_frames}.manifest", kind)


def manifest_of(suite: Suite, source: Path, name: str, kind: ClipKind = FOUR) -> Manifest:
    """Open a manifest of a folder's chunks in the work folder; the first call makes it."""
    folder = suite.work / name
    if not (folder / "manifest.json").exists():
        kind_manifest(source, folder, kind, samples=suite.scale.samples)
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
        wanted = tuple(ClipPart(part, tuple(ids.tolist())) for part, ids in parts)
        clips.append(ClipRequest(number, 0, wanted, (0, 1, 2, 3), (window,), (False,), frame_size))
    return clips


def shown_numbers(request: ClipRequest) -> list[int]:
    """The numbers that a clip's frames must show."""
    return [frame_id for part in request.parts for frame_id in part.frame_ids]
