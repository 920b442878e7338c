"""The videos of benchmarks and tests, generated without a network and always identical.

python -m benchmarks.media [--output media] [--seconds 15]

Each video is a textured scene with objects on it, seen by a moving camera past two hands, with changing light
and sensor noise. Motion and noise of the head-mounted ones are set so that the chunk profile `compat` (x264's
defaults at 288 lines) needs 60 to 100 kB per second, as such footage does: 69 and 70. The hand-held video needs
41, that from a tripod 27. Real videos take part where `--extra-videos FOLDER` or the environment variable
AVION_EXTRA_VIDEOS names a folder of them.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from avion_dali.cores import available_cores
from avion_dali.data.chunking import ChunkSettings, chunk_videos
from avion_dali.data.probe import probe_chunk
from avion_dali.files import whole_or_absent
from benchmarks.machine import ROOT
from benchmarks.report import Benchmark, Row, markdown, parser_of, working_folder

FPS = 30
MEDIA = ROOT / "media"
NEARLY_LOSSLESS = {"preset": "veryfast", "crf": "10"}  # of x264
EXTRA_VARIABLE = "AVION_EXTRA_VIDEOS"
VIDEO_ENDINGS = (".mp4", ".mov", ".mkv", ".webm", ".avi")
COMPAT_KB_PER_S = (60, 100)  # of head-mounted footage at 288 lines
_MARGIN = 2.0  # of a world around the picture, in pictures


@dataclass(frozen=True)
class Scene:
    """Content of a scene and movement of its camera."""

    seed: int  # of textures, objects and motion
    sway: float  # distance of slow pans from the middle, in picture heights
    bounce: float  # distance of the quick movement of steps, in picture heights
    roll: float  # largest rotation in radians
    zoom: float  # largest change of scale
    hands: float  # how far the hands move, in picture heights
    noise: float  # standard deviation of the sensor noise in levels of 255


SCENES = {
    "head_mounted_0": Scene(0, sway=0.8, bounce=0.05, roll=0.15, zoom=0.2, hands=0.25, noise=5.0),
    "head_mounted_1": Scene(1, sway=0.9, bounce=0.04, roll=0.12, zoom=0.25, hands=0.3, noise=5.0),
    "hand_held": Scene(2, sway=0.25, bounce=0.01, roll=0.03, zoom=0.05, hands=0.15, noise=3.0),
    "still": Scene(3, sway=0.0, bounce=0.0, roll=0.0, zoom=0.0, hands=0.2, noise=3.0),
}


def pictures(scene: Scene, frames: int, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Yield the pictures of a scene.

    Args:
        scene: what is filmed.
        frames: number of pictures, `FPS` per second.
        size: (width, height) in pixels.

    Yields:
        uint8 (H, W, 3), RGB.
    """
    rng = np.random.default_rng(scene.seed)
    width, height = size
    world_HWC = _world(rng, size)
    hand_HWC = _texture(rng, (height, height), contrast=0.5) + np.float32([40, 10, -10])
    paths = _paths(rng, frames)
    for frame in range(frames):
        pan, step, turn, scale, reach, light = paths[:, frame]
        moved = height * (scene.sway * pan + scene.bounce * step)
        roll, zoom = scene.roll * turn[0], 1 + scene.zoom * scale[0]
        picture_HWC = _view(world_HWC, size, moved=moved, roll=roll, zoom=zoom)
        for number, shift in enumerate(reach):
            _put_hand(picture_HWC, hand_HWC, scene.hands * shift, is_right=bool(number))
        picture_HWC += 6 * light[0] + scene.noise * rng.standard_normal((height, width, 3), dtype=np.float32)
        yield np.clip(picture_HWC, 0, 255).astype(np.uint8)


def _paths(rng: np.random.Generator, frames: int) -> np.ndarray:
    """Smooth movements between about -1 and 1: pan, steps, roll, zoom, hands and light, float32 (6, F, 2)."""
    seconds = np.arange(frames) / FPS
    slowest = np.array([0.12, 1.4, 0.2, 0.1, 0.35, 0.05])[:, None, None, None]  # Hz
    rates = slowest * rng.uniform(0.7, 2.2, (6, 1, 2, 4))
    phases = rng.uniform(0, 2 * np.pi, (6, 1, 2, 4))
    return (
        np.sin(2 * np.pi * rates * seconds[None, :, None, None] + phases).mean(axis=-1).astype(np.float32) * 1.6
    )


def _world(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A large textured surface with objects on it, float32 (H, W, 3)."""
    width, height = size
    shape = (round(height * (1 + _MARGIN)), width + round(height * _MARGIN))
    world_HWC = _texture(rng, shape, contrast=1.0)
    for _ in range(150):
        center = rng.uniform(0, shape[0]), rng.uniform(0, shape[1])
        half_y, half_x = rng.uniform(0.03, 0.18, 2) * height
        power = int(rng.choice([2, 8]))  # ellipses and boxes
        grey, tint = rng.uniform(-70, 70), rng.uniform(-25, 25, 3)
        part_HWC, inside = _ellipse(world_HWC, center, (half_y, half_x), power=power)
        part_HWC[inside] = 0.5 * part_HWC[inside] + 64 + grey + tint.astype(np.float32)
    return world_HWC


def _texture(rng: np.random.Generator, shape: tuple[int, int], *, contrast: float) -> np.ndarray:
    """Detail at every scale around grey, mostly of brightness, as photographs have; float32 (H, W, 3)."""
    found = np.full((*shape, 3), 128, np.float32)
    for scale in (2, 4, 8, 16, 32, 64):
        coarse = rng.standard_normal((shape[0] // scale + 2, shape[1] // scale + 2, 3), dtype=np.float32)
        coarse = 0.25 * coarse + 0.75 * coarse[..., :1]
        found += contrast * 11 * scale**0.3 * _enlarged(coarse, shape, scale)
    return found


def _enlarged(coarse_HWC: np.ndarray, shape: tuple[int, int], scale: int) -> np.ndarray:
    """Interpolate linearly, first down then across."""
    for axis in (0, 1):
        at = np.arange(shape[axis], dtype=np.float32) / scale
        low = at.astype(np.intp)
        share = (at - low).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        first, second = np.take(coarse_HWC, low, axis), np.take(coarse_HWC, low + 1, axis)
        coarse_HWC = first + share * (second - first)
    return coarse_HWC


def _view(
    world_HWC: np.ndarray, size: tuple[int, int], *, moved: np.ndarray, roll: float, zoom: float
) -> np.ndarray:
    """What a camera over the world sees, interpolated linearly; float32 (H, W, 3).

    The lower part of the picture is nearer and moves by up to half more than the upper part.
    """
    width, height = size
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    y, x = (y - height / 2) / zoom, (x - width / 2) / zoom
    cos, sin = np.cos(roll), np.sin(roll)
    nearness = 1 + 0.5 * y / height
    at_x = np.clip(world_HWC.shape[1] / 2 + moved[0] * nearness + cos * x - sin * y, 0, world_HWC.shape[1] - 2)
    at_y = np.clip(world_HWC.shape[0] / 2 + moved[1] * nearness + sin * x + cos * y, 0, world_HWC.shape[0] - 2)
    left, top = at_x.astype(np.intp), at_y.astype(np.intp)
    across, down = (at_x - left)[..., None], (at_y - top)[..., None]
    pixels = world_HWC.reshape(-1, 3)
    first = top * world_HWC.shape[1] + left
    a, b = pixels[first], pixels[first + 1]
    c, d = pixels[first + world_HWC.shape[1]], pixels[first + world_HWC.shape[1] + 1]
    upper, lower = a + across * (b - a), c + across * (d - c)
    return upper + down * (lower - upper)


def _put_hand(picture_HWC: np.ndarray, hand_HWC: np.ndarray, shift: float, *, is_right: bool) -> None:
    """Cover a part of the picture by a textured ellipse that reaches in from below."""
    height, width = picture_HWC.shape[:2]
    center = height * (0.95 + shift), width * (0.68 if is_right else 0.3) + height * shift * 0.8
    part_HWC, inside = _ellipse(picture_HWC, center, (0.4 * height, 0.17 * height))
    rows, columns = np.nonzero(inside)
    part_HWC[rows, columns] = hand_HWC[rows, columns]


def _ellipse(
    image_HWC: np.ndarray, center: tuple[float, float], half: tuple[float, float], *, power: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """The part of an image around an ellipse, a view, and which of its pixels lie inside, bool (h, w)."""
    low = [max(0, int(c - h)) for c, h in zip(center, half, strict=True)]
    high = [max(0, int(c + h) + 2) for c, h in zip(center, half, strict=True)]
    part_HWC = image_HWC[low[0] : high[0], low[1] : high[1]]
    y, x = np.ogrid[low[0] : low[0] + part_HWC.shape[0], low[1] : low[1] + part_HWC.shape[1]]
    distance = np.abs((y - center[0]) / half[0]) ** power + np.abs((x - center[1]) / half[1]) ** power
    return part_HWC, distance < 1


def write_video(
    path: Path,
    scene: Scene,
    *,
    frames: int,
    size: tuple[int, int] = (512, 288),
    codec: str = "libx264",
    options: Mapping[str, str] = NEARLY_LOSSLESS,
    muxing: Mapping[str, str] = {},
) -> Path:
    """Encode a scene; an existing file is kept.

    Args:
        path: of the file; its ending is FFmpeg's name of the container, such as `mp4` or `webm`.
        scene: what is filmed.
        frames: number of pictures.
        size: (width, height) in pixels, both even.
        codec: FFmpeg's name of the encoder.
        options: of the encoder.
        muxing: options of the container.

    Returns:
        The path.
    """
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    opened = {"format": path.suffix[1:], "options": dict(muxing)}
    with whole_or_absent(path) as partial, av.open(str(partial), "w", **opened) as container:
        stream = container.add_stream(codec, rate=FPS, options=dict(options))
        assert isinstance(stream, VideoStream)
        stream.width, stream.height = size
        stream.pix_fmt, stream.thread_count = "yuv420p", 1
        for rgb_HWC in pictures(scene, frames, size):
            container.mux(stream.encode(VideoFrame.from_ndarray(rgb_HWC, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def write_media(folder: Path = MEDIA, *, seconds: int = 15) -> list[Path]:
    """Write the videos of all scenes in parallel; existing files are kept."""
    paths = [folder / f"{name}_{seconds}s.mp4" for name in SCENES]
    write = partial(write_video, frames=seconds * FPS)
    with ProcessPoolExecutor(available_cores(), mp_context=get_context("spawn")) as pool:
        return list(pool.map(write, paths, SCENES.values()))


def extra_videos(folder: Path | None = None) -> tuple[list[Path], list[Row]]:
    """Find additional real videos.

    Args:
        folder: of `--extra-videos`; None takes that of the environment variable.

    Returns:
        The videos, and a row that says so when there are none.
    """
    named = folder or (Path(os.environ[EXTRA_VARIABLE]) if os.environ.get(EXTRA_VARIABLE) else None)
    found = sorted(p for p in named.iterdir() if p.suffix.lower() in VIDEO_ENDINGS) if named else []
    if found:
        return found, []
    reason = f"no video in {named}" if named else f"neither --extra-videos nor {EXTRA_VARIABLE} names a folder"
    return [], [{"measured": "skipped", "what": "extra videos", "reason": reason}]


def add_video_options(parser: argparse.ArgumentParser) -> None:
    """Add options for videos and a folder of derived files."""
    parser.add_argument(
        "--videos", type=Path, nargs="+", help=f"measure these instead of those of {MEDIA.name}/"
    )
    parser.add_argument(
        "--extra-videos", type=Path, metavar="FOLDER", help=f"and these (default: {EXTRA_VARIABLE})"
    )
    parser.add_argument("--folder", type=Path, help="keep what is made here; by default it is removed")


def measure_videos(
    benchmark: Benchmark, options: argparse.Namespace, measure: Callable[[list[Path], Path], list[Row]]
) -> None:
    """Run a benchmark on the videos that a command line chose.

    Args:
        benchmark: which.
        options: of a parser with `add_video_options`.
        measure: (videos, folder for what is made of them) to rows.
    """

    def measure_chosen() -> list[Row]:
        extra, skipped = extra_videos(options.extra_videos)
        with working_folder(options.folder) as folder:
            return [*measure([*(options.videos or write_media()), *extra], folder), *skipped]

    benchmark.run(options, measure_chosen)


def describe(videos: list[Path], folder: Path) -> list[Row]:
    """Chunk videos as `compat` and return their bit rates."""
    low, high = COMPAT_KB_PER_S
    report = chunk_videos(videos, folder, settings=ChunkSettings(profile="compat"), progress=False)
    if report.failed:
        raise RuntimeError(f"{report.failed[0].video}: {report.failed[0].failed}")
    rows = []
    for video in videos:
        facts = probe_chunk(folder / video.name / "0.mp4")
        kb_per_s = facts.size_bytes / 1000 / facts.num_frames * FPS
        row: Row = {"measured": "video", "source": video.stem, "size": f"{facts.width}x{facts.height}"}
        row |= {"source_mb": video.stat().st_size / 1e6, "compat_kb_per_s": kb_per_s}
        rows.append(row | {"as_head_mounted_footage": low <= kb_per_s <= high})
    return rows


def tables(rows: list[Row]) -> str:
    """Return a table of the videos."""
    columns = ("source", "size", "source_mb", "compat_kb_per_s", "as_head_mounted_footage")
    heads = ("video", "chunk", "source, MB", "`compat`, kB/s", "60 to 100 kB/s")
    lines = ([row[name] for name in columns] for row in rows if row["measured"] == "video")
    return markdown(heads, lines)


BENCHMARK = Benchmark("media", tables)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--output", type=Path, default=MEDIA, help="folder (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=15, help="length of each")
    parser.add_argument("--extra-videos", type=Path, metavar="FOLDER", help=f"besides (or {EXTRA_VARIABLE})")
    options = parser.parse_args()

    def measure() -> list[Row]:
        extra, skipped = extra_videos(options.extra_videos)
        with working_folder(None) as folder:
            return [
                *describe([*write_media(options.output, seconds=options.seconds), *extra], folder),
                *skipped,
            ]

    BENCHMARK.run(options, measure)


if __name__ == "__main__":
    main()
