"""What decoding is measured on: chunks of real videos and of a noise-like one in every profile, and clips."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from av.video.frame import VideoFrame

from avion_dali.contracts import ChunkRef, ClipPart, ClipRequest, PacketIndexRef
from avion_dali.cores import available_cores
from avion_dali.data.crops import random_resized_window
from avion_dali.data.encoding import write_chunk
from avion_dali.data.frames import segment_frame_ids
from avion_dali.data.probe import open_video, probe_chunk
from avion_dali.data.profiles import PIX_FMT, PROFILES
from benchmarks.corpus import FPS, ClipKind, hand_held_pictures
from benchmarks.machine import ROOT

# Two small real videos; a checkout without them measures the noise-like one alone.
REAL_VIDEOS = tuple(sorted((ROOT.parent / "shared" / "media").glob("*.mp4")))
NOISE = "hand_held (procedural)"

Chunks = dict[tuple[str, str], ChunkRef]  # by (source, profile)


@dataclass(frozen=True)
class ChunkSettings:
    """What is made of every source.

    Args:
        seconds: length of a chunk.
        short_side: of its pictures in pixels, a multiple of 16.
        noise_size: (width, height) of the noise-like source in pixels, multiples of 16.
    """

    seconds: int = 15
    short_side: int = 288
    noise_size: tuple[int, int] = (512, 288)


@dataclass(frozen=True)
class _Job:
    """One chunk to encode, of a video or of the noise-like source."""

    video: Path | None
    target: Path
    profile: str
    settings: ChunkSettings


def write_chunks(
    videos: Sequence[Path], folder: Path, profiles: Sequence[str], settings: ChunkSettings
) -> Chunks:
    """Encode a chunk of every video, and of a noise-like one, in every profile; those that are there are kept.

    Args:
        videos: played forth and back until a chunk is full.
        folder: where chunks go.
        profiles: names of encode profiles.
        settings: what chunks are like.
    """
    jobs = [
        _Job(video, folder / profile / f"{video.stem if video else NOISE}.mp4", profile, settings)
        for profile in profiles
        for video in (*videos, None)
    ]
    spawning = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(available_cores(), mp_context=spawning) as pool:
        list(pool.map(_encode, (job for job in jobs if not job.target.exists())))
    return {(job.target.stem, job.profile): indexed_chunk(job.target) for job in jobs}


def _encode(job: _Job) -> None:
    job.target.parent.mkdir(parents=True, exist_ok=True)
    frames, settings = job.settings.seconds * FPS, job.settings
    if job.video:
        pictures = forth_and_back(job.video, frames=frames, short_side=settings.short_side)
    else:
        pictures = noise_like(frames, settings.noise_size)
    write_chunk(job.target, pictures, profile=PROFILES[job.profile], fps=Fraction(FPS))  # type: ignore[index]


def noise_like(frames: int, size: tuple[int, int]) -> Iterator[VideoFrame]:
    """Yield procedural pictures that are hard to encode.

    Args:
        frames: how many.
        size: (width, height) in pixels.
    """
    for rgb_HWC in hand_held_pictures(frames, size, seed=0):
        yield VideoFrame.from_ndarray(rgb_HWC, format="rgb24").reformat(format=PIX_FMT)


def forth_and_back(video: Path, *, frames: int, short_side: int) -> Iterator[VideoFrame]:
    """Yield a video's pictures, scaled, forth and back until there are enough.

    Args:
        video: its best stream is taken.
        frames: how many pictures.
        short_side: of the pictures in pixels; both sides become multiples of 16.
    """
    with open_video(video) as (container, stream):
        scale = short_side / min(stream.width, stream.height)
        width, height = (round(side * scale / 16) * 16 for side in (stream.width, stream.height))
        decoded = islice(container.decode(stream), frames)
        pictures = [
            frame.reformat(width=width, height=height, format=PIX_FMT, interpolation="BICUBIC")
            for frame in decoded
        ]
    for picture in islice(cycle([*pictures, *pictures[-2:0:-1]]), frames):
        picture.pict_type = 0  # else the encoder repeats the source's choice of keyframes
        yield picture


def indexed_chunk(path: Path) -> ChunkRef:
    """Probe a file and lay its packet index beside it."""
    facts = probe_chunk(path, index=True)
    index = path.with_suffix(".packets")
    index.write_bytes(facts.packet_index)
    ref = PacketIndexRef(str(index), 0, len(facts.packet_index))
    return ChunkRef(str(path), facts.size_bytes, facts.num_frames, facts.width, facts.height, ref)


def without_index(request: ClipRequest) -> ClipRequest:
    """The same clip, its packets to be found by opening the container."""
    parts = tuple(ClipPart(replace(part.chunk, index=None), part.frame_ids) for part in request.parts)
    return replace(request, parts=parts)


def draw_clips(
    chunk: ChunkRef, kind: ClipKind, *, clips: int, frame_size: int = 224, seed: int = 0
) -> list[ClipRequest]:
    """Draw training clips, one from each of equal parts of a chunk; the same for chunks of one length and size.

    Args:
        chunk: the file.
        kind: clip length and span.
        clips: how many.
        frame_size: side of the output in pixels.
        seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    span = round(kind.seconds * FPS)
    rules = kind.rules(frame_size)
    drawn = []
    for number in range(clips):
        start = int((number + rng.random()) / clips * (chunk.num_frames - span + 1))
        ids = segment_frame_ids(start, start + span, kind.num_frames, rng)
        while len(set(ids.tolist())) < kind.num_frames:  # not every library can be asked for a frame twice
            ids = segment_frame_ids(start, start + span, kind.num_frames, rng)
        window = random_resized_window(
            chunk.width, chunk.height, scale=rules.crop_scale, ratio=rules.crop_ratio, rng=rng
        )
        part = ClipPart(chunk, tuple(ids.tolist()))
        gather = tuple(range(kind.num_frames))
        drawn.append(ClipRequest(number, 0, (part,), gather, (window,), (False,), frame_size))
    return drawn
