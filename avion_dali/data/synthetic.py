"""A small procedural data set: videos of simple objects in motion, with a timed sentence for each motion.

It replaces narrated video where none can be downloaded. Twelve objects (four colors, three shapes) are combined
with six actions; four of the actions differ only in the direction of motion. The picture wraps around (objects
that leave on one side enter on the other), and the first picture of a motion is drawn before its action is
chosen, so a single picture does not reveal the direction by its position or appearance.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Literal, NoReturn

import av
import numpy as np
from av.video.stream import VideoStream

from avion_dali.contracts import UserError
from avion_dali.cores import available_cores
from avion_dali.data.probing_pool import map_in_processes
from avion_dali.files import whole_or_absent

Split = Literal["train", "heldout"]
_SPLIT_KEYS: dict[Split, int] = {"train": 0, "heldout": 1}

COLORS = {"red": (215, 45, 40), "green": (45, 170, 70), "blue": (50, 85, 220), "yellow": (235, 205, 50)}
SHAPES = ("ball", "cube", "ring")
# Action: direction in the picture (y points down), factor of size, phrases.
ACTIONS: dict[str, tuple[tuple[float, float], float, tuple[str, ...]]] = {
    "moves left": ((-1.0, 0.0), 1.0, ("moves left", "slides to the left", "goes left", "travels to the left")),
    "moves right": (
        (1.0, 0.0),
        1.0,
        ("moves right", "slides to the right", "goes right", "travels to the right"),
    ),
    "moves up": ((0.0, -1.0), 1.0, ("moves up", "rises", "goes up", "travels upwards")),
    "moves down": ((0.0, 1.0), 1.0, ("moves down", "sinks", "goes down", "travels downwards")),
    "grows": ((0.0, 0.0), 2.0, ("grows", "gets bigger", "becomes larger", "expands")),
    "shrinks": ((0.0, 0.0), 0.45, ("shrinks", "gets smaller", "becomes smaller", "contracts")),
}
ARTICLES = ("the", "a")


@dataclass(frozen=True)
class SyntheticSettings:
    """Size of the data set.

    Args:
        train_videos: number of videos for training.
        heldout_videos: number of videos for evaluation.
        seconds: length of a video in seconds.
        fps: frames per second.
        side: width and height in pixels, a multiple of 16.
        seed: determines all random choices.

    Raises:
        UserError: when a value is not allowed.
    """

    train_videos: int = 44
    heldout_videos: int = 8
    seconds: int = 60
    fps: int = 24
    side: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("train_videos", 1), ("heldout_videos", 1), ("fps", 4)):
            if getattr(self, name) < least:
                raise UserError(f"synthetic data: {name} = {getattr(self, name)!r} must be at least {least}")
        if self.seconds < 2:
            raise UserError(f"synthetic data: seconds = {self.seconds!r} must be at least 2")
        if self.side < 32 or self.side % 16:
            raise UserError(f"synthetic data: side = {self.side!r} must be a multiple of 16, at least 32")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"synthetic data: seed = {self.seed!r} must be in [0, 2^63)")


@dataclass(frozen=True)
class Annotation:
    """One row of an annotation file: a time span of a video with its text.

    Args:
        video: file name of the video.
        start: start in seconds, inclusive.
        end: end in seconds, exclusive.
        text: the sentence.
        verb: key of `ACTIONS`.
        noun: color and shape.
        label: class for recognition, which is the verb: distinguishing classes requires the motion.
    """

    video: str
    start: float
    end: float
    text: str
    verb: str
    noun: str
    label: str


@dataclass(frozen=True)
class SyntheticDataset:
    """The files that `make_videos` wrote to its folder.

    Args:
        videos: all video files.
        train_csv: annotations of the training videos.
        heldout_csv: annotations of the held-out videos.
        train: the rows of `train_csv`.
        heldout: the rows of `heldout_csv`.
    """

    videos: tuple[Path, ...]
    train_csv: Path
    heldout_csv: Path
    train: tuple[Annotation, ...]
    heldout: tuple[Annotation, ...]


@dataclass(frozen=True)
class Scene:
    """One motion. Lengths are fractions of the picture's side; only `verb` and `text` depend on the action.

    Args:
        frames: number of pictures.
        verb: key of `ACTIONS`.
        color: key of `COLORS`.
        shape: one of `SHAPES`.
        text: the sentence.
        tint: brightness factor of the color.
        place: center (x, y) in the first picture, in [0, 1).
        radius: radius in the first picture.
        travel: distance of a motion.
        drift: small motion (x, y) in addition to the action.
        swell: factor of a small change of size in addition to the action.
        backdrop: seed of the background.
    """

    frames: int
    verb: str
    color: str
    shape: str
    text: str
    tint: float
    place: tuple[float, float]
    radius: float
    travel: float
    drift: tuple[float, float]
    swell: float
    backdrop: int

    @property
    def noun(self) -> str:
        """The name of the object."""
        return f"{self.color} {self.shape}"


def make_videos(folder: Path, *, settings: SyntheticSettings | None = None, jobs: int = 0) -> SyntheticDataset:
    """Write the videos and `annotations_train.csv`, `annotations_heldout.csv`.

    The videos go to `folder/videos`. The same settings write the same bytes.

    Args:
        folder: folder to write; created if it does not exist.
        settings: size of the data set; None for the defaults.
        jobs: number of processes; 0 for one per core.

    Returns:
        Paths and annotations.
    """
    settings = settings or SyntheticSettings()
    videos = folder / "videos"
    videos.mkdir(parents=True, exist_ok=True)
    sizes: dict[Split, int] = {"train": settings.train_videos, "heldout": settings.heldout_videos}
    tasks = [(videos, settings, split, index) for split, size in sizes.items() for index in range(size)]
    workers = min(jobs or available_cores(), len(tasks))
    rows = list(map_in_processes(_write_video_task, tasks, jobs=workers, lost=_raise_loss))
    paths = tuple(videos / _video_name(split, index) for _, _, split, index in tasks)
    train = tuple(row for video_rows in rows[: settings.train_videos] for row in video_rows)
    heldout = tuple(row for video_rows in rows[settings.train_videos :] for row in video_rows)
    train_csv, heldout_csv = folder / "annotations_train.csv", folder / "annotations_heldout.csv"
    _write_csv(train_csv, train)
    _write_csv(heldout_csv, heldout)
    return SyntheticDataset(paths, train_csv, heldout_csv, train, heldout)


def plan_video(settings: SyntheticSettings, split: Split, *, index: int) -> list[Scene]:
    """Choose the motions of one video, in order; a pure function of its arguments.

    Args:
        settings: settings of the data set.
        split: part of the data set; videos of different parts share nothing.
        index: index of the video within its part.

    Returns:
        Scenes that fill the video exactly.
    """
    rng = np.random.Generator(np.random.Philox(key=[settings.seed, 2 * index + _SPLIT_KEYS[split]]))
    pairs = [(color, shape, verb) for color in COLORS for shape in SHAPES for verb in ACTIONS]
    left = settings.seconds * settings.fps
    scenes: list[Scene] = []
    while left > 0:
        if len(scenes) % len(pairs) == 0:
            order = rng.permutation(len(pairs))
        frames = round(float(rng.uniform(1.1, 1.7)) * settings.fps)
        # A remainder that is too short for another scene extends the last one.
        frames = left if left - frames < settings.fps else frames
        scenes.append(_draw_scene(rng, frames, *pairs[order[len(scenes) % len(pairs)]]))
        left -= frames
    return scenes


def draw_scene_frame(scene: Scene, progress: float, *, backdrop_HWC: np.ndarray) -> np.ndarray:
    """Draw one picture of a motion.

    Args:
        scene: the motion.
        progress: elapsed fraction of the motion, in [0, 1].
        backdrop_HWC: uint8 (side, side, 3) background, from `draw_backdrop`.

    Returns:
        uint8 (side, side, 3) RGB.
    """
    frame_HWC = backdrop_HWC.copy()
    side = len(frame_HWC)
    direction, growth, _ = ACTIONS[scene.verb]
    center = [
        (start + (way * scene.travel + drift) * progress) * side
        for start, way, drift in zip(scene.place, direction, scene.drift, strict=True)
    ]
    radius = scene.radius * side * (growth * scene.swell) ** progress
    color = np.clip(np.array(COLORS[scene.color]) * scene.tint, 0, 255)
    _paint(frame_HWC, scene.shape, center, radius=radius, color=color)
    return frame_HWC


def draw_backdrop(seed: int, side: int) -> np.ndarray:
    """Draw a background: a dim two-color gradient, soft blotches, and one small gray object.

    Args:
        seed: determines the background.
        side: width and height in pixels.

    Returns:
        uint8 (side, side, 3) RGB.
    """
    rng = np.random.Generator(np.random.Philox(key=seed))
    ramp = np.linspace(0, 1, side)[:, None, None]
    ramp = ramp if rng.random() < 0.5 else ramp.transpose(1, 0, 2)
    base, end = rng.uniform(30, 130, (2, 3))
    blotches = rng.uniform(-18, 18, (8, 8, 1)).repeat(side // 8, axis=0).repeat(side // 8, axis=1)
    picture = base + (end - base) * ramp + np.broadcast_to(0.0, (side, side, 3))
    picture[: len(blotches), : len(blotches)] += blotches
    backdrop_HWC = np.clip(picture, 0, 255).astype(np.uint8)
    shape, gray = SHAPES[rng.integers(len(SHAPES))], rng.uniform(90, 200)
    place = (rng.random(2) * side).tolist()
    _paint(backdrop_HWC, shape, place, radius=side * 0.05, color=np.full(3, gray))
    return backdrop_HWC


def _draw_scene(rng: np.random.Generator, frames: int, color: str, shape: str, verb: str) -> Scene:
    # Away from the borders for all actions, so that the first position does not reveal the direction.
    place, drift = rng.uniform(0.35, 0.65, 2), rng.uniform(-0.04, 0.04, 2)
    look = {
        "tint": float(rng.uniform(0.75, 1.1)),
        "radius": float(rng.uniform(0.14, 0.2)),
        "travel": float(rng.uniform(0.28, 0.38)),
        "swell": float(rng.uniform(0.9, 1.1)),
    }
    ways = ACTIONS[verb][2]
    text = f"{ARTICLES[rng.integers(2)]} {color} {shape} {ways[rng.integers(len(ways))]}"
    return Scene(
        frames=frames,
        verb=verb,
        color=color,
        shape=shape,
        text=text,
        place=(float(place[0]), float(place[1])),
        drift=(float(drift[0]), float(drift[1])),
        backdrop=int(rng.integers(2**62)),
        **look,
    )


def _paint(
    frame_HWC: np.ndarray, shape: str, center: Sequence[float], *, radius: float, color: np.ndarray
) -> None:
    """Paint an object with soft edges into a frame; it wraps around the borders."""
    side, reach = len(frame_HWC), int(radius) + 2
    left, top = int(np.floor(center[0])) - reach, int(np.floor(center[1])) - reach
    columns, rows = np.arange(left, left + 2 * reach + 1), np.arange(top, top + 2 * reach + 1)
    x, y = columns[None, :] - center[0], rows[:, None] - center[1]
    if shape == "cube":
        inside = 0.88 * radius - np.maximum(np.abs(x), np.abs(y))
    elif shape == "ball":
        inside = radius - np.hypot(x, y)
    else:
        inside = 0.25 * radius - np.abs(np.hypot(x, y) - 0.75 * radius)
    alpha = np.clip(inside + 0.5, 0, 1)[..., None]
    window = np.ix_(rows % side, columns % side)
    frame_HWC[window] = (frame_HWC[window] * (1 - alpha) + color * alpha).astype(np.uint8)


def _video_name(split: Split, index: int) -> str:
    return f"{split}_{index:03d}.mp4"


def _raise_loss(task: tuple[Path, SyntheticSettings, Split, int], reason: str) -> NoReturn:
    raise UserError(f"{_video_name(task[2], task[3])} could not be made: {reason}")


def _write_video_task(task: tuple[Path, SyntheticSettings, Split, int]) -> list[Annotation]:
    """Write one video under a temporary name, then rename it; runs in a worker."""
    folder, settings, split, index = task
    scenes = plan_video(settings, split, index=index)
    name = _video_name(split, index)
    with (
        whole_or_absent(folder / name) as partial,
        av.open(str(partial), "w", format="mp4") as container,
    ):
        # The videos are only read for cutting them into chunks: fast encoding, little loss.
        options = {"preset": "ultrafast", "crf": "18"}
        stream = container.add_stream("libx264", rate=settings.fps, options=options)
        assert isinstance(stream, VideoStream)
        stream.width = stream.height = settings.side
        stream.pix_fmt, stream.thread_count = "yuv420p", 1
        for picture_HWC in _pictures(scenes, settings.side):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture_HWC, format="rgb24")))
        container.mux(stream.encode(None))
    return _annotate(name, scenes, fps=settings.fps)


def _pictures(scenes: Sequence[Scene], side: int) -> Iterator[np.ndarray]:
    for scene in scenes:
        backdrop_HWC = draw_backdrop(scene.backdrop, side)
        for number in range(scene.frames):
            yield draw_scene_frame(scene, number / (scene.frames - 1), backdrop_HWC=backdrop_HWC)


def _annotate(name: str, scenes: Sequence[Scene], *, fps: int) -> list[Annotation]:
    rows, first = [], 0
    for scene in scenes:
        end = first + scene.frames
        span = round(first / fps, 3), round(end / fps, 3)
        rows.append(Annotation(name, *span, scene.text, scene.verb, scene.noun, label=scene.verb))
        first = end
    return rows


def _write_csv(path: Path, rows: Sequence[Annotation]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in fields(Annotation)])
        writer.writerows(astuple(row) for row in rows)
