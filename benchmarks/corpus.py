"""Chunks and manifests for benchmarks, made from videos by the project's chunker, and clips of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from avion_dali.contracts import ChunkRef, ClipPart, ClipRequest, PacketIndexRef
from avion_dali.data.chunking import ChunkSettings, chunk_videos
from avion_dali.data.crops import random_resized_window
from avion_dali.data.frames import segment_frame_ids
from avion_dali.data.manifest import IndexWriter, Manifest, Sample, write_manifest
from avion_dali.data.planner import ClipRules
from avion_dali.data.probe import probe_chunk
from avion_dali.data.profiles import ProfileName
from avion_dali.data.scanning import scan_chunks
from benchmarks.media import FPS

START_TOKEN, END_TOKEN = 49406, 49407


@dataclass(frozen=True)
class ClipKind:
    """The length and span of a clip."""

    name: str  # as tables show it
    num_frames: int  # clip length T
    seconds: float  # the span it is drawn from

    def rules(self, frame_size: int = 224) -> ClipRules:
        """Training clips of this kind: jittered frames, random-resized crops."""
        return ClipRules(self.num_frames, frame_size, training=True)


FOUR = ClipKind("4 frames of 1 s", 4, 1.0)
SIXTEEN = ClipKind("16 frames of 3 s", 16, 3.0)
# One frame drawn from each four of 64, as AVION draws VideoMAE's 16 frames at stride 4.
STRIDED = ClipKind("16 frames at stride 4", 16, 64 / FPS)
CLIP_KINDS = (FOUR, SIXTEEN, STRIDED)


def chunk_sources(videos: Sequence[Path], folder: Path, profile: ProfileName, *, short_side: int = 288) -> Path:
    """Cut videos into 15-second chunks of a profile.

    Raises:
        RuntimeError: when a video cannot be chunked.
    """
    settings = ChunkSettings(profile=profile, short_side=short_side)
    report = chunk_videos(videos, folder, settings=settings, progress=False)
    if report.failed:
        raise RuntimeError(f"{report.failed[0].video}: {report.failed[0].failed}")
    return folder


def repeat_chunk(source: Path, target: Path, times: int) -> None:
    """Write a chunk's packets repeatedly into one long file with the same pictures and bit rate."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(source)) as short, av.open(str(target), "w", options={"movflags": "+faststart"}) as long:
        own = short.streams.video[0]
        stream = long.add_stream_from_template(own)
        for packet in (packet for number in range(times) for packet in _played_again(short, own, number)):
            packet.stream = stream
            long.mux(packet)


def _played_again(container: InputContainer, stream: VideoStream, number: int) -> Iterator[Packet]:
    """Return a file's packets, with times shifted by a number of repetitions."""
    container.seek(0)
    for packet in container.demux(stream):
        if packet.dts is not None and packet.pts is not None and packet.time_base is not None:
            played = number * round(stream.frames / FPS / packet.time_base)
            packet.dts += played
            packet.pts += played
            yield packet


def kind_manifest(chunks: Path, folder: Path, kind: ClipKind, *, samples: int = 400, seed: int = 0) -> Manifest:
    """Index a chunk folder and write a manifest of clips at random places of random chunks; then open it."""
    rng = np.random.default_rng(seed)
    with IndexWriter(folder) as index:
        found, unusable = scan_chunks(chunks, jobs=1, index=index)
        if unusable:
            raise RuntimeError(f"{unusable[0].path}: {unusable[0].reason}")
        index.finish()
    rows = []
    for number in range(samples):
        chunk = int(rng.integers(len(found)))
        latest = max(float(found[chunk].ref.num_frames / found[chunk].fps) - kind.seconds, 0)
        start = found[chunk].start_s + float(rng.uniform(0, latest))
        tokens = (START_TOKEN, *rng.integers(1, 40_000, 5).tolist(), END_TOKEN)
        rows.append(Sample(chunk, 1, start, start + kind.seconds, (f"clip {number}",), (tokens,)))
    write_manifest(folder, chunk_root=chunks, chunks=found, samples=rows)
    return Manifest(folder)


def mbit_per_s(manifest: Manifest) -> float:
    """Bit rate of a manifest's chunks."""
    chunks = [manifest.chunk(row) for row in range(manifest.num_chunks)]
    seconds = sum(chunk.ref.num_frames / chunk.fps for chunk in chunks)
    return sum(c.ref.size_bytes for c in chunks) * 8 / float(seconds or Fraction(1)) / 1e6


def write_chunks(
    videos: Sequence[Path], folder: Path, profiles: Sequence[str], *, short_side: int = 288
) -> dict[tuple[str, str], ChunkRef]:
    """Cut videos into chunks of every profile and index the first chunk of each.

    Args:
        videos: no two of one name.
        folder: where chunks go; those that are there are kept.
        profiles: names of encode profiles.
        short_side: of the pictures in pixels.

    Returns:
        The chunks by (video, profile).
    """
    found = {}
    for profile in profiles:
        chunk_sources(videos, folder / profile, profile, short_side=short_side)  # type: ignore[arg-type]
        for video in videos:
            found[video.stem, profile] = indexed_chunk(folder / profile / video.name / "0.mp4")
    return found


def indexed_chunk(path: Path) -> ChunkRef:
    """Probe a file and write its packet index beside it."""
    facts = probe_chunk(path, index=True)
    index = path.with_suffix(".packets")
    index.write_bytes(facts.packet_index)
    ref = PacketIndexRef(str(index), 0, len(facts.packet_index))
    return ChunkRef(str(path), facts.size_bytes, facts.num_frames, facts.width, facts.height, ref)


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
        while len(set(ids.tolist())) < kind.num_frames:  # not every library can return a frame twice
            ids = segment_frame_ids(start, start + span, kind.num_frames, rng)
        window = random_resized_window(
            chunk.width, chunk.height, scale=rules.crop_scale, ratio=rules.crop_ratio, rng=rng
        )
        part = ClipPart(chunk, tuple(ids.tolist()))
        gather = tuple(range(kind.num_frames))
        drawn.append(ClipRequest(number, 0, (part,), gather, (window,), (False,), frame_size))
    return drawn
