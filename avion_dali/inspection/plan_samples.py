"""Samples for `avion-dali plan`: a few chunks of each profile, a manifest of them, and the needs of clips.

In the manifest, each chunk is followed by copies of itself, so that clips cross chunk borders as often as in a
dataset.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np

from avion_dali.contracts import ClipRequest, DecodeError, UserError
from avion_dali.cores import available_cores
from avion_dali.data.declared import expected_seconds
from avion_dali.data.encoding import PictureFilter, write_chunk
from avion_dali.data.hand_held import FRAMES_PER_SECOND
from avion_dali.data.manifest import IndexWriter, Manifest, Sample, write_manifest
from avion_dali.data.planner import Planner
from avion_dali.data.probe import open_video
from avion_dali.data.profiles import PROFILES, ProfileName
from avion_dali.data.scanning import find_chunk_files, scan_chunks
from avion_dali.decode.planned_reads import planned_reads

CLIPS = 200  # clips in a manifest of samples; the mean of their needs is then accurate to a few percent
_TOKENS = (49406, 320, 49407)
_LINKED = 32  # chunks that are used of a folder


def video_pictures(video: Path, *, seconds: float, short_side: int) -> tuple[np.ndarray, Fraction]:
    """Read pictures from the middle of a video as chunking does, and return them as `draw_pictures` does.

    Args:
        video: the file.
        seconds: length in seconds; a shorter video is read whole.
        short_side: short side in pixels, a multiple of 16.

    Raises:
        UserError: when the video cannot be read.
    """
    try:
        with open_video(video) as (container, stream):
            rate = stream.average_rate or stream.guessed_rate or Fraction(FRAMES_PER_SECOND)
            before = ((expected_seconds(container, stream) or 0) - seconds) / 2
            if before > 0:
                container.seek(round(before * av.time_base))
            aspect = Fraction(stream.sample_aspect_ratio or 1)
            picture_of = PictureFilter(aspect, short_side=short_side)
            frames = islice(container.decode(stream), max(round(seconds * rate), 2))
            planes = [picture_of(frame).to_ndarray() for frame in frames]
    except (DecodeError, ValueError) as error:
        raise UserError(f"--videos: {video} cannot be used: {error}") from error
    if len(planes) < 2:
        raise UserError(f"--videos: {video} has fewer than two pictures; choose another video")
    return np.stack(planes), Fraction(max(round(rate), 1))  # the average over a file is slightly inexact


def encode_samples(
    planes: np.ndarray, fps: Fraction, *, tasks: Sequence[tuple[ProfileName, float, Path]], name: str
) -> None:
    """Encode pictures in several ways in parallel, with one core each.

    Args:
        planes: uint8 (F, H * 3 / 2, W), YUV 4:2:0 pictures.
        fps: pictures per second.
        tasks: (profile, chunk length in seconds, chunk folder) of each way.
        name: name of the video inside the chunk folders.
    """

    def encode(task: tuple[ProfileName, float, Path]) -> None:
        profile, chunk_seconds, root = task
        (root / name).mkdir(parents=True, exist_ok=True)
        size = max(min(round(chunk_seconds * fps), len(planes)), 2)
        for number in range(len(planes) // size):
            pictures = planes[number * size : (number + 1) * size]
            frames = (av.VideoFrame.from_ndarray(picture, format="yuv420p") for picture in pictures)
            path = root / name / f"{number * chunk_seconds:g}.mp4"
            write_chunk(path, frames, profile=PROFILES[profile], fps=fps)

    # Encoders release the interpreter lock, so threads run in parallel, and they can share the pictures.
    with ThreadPoolExecutor(available_cores()) as threads:
        list(threads.map(encode, tasks))


def open_chunks(chunks: Path, scratch: Path, *, clip_seconds: float) -> Manifest:
    """Open a manifest, or create one from some chunks of a folder, so that a large folder is not probed whole.

    Args:
        chunks: a manifest, or a chunk folder of any size.
        scratch: folder for a new manifest.
        clip_seconds: length of a clip's span in a new manifest.

    Raises:
        UserError: when the folder is missing or contains no usable chunk.
    """
    if (chunks / "manifest.json").is_file():
        return Manifest(chunks)
    files = find_chunk_files(chunks)
    for number in np.random.default_rng(0).permutation(len(files))[:_LINKED].tolist():
        video, _, path = files[number]
        link = scratch / "links" / video / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.absolute())
    return write_sample_manifest(scratch / "links", scratch / "manifest", clip_seconds=clip_seconds)


def write_sample_manifest(
    chunk_root: Path, folder: Path, *, clip_seconds: float, chunk_seconds: float | None = None
) -> Manifest:
    """Index chunks, then write and open a manifest of clips at random times, some across chunk borders.

    Args:
        chunk_root: folder of a few chunks, which are all probed.
        folder: folder for the manifest.
        clip_seconds: length of a clip's span.
        chunk_seconds: chunk length that determines how often clips cross a border; by default the real length.

    Raises:
        UserError: when no chunk can be used.
    """
    with IndexWriter(folder) as index:
        found, unusable = scan_chunks(chunk_root, jobs=1, index=index)
        index.finish()
    chunks = [chunk for chunk in found if chunk.ref.index is not None]
    if not chunks:
        reason = unusable[0].reason if unusable else f"codec {found[0].codec} has no packet index"
        raise UserError(f"no chunk of {chunk_root} can be used: {reason}; make chunks with `avion-dali chunk`")
    lengths = [chunk.end_s - chunk.start_s for chunk in chunks]
    copies = [int(clip_seconds / length) + 2 for length in lengths]
    firsts = np.cumsum([0, *copies]).tolist()
    rows = [
        replace(chunk, video=f"{number:06d}", start_s=copy * lengths[number])
        for number, chunk in enumerate(chunks)
        for copy in range(copies[number])
    ]

    def draw_samples() -> Iterator[Sample]:
        rng = np.random.default_rng(0)
        for number in rng.integers(len(lengths), size=CLIPS).tolist():
            length = lengths[number]
            # Clips start anywhere; those that start in the last `clip_seconds` of a chunk cross its border.
            crosses = rng.random() < clip_seconds / (chunk_seconds or length) or clip_seconds >= length
            low, high = (max(length - clip_seconds, 0), length) if crosses else (0, length - clip_seconds)
            start = float(rng.uniform(low, high))
            touched = max(math.ceil((start + clip_seconds) / length), 1)
            yield Sample(firsts[number], touched, start, start + clip_seconds, ("a clip",), (_TOKENS,))

    write_manifest(folder, chunk_root=chunk_root, chunks=rows, samples=draw_samples())
    return Manifest(folder)


def mean_chunk(manifest: Manifest) -> tuple[float, float]:
    """Average over some chunks of a manifest.

    Args:
        manifest: a manifest of any size.

    Returns:
        Seconds per chunk, and bytes per second of video, including the packet index.
    """
    rows = np.random.default_rng(0).permutation(manifest.num_chunks)[:CLIPS]
    chunks = [manifest.chunk(row) for row in rows.tolist()]
    seconds = sum(chunk.end_s - chunk.start_s for chunk in chunks)
    index_bytes = sum(chunk.ref.index.num_bytes for chunk in chunks if chunk.ref.index)
    num_bytes = sum(chunk.ref.size_bytes for chunk in chunks) + index_bytes
    return seconds / len(chunks), num_bytes / seconds


def sample_requests(planner: Planner) -> list[ClipRequest]:
    """Plan some clips of a manifest, chosen at random.

    Args:
        planner: planner of a manifest of any size.
    """
    rows = np.random.default_rng(1).permutation(planner.num_clips)[:CLIPS]
    return [planner.plan(row, epoch=0) for row in rows.tolist()]


def clip_needs(request: ClipRequest) -> tuple[int, list[int]]:
    """Return what the decoder decodes and reads for a clip.

    Args:
        request: the clip.

    Returns:
        Number of decoded pictures, and bytes of each read, including those of the packet index.

    Raises:
        UserError: when a chunk has no packet index.
        DecodeError: when a packet index cannot be read.
    """
    plans = [planned_reads(part, decoder="cpu-fused") for part in request.parts]
    return sum(plan.decoded for plan in plans), [size for plan in plans for size in plan.read_sizes]
