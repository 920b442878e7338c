"""Chunk folders and chunk tables for tests: real tiny files, or rows whose files nobody opens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import make_videos
import numpy as np

from avion_dali.contracts import ChunkRef, PacketIndexRef
from avion_dali.data.manifest import Chunk, Sample, write_manifest
from avion_dali.data.manifest_files import ManifestFiles
from avion_dali.data.probe import probe_chunk

NTSC_30, NTSC_60 = Fraction(30_000, 1001), Fraction(60_000, 1001)


def stored_file(manifest: Path, name: str) -> Path:
    """Where a file of a manifest lies, such as `samples.arrow`."""
    return ManifestFiles(manifest, json.loads((manifest / "manifest.json").read_text())).path(name)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def chunk_row(
    video: str,
    start_s: float,
    *,
    num_frames: int = 450,
    fps: Fraction | int = 30,
    size: tuple[int, int] = (320, 256),
    frame_times: np.ndarray | None = None,
    root: str = "/chunks",
) -> Chunk:
    """A chunk table row whose file does not exist."""
    ref = ChunkRef(f"{root}/{video}/{start_s:g}.mp4", 100_000, num_frames, *size)
    return Chunk(ref, video, float(start_s), Fraction(fps), "h264", frame_times)


def chunk_rows(video: str, frame_counts: Sequence[int], *, fps: Fraction | int, step: int = 15) -> list[Chunk]:
    """Consecutive rows of one video, `step` seconds apart."""
    return [chunk_row(video, i * step, num_frames=n, fps=fps) for i, n in enumerate(frame_counts)]


def sample_row(start_s: float, end_s: float, *, first: int = 0, count: int = 1, text: str = "cut") -> Sample:
    return Sample(first, count, float(start_s), float(end_s), (text,), ((49406, len(text), 49407),))


def write_random_manifest(folder: Path, *, num_samples: int, seed: int = 0) -> Path:
    """A manifest of spans of many lengths over 15 s chunks of four frame rates, some across borders."""
    rng = np.random.default_rng(seed)
    chunks = [
        row
        for video, fps, counts in (
            ("a", Fraction(25), (375, 375, 374)),
            ("b", NTSC_30, (450, 450, 449)),
            ("c", Fraction(30), (450, 450, 450)),
            ("d", NTSC_60, (900, 899, 899)),
        )
        for row in chunk_rows(video, counts, fps=fps)
    ]
    samples = []
    for _ in range(num_samples):
        video, start = int(rng.integers(4)), float(rng.uniform(0, 43))
        end = min(start + float(rng.exponential(3.0)), 44.5)
        first, last = int(start // 15), max(int(np.ceil(end / 15)) - 1, int(start // 15))
        samples.append(sample_row(start, end, first=3 * video + first, count=last - first + 1))
    write_manifest(folder, chunk_root="/chunks", chunks=chunks, samples=samples)
    return folder


def make_chunk_file(folder: Path) -> Path:
    """One second of real video, 30 frames of 64x48, whose index lies before its data."""
    return make_videos.write_video(
        folder / "one_second.mp4", frames=30, size=(64, 48), container_options={"movflags": "faststart"}
    )


def indexed_chunk(path: Path, folder: Path) -> ChunkRef:
    """A chunk with its packet index, which is written to a file of its own in `folder`."""
    facts = probe_chunk(path, index=True)
    assert facts.packet_index
    record = folder / f"{path.name}.index"
    record.write_bytes(facts.packet_index)
    index = PacketIndexRef(str(record), 0, len(facts.packet_index))
    return ChunkRef(str(path), facts.size_bytes, facts.num_frames, facts.width, facts.height, index)


def copy_chunks(source: Path, root: Path, videos: Mapping[str, Sequence[int]]) -> Path:
    """Lay out `<root>/<video>/<second>.mp4` from one real chunk file."""
    for video, seconds in videos.items():
        (root / video).mkdir(parents=True, exist_ok=True)
        for second in seconds:
            shutil.copyfile(source, root / video / f"{second}.mp4")
    return root
