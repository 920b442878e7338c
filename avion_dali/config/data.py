"""Settings of manifests, clips, loading and augmentation."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Literal, get_args

from avion_dali.config.checks import require
from avion_dali.config.plain import require_field_types

Normalization = Literal["openai", "openai-avion", "imagenet"]
Sampling = Literal["segments", "strided", "dense"]
TextSource = Literal["own", "relevant"]


@dataclass(frozen=True)
class ClipOptions:
    """How clips are drawn from the rows of a manifest.

    Args:
        num_frames: frames per clip (T).
        frame_size: side length of a frame in pixels after cropping.
        sampling: how the frames of a clip are chosen: `segments` takes one frame from each of T equal parts of
            the row's span (AVION, LaViLa); `strided` takes every `stride`-th frame from a random start
            (VideoMAE pre-training); `dense` spreads T frames over a random window of T x `stride` frames
            (VideoMAE fine-tuning).
        stride: source frames between neighboring frames of a clip, for `strided` and `dense`.
        crop: how crop windows are drawn in training, a rule of `avion_dali/data/crops.py`: `random-resized`;
            `simple-random`, a square as high as the frame at a random position (DeiT III); `multi-scale`, one
            of 13 positions in one of four sizes (VideoMAE pre-training); `center`, the largest square.
        crop_scale: range of the window's area in `random-resized`, as fractions of the frame.
        crop_ratio: range of the window's aspect ratio (width / height) in `random-resized`, drawn
            log-uniformly.
        flip_probability: probability that a training clip is mirrored left to right.
        repeats: training views per decoded clip, each with its own crop window and flip (repeated
            augmentation). Batch sizes count clips, so the model sees `repeats` times as many views.
        eval_clips: evaluation clips per row, spread evenly over its span; their scores are averaged.
        eval_crops: crop windows per evaluation clip along the longer side, 1 (center) or 3.
        text: text of a training clip: `own` draws one of the texts of its row; `relevant` draws one of the
            manifest's captions whose relevancy to the row exceeds `relevancy_threshold`.
        relevancy_threshold: threshold of `relevant`, in [0, 1); see `text`.

    Raises:
        UserError: when a value has another type or is out of range.
    """

    num_frames: int = 4
    frame_size: int = 224
    sampling: Sampling = "segments"
    stride: int = 4
    crop: str = "random-resized"
    crop_scale: tuple[float, float] = (0.5, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    flip_probability: float = 0.0
    repeats: int = 1
    eval_clips: int = 1
    eval_crops: Literal[1, 3] = 1
    text: TextSource = "own"
    relevancy_threshold: float = 0.1

    def __post_init__(self) -> None:
        require_field_types(self)
        require(self.num_frames >= 1, "`num_frames`", value=self.num_frames, allowed=">= 1")
        require(self.frame_size >= 16, "`frame_size`", value=self.frame_size, allowed=">= 16 pixels")
        names = get_args(Sampling)
        require(self.sampling in names, "`sampling`", value=self.sampling, allowed=f"one of {', '.join(names)}")
        require(self.stride >= 1, "`stride`", value=self.stride, allowed=">= 1")
        low, high = self.crop_scale
        require(
            0 < low <= high <= 1,
            "`crop_scale`",
            value=self.crop_scale,
            allowed="two shares 0 < low <= high <= 1",
        )
        low, high = self.crop_ratio
        require(0 < low <= high, "`crop_ratio`", value=self.crop_ratio, allowed="two ratios 0 < low <= high")
        require(
            0 <= self.flip_probability <= 1,
            "`flip_probability`",
            value=self.flip_probability,
            allowed="in [0, 1]",
        )
        require(self.repeats >= 1, "`repeats`", value=self.repeats, allowed=">= 1")
        require(self.eval_clips >= 1, "`eval_clips`", value=self.eval_clips, allowed=">= 1")
        crops = isinstance(self.eval_crops, Integral) and self.eval_crops in (1, 3)
        require(crops, "`eval_crops`", value=self.eval_crops, allowed="1 or 3")
        require(self.text in get_args(TextSource), "`text`", value=self.text, allowed="own or relevant")
        threshold = self.relevancy_threshold
        require(0 <= threshold < 1, "`relevancy_threshold`", value=threshold, allowed="in [0, 1)")


@dataclass(frozen=True)
class LoaderOptions(ClipOptions):
    """How clips are drawn and loaded; see also `ClipOptions`.

    Args:
        workers: decode processes per rank; 0 uses the machine's cores divided by the ranks on it.
        worker_niceness: how far the decode processes stand back from the training process where cores are
            short, 0 (equal) to 19; see nice(1). All published measurements are with 0.
        prefetch_batches: number of micro-batches decoded ahead of the model.
        clip_timeout_s: seconds after which the worker of a clip is killed and the clip is replaced. A worker
            takes several clips; when one hangs, they are decoded again one by one, so a clip that never ends
            costs at most twice this time.
        max_bad_fraction: fraction of the manifest's rows that may fail before the run stops.

    Raises:
        UserError: when a value has another type or is out of range.
    """

    workers: int = 0
    worker_niceness: int = 0
    prefetch_batches: int = 3
    clip_timeout_s: float = 30.0
    max_bad_fraction: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.workers >= 0, "`workers`", value=self.workers, allowed=">= 0 (0: one per core)")
        niceness = self.worker_niceness
        require(
            0 <= niceness <= 19, "`worker_niceness`", value=niceness, allowed="in [0, 19] (0: as the trainer)"
        )
        require(self.prefetch_batches >= 1, "`prefetch_batches`", value=self.prefetch_batches, allowed=">= 1")
        require(self.clip_timeout_s > 0, "`clip_timeout_s`", value=self.clip_timeout_s, allowed="> 0 seconds")
        require(
            0 <= self.max_bad_fraction <= 1,
            "`max_bad_fraction`",
            value=self.max_bad_fraction,
            allowed="in [0, 1]",
        )


@dataclass(frozen=True)
class DataConfig(LoaderOptions):
    """Manifests, and how their clips are drawn and loaded; see also `LoaderOptions`.

    Args:
        train_manifest: folder made by `avion-dali manifest`; empty if the run only evaluates.
        eval_manifest: folder of the held-out manifest; empty to train without evaluation.
        normalization: mean and standard deviation of pixels; see `avion_dali/device_ops/normalize.py`.
    """

    train_manifest: str = ""
    eval_manifest: str = ""
    normalization: Normalization = "openai"


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of training clips on the device; it is the same for all frames of a clip.

    Args:
        color_jitter: strength of random brightness, contrast and saturation; 0 turns it off.
        rand_augment_ops: RandAugment operations per clip; 0 turns it off.
        rand_augment_magnitude: strength of the operations, 0 to 10.
        erasing_probability: probability that a box of the clip is filled with noise.
    """

    color_jitter: float = 0.0
    rand_augment_ops: int = 0
    rand_augment_magnitude: int = 7
    erasing_probability: float = 0.0

    def __post_init__(self) -> None:
        require(
            0 <= self.color_jitter <= 1, "augment.color_jitter", value=self.color_jitter, allowed="in [0, 1]"
        )
        require(
            self.rand_augment_ops >= 0,
            "augment.rand_augment_ops",
            value=self.rand_augment_ops,
            allowed=">= 0 (0: none)",
        )
        magnitude = self.rand_augment_magnitude
        require(0 <= magnitude <= 10, "augment.rand_augment_magnitude", value=magnitude, allowed="in [0, 10]")
        chance = self.erasing_probability
        require(0 <= chance <= 1, "augment.erasing_probability", value=chance, allowed="in [0, 1]")
