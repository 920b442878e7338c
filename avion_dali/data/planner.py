"""Manifest row to `ClipRequest`: everything random about a clip is decided here, before any file is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from avion_dali.contracts import ClipPart, ClipRequest, CropWindow
from avion_dali.data.crops import center_square_window, random_resized_window
from avion_dali.data.frames import frame_at, frame_range_in_seconds, segment_frame_ids
from avion_dali.data.manifest import Chunk, Manifest, Sample
from avion_dali.data.randomness import generator


@dataclass(frozen=True)
class ClipRules:
    """How a clip is drawn from its row.

    Args:
        num_frames: clip length T.
        frame_size: side of the square output in pixels.
        training: draw jitter, window and flip; else middles and the centre square.
        crop_scale: random-resized-crop area range.
        crop_ratio: random-resized-crop aspect range.
        flip_probability: chance of a left-right flip in training.
    """

    num_frames: int
    frame_size: int
    training: bool
    crop_scale: tuple[float, float] = (0.5, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    flip_probability: float = 0.0

    @property
    def clip_shape(self) -> tuple[int, int, int, int, int]:
        """Shape of every clip planned by these rules: (V, T, H, W, C)."""
        return (1, self.num_frames, self.frame_size, self.frame_size, 3)


class Planner:
    """Plans the clips of one manifest.

    Args:
        manifest: the opened manifest.
        rules: how clips are drawn.
        seed: the run's seed.
    """

    def __init__(self, manifest: Manifest, rules: ClipRules, *, seed: int) -> None:
        self.manifest, self.rules, self.seed = manifest, rules, seed

    def plan(self, sample_id: int, epoch: int) -> ClipRequest:
        """Return the request of (seed, epoch, sample id); the same whoever asks.

        Args:
            sample_id: row of the manifest.
            epoch: epoch number, >= 0.
        """
        sample = self.manifest.sample(sample_id)
        chunks = [self.manifest.chunk(sample.first_chunk + i) for i in range(sample.num_chunks)]
        rng = generator("clip", seed=self.seed, epoch=epoch, index=sample_id) if self.rules.training else None
        parts, gather = locate_frames(sample, chunks, self.rules.num_frames, rng)
        window, flip = draw_view(chunks[0], self.rules, rng)
        return ClipRequest(
            sample_id=sample_id,
            epoch=epoch,
            parts=parts,
            gather=gather,
            windows=(window,),
            flips=(flip,),
            frame_size=self.rules.frame_size,
            tokens=sample.tokens,
        )


def locate_frames(
    sample: Sample, chunks: list[Chunk], num_frames: int, rng: np.random.Generator | None
) -> tuple[tuple[ClipPart, ...], tuple[int, ...]]:
    """Choose a clip's frames from the chunks its time span touches.

    Each chunk contributes the frames inside the span by its own frame rate and real frame count; the
    clip is sampled from their concatenation.

    Args:
        sample: the row, with its span in seconds.
        chunks: the chunks it touches, in order.
        num_frames: clip length T.
        rng: draws the jitter; None for evaluation.

    Returns:
        The parts with unique sorted ids, and the gather order (length T).
    """
    ranges = [
        frame_range_in_seconds(sample.start_s - c.start_s, sample.end_s - c.start_s, **_clock(c))
        for c in chunks
    ]
    lengths = [stop - first for first, stop in ranges]
    if not sum(lengths):
        # A span shorter than a frame: the one on show when it starts.
        shown = frame_at(sample.start_s - chunks[0].start_s, **_clock(chunks[0]))
        ranges[0], lengths[0] = (shown, shown + 1), 1
    wanted = segment_frame_ids(0, sum(lengths), num_frames, rng)
    unique, gather = np.unique(wanted, return_inverse=True)
    parts, offset = [], 0
    for chunk, (first, _), length in zip(chunks, ranges, lengths, strict=True):
        ids = unique[(unique >= offset) & (unique < offset + length)] - offset + first
        if len(ids):
            parts.append(ClipPart(chunk.ref, tuple(ids.tolist())))
        offset += length
    return tuple(parts), tuple(gather.tolist())


def _clock(chunk: Chunk) -> dict[str, Any]:
    """Return what maps a chunk's seconds to its frames."""
    return {"fps": float(chunk.fps), "num_frames": chunk.ref.num_frames, "frame_times": chunk.frame_times}


def draw_view(chunk: Chunk, rules: ClipRules, rng: np.random.Generator | None) -> tuple[CropWindow, bool]:
    """Choose the crop window and flip of a clip: one of each, also when it spans chunks.

    Args:
        chunk: any chunk of the clip (they share one frame size).
        rules: how clips are drawn.
        rng: the clip's generator; None for evaluation.
    """
    width, height = chunk.ref.width, chunk.ref.height
    if rng is None:
        return center_square_window(width, height), False
    window = random_resized_window(width, height, scale=rules.crop_scale, ratio=rules.crop_ratio, rng=rng)
    return window, bool(rng.random() < rules.flip_probability)
