"""Manifest row to `ClipRequest`: everything random about a clip is decided here, before any file is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from avion_dali.config.data import ClipOptions
from avion_dali.contracts import ClipPart, ClipRequest, CropWindow, UserError
from avion_dali.data.crops import center_square_window, find_crop, narrowed_window, side_square_windows
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
class ClipRules(ClipOptions):
    """How clips are drawn, and whether for training.

    Args:
        training: draw frames, windows, flips and texts; else middles, fixed windows and first texts.
    """

    training: bool = True

    @classmethod
    def from_options(cls, options: ClipOptions, *, training: bool) -> ClipRules:
        """Take the rules from a configuration.

        Args:
            options: the configuration, or a section of one that extends `ClipOptions`.
            training: whether clips are drawn for training.
        """
        return cls(training=training, **{f.name: getattr(options, f.name) for f in fields(ClipOptions)})

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

    Raises:
        UserError: when there is no such crop rule.
    """

    def __init__(self, manifest: Manifest, rules: ClipRules, *, seed: int) -> None:
        find_crop(rules.crop)  # an unknown name is an error now, not in the first clip
        self.manifest, self.rules, self.seed = manifest, rules, seed
        self._captions = open_captions(manifest) if rules.training and rules.text == "relevant" else None

    @property
    def num_clips(self) -> int:
        """Number of clips that `plan` knows: the manifest's samples times the clips made from each."""
        return self.manifest.num_samples * self.rules.clips_per_row

    def plan(self, clip: int, epoch: int) -> ClipRequest:
        """Return the request of (seed, epoch, clip); the same on every rank and in every run.

        Args:
            clip: in [0, num_clips): in training a row of the manifest; in evaluation clip
                `clip % eval_clips` of the manifest's row `clip // eval_clips`.
            epoch: epoch number, >= 0.

        Raises:
            UserError: when the clip should get a relevant caption and has none.
        """
        rules, manifest = self.rules, self.manifest
        sample_id, clip_of_row = divmod(clip, rules.clips_per_row)
        rng = generator("clip", seed=self.seed, epoch=epoch, index=sample_id) if rules.training else None
        first_chunk, num_chunks, start_s, end_s = manifest.span(sample_id)
        chunks = [manifest.chunk(first_chunk + i) for i in range(num_chunks)]
        parts, gather = locate_frames(
            start_s,
            end_s,
            chunks=chunks,
            choose=lambda total: choose_frames(total, rules, clip=clip_of_row, rng=rng),
        )
        windows, flips = _draw_views_of(chunks[0], rules, rng=rng)
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
                f"`relevancy_threshold` = {self.rules.relevancy_threshold:g}; lower it, or train with "
                "`text` = own"
            )
        return int(positives[int(rng.integers(len(positives)))])


def locate_frames(
    start_s: float, end_s: float, *, chunks: Sequence[Chunk], choose: Callable[[int], np.ndarray]
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
    ranges = [_frames_inside(start_s, end_s, chunk=chunk) for chunk in chunks]
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
        return segment_frame_ids(*segment_of(total, clip, num_parts=count), length, rng)
    if count > 1:
        start = view_start_frames(total, length, stride=stride, num_views=count)[clip]
        return view_frame_ids(total, length, stride=stride, start=start)
    sample = strided_frame_ids if rules.sampling == "strided" else dense_frame_ids
    return sample(total, length, stride, rng)


def _draw_views_of(
    chunk: Chunk, rules: ClipRules, *, rng: np.random.Generator | None
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
    draw_window = find_crop(rules.crop)
    views = [
        (draw_window(width, height, rules, rng), bool(rng.random() < rules.flip_probability))
        for _ in range(rules.repeats)
    ]
    return tuple(window for window, _ in views), tuple(flip for _, flip in views)


def _frames_inside(start_s: float, end_s: float, *, chunk: Chunk) -> tuple[int, int]:
    return frame_range_in_seconds(
        start_s - chunk.start_s,
        end_s - chunk.start_s,
        fps=float(chunk.fps),
        num_frames=chunk.ref.num_frames,
        frame_times=chunk.frame_times,
    )
