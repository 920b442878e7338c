"""Small stand-ins for a data set: a few chunks in every profile, a manifest over them, and what clips need.

A chunk is taken to be followed by one like itself, so that clips cross chunk borders as often as they will.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import groupby, islice
from pathlib import Path

import av
import numpy as np

from avion_dali.contracts import ClipPart, ClipRequest, DecodeError, UserError
from avion_dali.cores import available_cores
from avion_dali.data.encoding import PictureFilter, target_size, write_chunk
from avion_dali.data.manifest import Chunk, IndexWriter, Manifest, Sample, write_manifest
from avion_dali.data.packet_index import PacketIndex
from avion_dali.data.planner import ClipRules, Planner
from avion_dali.data.probe import expected_seconds, open_video
from avion_dali.data.profiles import PROFILES, ProfileName
from avion_dali.data.scanning import find_chunk_files, scan_chunks
from avion_dali.decode.packets import drop_unneeded, plan_runs
from avion_dali.inspection.capacity import ClipNeeds

CLIPS = 200  # of a manifest over sampled chunks; the mean of their needs is known to a few percent
_TOKENS = (49406, 320, 49407)
_PROCEDURAL_FPS = 30
_LEAST_FPS = 24


@dataclass(frozen=True)
class Pictures:
    """A stretch of video, ready to be encoded.

    Args:
        planes: uint8 (F, H * 3 / 2, W), YUV 4:2:0 pictures.
        fps: pictures per second.
    """

    planes: np.ndarray
    fps: Fraction

    @property
    def seconds(self) -> float:
        """Length."""
        return float(len(self.planes) / self.fps)


def procedural_pictures(*, seconds: float, short_side: int) -> Pictures:
    """Draw a stretch about as hard to encode as hand-held video.

    A scene under a moving camera, a fainter one that moves another way (what motion search cannot predict), and
    noise. Amplitudes fall with one over the spatial frequency, as those of natural images do (Field, JOSA A
    1987).

    Args:
        seconds: length.
        short_side: height in pixels, a multiple of 16.
    """
    width, height = target_size(16 * short_side, 9 * short_side, short_side=short_side)
    margin = height // 2
    rng = np.random.default_rng(0)
    near = np.stack([_texture(rng, height + margin, width + margin) for _ in range(3)], axis=-1)
    far = _texture(rng, height + margin, width + margin)[..., None]
    noise = rng.normal(0, 4, (height, width, 3)).astype(np.float32)
    planes = []
    for number in range(max(round(seconds * _PROCEDURAL_FPS), 2)):
        y, x = (int((1 + f(number / 20)) * (margin - 1) / 2) for f in (math.sin, math.cos))
        rgb = 128 + 45 * near[y : y + height, x : x + width] + 10 * far[x : x + height, y : y + width]
        rgb += np.roll(noise, rng.integers(height), axis=0)
        frame = av.VideoFrame.from_ndarray(np.clip(rgb, 0, 255).astype(np.uint8), format="rgb24")
        planes.append(frame.to_ndarray(format="yuv420p"))
    return Pictures(np.stack(planes), Fraction(_PROCEDURAL_FPS))


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Noise of natural images' spectrum, float32 (height, width), zero mean, unit deviation."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    amplitude = 1 / np.maximum(frequency, 1 / max(height, width))
    picture = np.fft.irfft2(amplitude * np.exp(2j * np.pi * rng.random(amplitude.shape)), (height, width))
    return ((picture - picture.mean()) / picture.std()).astype(np.float32)


def video_pictures(video: Path, *, seconds: float, short_side: int) -> Pictures:
    """Read a stretch from the middle of a video, as the chunker would see it.

    Args:
        video: the file.
        seconds: length; a shorter video gives what it has.
        short_side: short side in pixels, a multiple of 16.

    Raises:
        UserError: when the video cannot be read.
    """
    try:
        with open_video(video) as (container, stream):
            rate = stream.average_rate or stream.guessed_rate or Fraction(_PROCEDURAL_FPS)
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
        raise UserError(f"--videos: {video} holds fewer than two pictures; give a video")
    return Pictures(np.stack(planes), _plain_rate(rate))


def _plain_rate(rate: Fraction) -> Fraction:
    """Return the whole or NTSC rate nearest to a rate; averages over a file are a little off."""
    ntsc = Fraction(1000, 1001)
    near = (Fraction(max(round(rate), 1)), max(round(rate / ntsc), 1) * ntsc)
    return min(near, key=lambda plain: abs(plain - rate))


def cuts_gops(profile: ProfileName, chunk_seconds: float) -> bool:
    """Return whether chunks are so short that no GOP of the profile has its full length in them.

    Then such chunks behave unlike longer ones, and must be encoded to know how.

    Args:
        profile: the profile.
        chunk_seconds: length of the chunks.
    """
    return chunk_seconds * _LEAST_FPS < PROFILES[profile].gop


def encode_samples(pictures: Pictures, tasks: Sequence[tuple[ProfileName, float, Path]], *, name: str) -> None:
    """Encode a stretch of video in several ways at once, a core each.

    Args:
        pictures: the stretch.
        tasks: (profile, seconds of a chunk, chunk folder) of each way.
        name: of the video inside the chunk folders.
    """
    # Encoders release the interpreter's lock, so threads suffice and share the pictures.
    with ThreadPoolExecutor(available_cores()) as threads:
        for done in [threads.submit(_encode, pictures, *task, name=name) for task in tasks]:
            done.result()


def _encode(pictures: Pictures, profile: ProfileName, chunk_seconds: float, root: Path, *, name: str) -> None:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    size = max(min(round(chunk_seconds * pictures.fps), len(pictures.planes)), 2)
    for number in range(len(pictures.planes) // size):
        planes = pictures.planes[number * size : (number + 1) * size]
        frames = (av.VideoFrame.from_ndarray(picture, format="yuv420p") for picture in planes)
        write_chunk(
            folder / f"{number * chunk_seconds:g}.mp4", frames, profile=PROFILES[profile], fps=pictures.fps
        )


def link_some_chunks(folder: Path, scratch: Path, *, count: int = 32) -> Path:
    """Make a folder of links to chunks chosen at random, so that a large folder need not be probed.

    Args:
        folder: a chunk folder of any size.
        scratch: where the new folder is made.
        count: chunks, at most.

    Returns:
        The new folder.

    Raises:
        UserError: when the folder is missing or holds no chunk.
    """
    files = find_chunk_files(folder)
    chosen = np.random.default_rng(0).permutation(len(files))[:count]
    for number in chosen.tolist():
        video, _, path = files[number]
        link = scratch / "links" / video / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    return scratch / "links"


def write_sample_manifest(
    chunk_root: Path, folder: Path, *, clip_seconds: float, chunk_seconds: float | None = None
) -> Manifest:
    """Index chunks and make a manifest of clips at random places, some across chunk borders.

    Args:
        chunk_root: folder of chunks; few, since all are probed.
        folder: where the manifest goes.
        clip_seconds: length of a clip's span.
        chunk_seconds: length of the chunks they stand for, which decides how many clips cross a border; by
            default their own.

    Returns:
        The opened manifest.

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
    copies = [int(clip_seconds / _seconds(chunk)) + 2 for chunk in chunks]
    rows = [
        replace(chunk, video=f"{number:06d}", start_s=copy * _seconds(chunk))
        for number, chunk in enumerate(chunks)
        for copy in range(copies[number])
    ]
    first_rows = np.cumsum([0, *copies]).tolist()
    lengths = [_seconds(chunk) for chunk in chunks]
    samples = (
        replace(sample, first_chunk=first_rows[sample.first_chunk])
        for sample in _draw_samples(lengths, clip_seconds, chunk_seconds)
    )
    write_manifest(folder, chunk_root=chunk_root, chunks=rows, samples=samples)
    return Manifest(folder)


def _draw_samples(
    lengths: Sequence[float], clip_seconds: float, chunk_seconds: float | None
) -> Iterator[Sample]:
    """Draw clips that begin in the first copy of a chunk; `first_chunk` is the chunk's number."""
    rng = np.random.default_rng(0)
    for number in rng.integers(len(lengths), size=CLIPS).tolist():
        length = lengths[number]
        # Clips begin anywhere; those that begin in the last `clip_seconds` of a chunk cross its border.
        crosses = rng.random() < clip_seconds / (chunk_seconds or length) or clip_seconds >= length
        low, high = (max(length - clip_seconds, 0), length) if crosses else (0, length - clip_seconds)
        start = float(rng.uniform(low, high))
        touched = max(math.ceil((start + clip_seconds) / length), 1)
        yield Sample(number, touched, start, start + clip_seconds, ("a clip",), (_TOKENS,))


def _seconds(chunk: Chunk) -> float:
    return chunk.end_s - chunk.start_s


@dataclass(frozen=True)
class ChunkFigures:
    """Averages over the chunks of a manifest.

    Args:
        chunk_seconds: mean length.
        mbit_per_s: mean bit rate in 10^6 bits per second.
        bytes_per_hour: of video, packet index included.
    """

    chunk_seconds: float
    mbit_per_s: float
    bytes_per_hour: float


def chunk_figures(manifest: Manifest) -> ChunkFigures:
    """Average over some chunks of a manifest.

    Args:
        manifest: of any size.
    """
    rows = np.random.default_rng(0).permutation(manifest.num_chunks)[:CLIPS]
    chunks = [manifest.chunk(row) for row in rows.tolist()]
    seconds = sum(map(_seconds, chunks))
    num_bytes = sum(chunk.ref.size_bytes for chunk in chunks)
    index_bytes = sum(chunk.ref.index.num_bytes for chunk in chunks if chunk.ref.index)
    return ChunkFigures(
        chunk_seconds=seconds / len(chunks),
        mbit_per_s=num_bytes * 8 / seconds / 1e6,
        bytes_per_hour=(num_bytes + index_bytes) / seconds * 3600,
    )


def sample_requests(
    manifest: Manifest, *, num_frames: int, frame_size: int, count: int = CLIPS
) -> list[ClipRequest]:
    """Plan some training clips of a manifest.

    Args:
        manifest: of any size.
        num_frames: clip length T.
        frame_size: side of the output in pixels.
        count: clips, at most.
    """
    planner = Planner(manifest, ClipRules(num_frames, frame_size, training=True), seed=0)
    rows = np.random.default_rng(1).permutation(manifest.num_samples)[:count]
    return [planner.plan(row, epoch=0) for row in rows.tolist()]


def clip_needs(request: ClipRequest) -> ClipNeeds:
    """Count what a clip needs, from the packet index alone.

    Args:
        request: the clip; all its chunks have an index.

    Raises:
        UserError: when a chunk has none.
    """
    parts = [_part_needs(part) for part in request.parts]
    pictures, reads = sum((part[0] for part in parts), []), sum((part[1] for part in parts), [])
    return ClipNeeds(
        decoded=len(pictures),
        rendered=sum(len(part.frame_ids) for part in request.parts) * len(request.windows),
        picture_bytes=sum(pictures),
        reads=len(reads),
        read_bytes=sum(reads),
        chunk_bytes=sum(part.chunk.size_bytes for part in request.parts),
    )


def _part_needs(part: ClipPart) -> tuple[list[int], list[int]]:
    """Return the size of each coded picture, and of each read, those of the index included."""
    ref = part.chunk.index
    if ref is None:
        raise UserError(f"{part.chunk.path} has no packet index; chunk it with `avion-dali chunk`")
    pictures: list[int] = []
    reads: list[int] = []
    with open(ref.path, "rb", buffering=0) as file:

        def read(start: int, count: int) -> bytes:
            data = os.pread(file.fileno(), min(count, ref.num_bytes - start), ref.offset + start)
            reads.append(len(data))
            return data

        index = PacketIndex(read)
        for number, members in groupby(part.frame_ids, key=index.block_of):
            block = index.block(number)
            local = [frame_id - block.first_frame for frame_id in members]
            for run in drop_unneeded(plan_runs(block.table, local), block.table):
                positions = np.array(run.positions)
                starts, sizes = block.places.offset[positions], block.places.size[positions]
                pictures += sizes.tolist()
                # Neighbours in the file are read at once.
                apart = np.flatnonzero(starts[1:] != (starts + sizes)[:-1]) + 1
                reads += [int(group.sum()) for group in np.split(sizes, apart)]
    return pictures, reads
