"""Sound chunks, folders and manifests of them, and ways to harm them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import av
import make_videos
from chunk_folders import sample_row

from avion_dali.data.manifest import IndexWriter, Manifest, write_manifest
from avion_dali.data.scanning import scan_chunks
from avion_dali.inspection.findings import Target

BT601 = {"colorspace": 6, "color_range": 1}
BROKEN_LENGTH = b"\xff\xff\xff\xff"  # of a NAL unit, so that no decoder can read on


def make_sound(folder: Path) -> Path:
    """40 frames that nothing can be said against, with B-frames and a keyframe every ten."""
    options = {"movflags": "faststart"}
    return make_videos.write_video(
        folder / "0.mp4", frames=40, size=(64, 48), gop=10, container_options=options, **BT601
    )


def lay_out(sound: Path, root: Path, count: int = 3) -> Path:
    """A folder of `count` copies, one second apart, of one video."""
    (root / "video").mkdir(parents=True)
    for i in range(count):
        shutil.copyfile(sound, root / "video" / f"{i}.mp4")
    return root


def build(chunks: Path, folder: Path, *, index: bool = True) -> Path:
    """A manifest with a clip in each chunk and one across each border."""
    with IndexWriter(folder) as writer:
        rows, unusable = scan_chunks(chunks, jobs=1, index=writer if index else None)
        writer.finish()
    assert not unusable
    samples = [sample_row(i, i + 0.9, first=i) for i in range(len(rows))]
    samples += [sample_row(i + 0.5, i + 1.5, first=i, count=2) for i in range(len(rows) - 1)]
    write_manifest(folder, chunk_root=chunks, chunks=rows, samples=samples)
    return folder


def target_of(manifest: Path, row: int = 0, *, deep: bool) -> Target:
    chunk = Manifest(manifest).chunk(row)
    return Target(chunk.ref.path, deep, chunk.ref, chunk.fps, chunk.frame_times is None)


def packets(path: Path) -> list[av.Packet]:
    """The coded pictures in decode order."""
    with av.open(str(path)) as container:
        return [packet for packet in container.demux(video=0) if packet.size]


def shown_as(path: Path, number: int) -> int:
    """Which frame a packet becomes."""
    times = [packet.pts for packet in packets(path)]
    return sorted(times).index(times[number])


def write_over(path: Path, number: int, data: bytes, *, at: int = 0) -> None:
    """Write into a coded picture, and leave the file's times alone."""
    position, before = packets(path)[number].pos, path.stat()
    with path.open("r+b") as file:
        file.seek(position + at)
        file.write(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
