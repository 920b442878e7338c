"""Chunk folders and manifests to load from, made of procedural or given videos by the project's own chunker."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from avion_dali.data.chunking import ChunkSettings, chunk_videos
from avion_dali.data.manifest import IndexWriter, Manifest, Sample, write_manifest
from avion_dali.data.planner import ClipRules
from avion_dali.data.profiles import ProfileName
from avion_dali.data.scanning import scan_chunks
from avion_dali.files import whole_or_absent

FPS = 30
START_TOKEN, END_TOKEN = 49406, 49407


@dataclass(frozen=True)
class ClipKind:
    """What a clip asks of its chunk.

    Args:
        name: as tables show it.
        num_frames: clip length T.
        seconds: the span it is drawn from.
    """

    name: str
    num_frames: int
    seconds: float

    def rules(self, frame_size: int = 224) -> ClipRules:
        """Training clips of this kind: jittered frames, random-resized crops."""
        return ClipRules(self.num_frames, frame_size, training=True)


FOUR = ClipKind("4 frames of 1 s", 4, 1.0)
SIXTEEN = ClipKind("16 frames of 3 s", 16, 3.0)
# One frame drawn from each four of 64, as AVION draws VideoMAE's 16 frames at stride 4.
STRIDED = ClipKind("16 frames at stride 4", 16, 64 / FPS)
CLIP_KINDS = (FOUR, SIXTEEN, STRIDED)


@dataclass(frozen=True)
class SourceSettings:
    """The procedural videos.

    Args:
        videos: how many.
        seconds: length of each.
        size: (width, height) in pixels, multiples of 16.
    """

    videos: int = 2
    seconds: int = 15
    size: tuple[int, int] = (512, 288)


def write_sources(folder: Path, settings: SourceSettings) -> list[Path]:
    """Write the procedural videos, nearly lossless; those that are there are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"hand_held_{seed}.mp4" for seed in range(settings.videos)]
    for seed, path in enumerate(paths):
        if not path.exists():
            _write_source(path, settings, seed)
    return paths


def hand_held_pictures(frames: int, size: tuple[int, int], *, seed: int) -> Iterator[np.ndarray]:
    """Yield pictures about as hard to encode as hand-held video, uint8 (H, W, 3) RGB.

    A scene under a moving camera, a fainter one that moves the other way (what motion search cannot
    predict), and sensor noise.
    """
    rng = np.random.default_rng(seed)
    width, height = size
    scene = _texture(rng, (max(size) + 200, max(size) + 200))
    noise = rng.normal(0, 4, (height, width, 3))
    for frame in range(frames):
        y, x = (int(100 + 99 * f(frame / 20)) for f in (np.sin, np.cos))
        near = scene[y : y + height, x : x + width]
        far = scene[x : x + height, y : y + width]
        shift = tuple(rng.integers(0, (height, width)))
        picture = 0.9 * near + 0.1 * far + np.roll(noise, shift, axis=(0, 1))
        yield np.clip(picture, 0, 255).astype(np.uint8)


def _texture(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Noise at five scales, (H, W, 3) around 128, as photographs have detail at every scale."""
    height, width = size
    layers = []
    for scale in (4, 8, 16, 32, 64):
        coarse = rng.normal(0, 5 * scale**0.4, (height // scale + 1, width // scale + 1, 3))
        layers.append(np.kron(coarse, np.ones((scale, scale, 1)))[:height, :width])
    return 128 + np.sum(layers, axis=0)


def _write_source(path: Path, settings: SourceSettings, seed: int) -> None:
    with whole_or_absent(path) as partial, av.open(str(partial), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "ultrafast", "crf": "8"})
        assert isinstance(stream, VideoStream)
        stream.width, stream.height = settings.size
        stream.pix_fmt, stream.thread_count = "yuv420p", 1
        for rgb_HWC in hand_held_pictures(settings.seconds * FPS, settings.size, seed=seed):
            container.mux(stream.encode(VideoFrame.from_ndarray(rgb_HWC, format="rgb24")))
        container.mux(stream.encode(None))


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


def multiply_chunks(folder: Path, copies: int) -> None:
    """Give every chunk more names (hard links), so that a small corpus has as many files as a large one."""
    for path in sorted(folder.glob("*/*.mp4")):
        for copy in range(copies):
            twin = folder / "copies" / f"{path.parent.name}_{copy:04d}" / path.name
            twin.parent.mkdir(parents=True, exist_ok=True)
            if not twin.exists():
                os.link(path, twin)


def repeat_chunk(source: Path, target: Path, times: int) -> None:
    """Write a chunk's packets several times in a row: a long file with a short one's pictures and bit rate."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(source)) as short, av.open(str(target), "w", options={"movflags": "+faststart"}) as long:
        own = short.streams.video[0]
        stream = long.add_stream_from_template(own)
        for packet in (packet for number in range(times) for packet in _played_again(short, own, number)):
            packet.stream = stream
            long.mux(packet)


def _played_again(container: InputContainer, stream: VideoStream, number: int) -> Iterator[Packet]:
    """A file's packets, timed as if the file had been played so many times before."""
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
    return round(sum(c.ref.size_bytes for c in chunks) * 8 / float(seconds or Fraction(1)) / 1e6, 2)
