"""Manifest row to `ClipRequest`: everything random about a clip is decided here, before any file is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from avion_dali.config.data import Crop, DataConfig, Sampling, TextSource
from avion_dali.contracts import ClipPart, ClipRequest, CropWindow, UserError
from avion_dali.data.crops import (
    center_square_window,
    multi_scale_window,
    narrowed_window,
    random_resized_window,
    side_square_windows,
    simple_random_window,
)
from avion_dali.data.frames import (
    dense_frame_ids,
    frame_at,
    frame_range_in_seconds,
    segment_frame_ids,
    segment_of,
    strided_frame_ids,
    view_frame_ids,
    view_start_frames,
)
from avion_dali.data.manifest import Chunk, Manifest
from avion_dali.data.randomness import generator
from avion_dali.data.relevancy import open_captions

_SQUARE_ENOUGH = 0.01  # pixels are seldom exactly square where sizes were rounded


@dataclass(frozen=True)
class ClipRules:
    """How clips are drawn from their rows; the fields mean what they mean in `DataConfig`.

    Args:
        num_frames: clip length T.
        frame_size: side of the square output in pixels.
        training: draw frames, windows, flips and texts; else middles, fixed windows and first texts.
        sampling: which frames make a clip.
        stride: source frames between neighbours, for `strided` and `dense`.
        crop: how training windows are drawn.
        crop_scale: random-resized-crop area range.
        crop_ratio: random-resized-crop aspect range.
        flip_probability: chance of a left-right flip in training.
        repeats: training views of a clip.
        eval_clips: evaluation clips of a row.
        eval_crops: evaluation windows of a clip, 1 or 3.
        text: text of a training clip.
        relevancy_threshold: what the relevancy of a `relevant` text exceeds.
    """

    num_frames: int
    frame_size: int
    training: bool
    sampling: Sampling = "segments"
    stride: int = 4
    crop: Crop = "random-resized"
    crop_scale: tuple[float, float] = (0.5, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    flip_probability: float = 0.0
    repeats: int = 1
    eval_clips: int = 1
    eval_crops: int = 1
    text: TextSource = "own"
    relevancy_threshold: float = 0.1

    @classmethod
    def from_config(cls, data: DataConfig, *, training: bool) -> ClipRules:
        """Take the rules from a configuration.

        Args:
            data: the configuration.
            training: whether clips are drawn for training.
        """
        names = [field.name for field in fields(cls) if field.name != "training"]
        return cls(training=training, **{name: getattr(data, name) for name in names})

    @property
    def clip_shape(self) -> tuple[int, int, int, int, int]:
        """Shape of every clip planned by these rules: (V, T, H, W, C)."""
        views = self.repeats if self.training else self.eval_crops
        return (views, self.num_frames, self.frame_size, self.frame_size, 3)

    @property
    def clips_per_row(self) -> int:
        """Clips planned for each row of the manifest."""
        return 1 if self.training else self.eval_clips


class Planner:
    """Plans the clips of one manifest.

    Args:
        manifest: the opened manifest.
        rules: how clips are drawn.
        seed: the run's seed.
    """

    def __init__(self, manifest: Manifest, rules: ClipRules, *, seed: int) -> None:
        self.manifest, self.rules, self.seed = manifest, rules, seed
        self._captions = open_captions(manifest) if rules.training and rules.text == "relevant" else None

    @property
    def num_rows(self) -> int:
        """Number of clips: the rows that `plan` takes."""
        return self.manifest.num_samples * self.rules.clips_per_row

    def plan(self, row: int, epoch: int) -> ClipRequest:
        """Return the request of (seed, epoch, row); the same whoever asks.

        Args:
            row: in [0, num_rows): in training a row of the manifest; in evaluation clip
                `row % eval_clips` of the manifest's row `row // eval_clips`.
            epoch: epoch number, >= 0.

        Raises:
            UserError: when the clip should get a relevant caption and has none.
        """
        rules, manifest = self.rules, self.manifest
        sample_id, clip = divmod(row, rules.clips_per_row)
        rng = generator("clip", seed=self.seed, epoch=epoch, index=sample_id) if rules.training else None
        first_chunk, num_chunks, start_s, end_s = manifest.span(sample_id)
        chunks = [manifest.chunk(first_chunk + i) for i in range(num_chunks)]
        parts, gather = locate_frames(
            start_s, end_s, chunks, choose=lambda total: choose_frames(total, rules, clip=clip, rng=rng)
        )
        windows, flips = _draw_views_of(chunks[0], rules, rng)
        tokens, caption_id = self._text(sample_id, rng)
        return ClipRequest(
            sample_id=sample_id,
            epoch=epoch,
            parts=parts,
            gather=gather,
            windows=windows,
            flips=flips,
            frame_size=rules.frame_size,
            tokens=tokens,
            label=manifest.label(sample_id),
            caption_id=caption_id,
        )

    def _text(self, sample_id: int, rng: np.random.Generator | None) -> tuple[tuple[int, ...], int]:
        """Return the token ids of a clip's text, and which caption it is or -1."""
        if rng is not None and self._captions is not None:
            caption = self._relevant_caption(sample_id, rng)
            return self._captions.tokens[caption], caption
        count = self.manifest.num_texts(sample_id)
        # A lone text takes no draw.
        number = int(rng.integers(count)) if rng is not None and count > 1 else 0
        return (self.manifest.tokens(sample_id, number) if count else ()), -1

    def _relevant_caption(self, sample_id: int, rng: np.random.Generator) -> int:
        assert self._captions is not None
        positives = self._captions.positives(sample_id, self.rules.relevancy_threshold)
        if not len(positives):
            raise UserError(
                f"{self.manifest.folder}: no caption's relevancy to row {sample_id} exceeds "
                f"data.relevancy_threshold = {self.rules.relevancy_threshold:g}; lower it, or train with "
                "data.text = own"
            )
        return int(positives[int(rng.integers(len(positives)))])


def locate_frames(
    start_s: float, end_s: float, chunks: Sequence[Chunk], *, choose: Callable[[int], np.ndarray]
) -> tuple[tuple[ClipPart, ...], tuple[int, ...]]:
    """Choose a clip's frames from the chunks its time span touches.

    Each chunk contributes the frames inside the span by its own frame rate and real frame count; the
    clip is sampled from their concatenation.

    Args:
        start_s: start in seconds of the video.
        end_s: end in seconds of the video.
        chunks: the chunks the span touches, in order.
        choose: picks T of N frames, which are numbered from 0.

    Returns:
        The parts with unique sorted ids, and the gather order (length T).
    """
    ranges = [_frames_inside(start_s, end_s, chunk) for chunk in chunks]
    total = sum(stop - first for first, stop in ranges)
    if not total:
        # A span shorter than a frame: the one on show when it starts.
        chunk, total = chunks[0], 1
        shown = frame_at(
            start_s - chunk.start_s,
            fps=float(chunk.fps),
            num_frames=chunk.ref.num_frames,
            frame_times=chunk.frame_times,
        )
        ranges[0] = (shown, shown + 1)
    wanted: list[int] = choose(total).tolist()
    unique = sorted(set(wanted))
    place = {frame: i for i, frame in enumerate(unique)}
    parts, offset = [], 0
    for chunk, (first, stop) in zip(chunks, ranges, strict=True):
        ids = tuple(i - offset + first for i in unique if offset <= i < offset + stop - first)
        if ids:
            parts.append(ClipPart(chunk.ref, ids))
        offset += stop - first
    return tuple(parts), tuple([place[frame] for frame in wanted])


def choose_frames(total: int, rules: ClipRules, *, clip: int, rng: np.random.Generator | None) -> np.ndarray:
    """Choose which of a span's frames make a clip.

    Several evaluation clips of a row are spread evenly over its span: `segments` gives each an equal part;
    `strided` and `dense` begin at equal distances, read at the plain stride, and repeat the last frame.

    Args:
        total: frames of the span, >= 1.
        rules: how clips are drawn.
        clip: which of the row's clips, in [0, clips_per_row).
        rng: the clip's generator; None for evaluation.

    Returns:
        int64 array (T,), each in [0, total).
    """
    length, stride, count = rules.num_frames, rules.stride, rules.clips_per_row
    if rules.sampling == "segments":
        return segment_frame_ids(*segment_of(total, clip, count), length, rng)
    if count > 1:
        start = view_start_frames(total, length, stride, count)[clip]
        return view_frame_ids(total, length, stride, start)
    sample = strided_frame_ids if rules.sampling == "strided" else dense_frame_ids
    return sample(total, length, stride, rng)


def _draw_views_of(
    chunk: Chunk, rules: ClipRules, rng: np.random.Generator | None
) -> tuple[tuple[CropWindow, ...], tuple[bool, ...]]:
    """Draw views over the picture as it is displayed; windows count the pixels as they are stored."""
    width, height, aspect = chunk.ref.width, chunk.ref.height, chunk.pixel_aspect
    if abs(aspect - 1) < _SQUARE_ENOUGH:
        return draw_views(width, height, rules, rng)
    displayed = max(round(width * aspect / 2) * 2, 2)
    windows, flips = draw_views(displayed, height, rules, rng)
    return tuple(narrowed_window(window, width / displayed, limit=width) for window in windows), flips


def draw_views(
    width: int, height: int, rules: ClipRules, rng: np.random.Generator | None
) -> tuple[tuple[CropWindow, ...], tuple[bool, ...]]:
    """Choose the crop window and flip of each view of a clip; a view keeps them also when it spans chunks.

    Args:
        width: of the clip's chunks in pixels.
        height: of the clip's chunks in pixels.
        rules: how clips are drawn.
        rng: the clip's generator; None for evaluation.
    """
    if rng is None:
        crops = rules.eval_crops
        windows = side_square_windows(width, height) if crops == 3 else (center_square_window(width, height),)
        return windows, (False,) * crops
    views = [
        (_draw_window(width, height, rules, rng), bool(rng.random() < rules.flip_probability))
        for _ in range(rules.repeats)
    ]
    return tuple(window for window, _ in views), tuple(flip for _, flip in views)


def _draw_window(width: int, height: int, rules: ClipRules, rng: np.random.Generator) -> CropWindow:
    if rules.crop == "random-resized":
        return random_resized_window(width, height, scale=rules.crop_scale, ratio=rules.crop_ratio, rng=rng)
    if rules.crop == "simple-random":
        return simple_random_window(width, height, rng=rng)
    if rules.crop == "multi-scale":
        return multi_scale_window(width, height, frame_size=rules.frame_size, rng=rng)
    return center_square_window(width, height)


def _frames_inside(start_s: float, end_s: float, chunk: Chunk) -> tuple[int, int]:
    return frame_range_in_seconds(
        start_s - chunk.start_s,
        end_s - chunk.start_s,
        fps=float(chunk.fps),
        num_frames=chunk.ref.num_frames,
        frame_times=chunk.frame_times,
    )
