"""Plans clips: turns manifest rows into `ClipRequest`s and makes all random choices before files are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial

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

_SQUARE_ENOUGH = 0.01  # rounded sizes rarely give an aspect ratio of exactly 1


@dataclass(frozen=True)
class ClipRules(ClipOptions):
    """How clips are drawn, and whether they are for training.

    Args:
        training: True draws frames, crop windows, flips and texts at random; False uses middle frames, fixed
            windows and first texts.
    """

    training: bool = True

    @classmethod
    def from_options(cls, options: ClipOptions, *, training: bool) -> ClipRules:
        """Create the rules from a configuration.

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
        """Number of clips per row of the manifest."""
        return 1 if self.training else self.eval_clips


class Planner:
    """Plans the clips of one manifest.

    Args:
        manifest: the opened manifest.
        rules: how clips are drawn.
        seed: the run's seed.

    Raises:
        UserError: when the crop rule does not exist.
    """

    def __init__(self, manifest: Manifest, rules: ClipRules, *, seed: int) -> None:
        find_crop(rules.crop)  # reject an unknown name here instead of at the first clip
        self.manifest, self.rules, self.seed = manifest, rules, seed
        self._captions = open_captions(manifest) if rules.training and rules.text == "relevant" else None

    def __reduce__(self) -> tuple[Callable[..., Planner], tuple[Manifest, ClipRules]]:
        # Another process opens the manifest and its captions itself.
        return partial(Planner, seed=self.seed), (self.manifest, self.rules)

    @property
    def num_clips(self) -> int:
        """Number of clips that `plan` accepts: samples of the manifest times clips per sample."""
        return self.manifest.num_samples * self.rules.clips_per_row

    def plan(self, clip: int, epoch: int) -> ClipRequest:
        """Return the request of (seed, epoch, clip), which is equal on all ranks and in all runs.

        Args:
            clip: index in [0, num_clips): in training a row of the manifest; in evaluation, clip
                `clip % eval_clips` of row `clip // eval_clips`.
            epoch: epoch number, >= 0.

        Raises:
            UserError: when the clip needs a relevant caption and has none.
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
        """Return the token ids of a clip's text, and its caption id or -1."""
        if rng is not None and self._captions is not None:
            caption = self._relevant_caption(sample_id, rng)
            return self._captions.tokens[caption], caption
        count = self.manifest.num_texts(sample_id)
        # No random number is drawn for a single text.
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
    """Choose a clip's frames from the chunks of its time span.

    Each chunk contributes its frames inside the span, according to its own frame rate and frame count; the
    clip is sampled from their concatenation.

    Args:
        start_s: start in seconds of the video.
        end_s: end in seconds of the video.
        chunks: the chunks of the span, in order.
        choose: chooses T of N frames, given N; returns indices from 0.

    Returns:
        The parts with unique sorted frame ids, and the gather order (length T).
    """
    ranges = [_frames_inside(start_s, end_s, chunk=chunk) for chunk in chunks]
    total = sum(stop - first for first, stop in ranges)
    if not total:
        # The span contains no frame: use the one that is shown at its start.
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
    """Choose the frames of a clip from those of a span.

    The evaluation clips of a row are evenly spread over its span: with `segments`, each clip has an equal part;
    with `strided` and `dense`, clips start at equal distances, use every `stride`-th frame and repeat the last.

    Args:
        total: frames of the span, >= 1.
        rules: how clips are drawn.
        clip: index among the clips of the row, in [0, clips_per_row).
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
    """Draw views over the displayed picture; windows are in stored pixels."""
    width, height, aspect = chunk.ref.width, chunk.ref.height, chunk.pixel_aspect
    if abs(aspect - 1) < _SQUARE_ENOUGH:
        return draw_views(width, height, rules, rng)
    displayed = max(round(width * aspect / 2) * 2, 2)
    windows, flips = draw_views(displayed, height, rules, rng)
    return tuple(narrowed_window(window, width / displayed, limit=width) for window in windows), flips


def draw_views(
    width: int, height: int, rules: ClipRules, rng: np.random.Generator | None
) -> tuple[tuple[CropWindow, ...], tuple[bool, ...]]:
    """Choose the crop window and flip of each view of a clip; they apply to all chunks of the clip.

    Args:
        width: width of the clip's chunks in pixels.
        height: height of the clip's chunks in pixels.
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
