"""Color jitter and RandAugment of decoded clips, with torchvision's operations.

Random numbers are drawn once per clip and applied to all its frames. Operations that depend on image statistics
(automatic contrast, equalization, the mean used by contrast) compute them per frame, as VideoMAE does.
Axes: B clips, T frames, H W pixels, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from avion_dali.config import AugmentConfig
from avion_dali.device_ops.step_key import StepKey, step_generator

# Probability of applying a drawn operation, and standard deviation of its magnitude, as in timm.
APPLY_PROBABILITY: Final = 0.5
MAGNITUDE_STD: Final = 0.5
MAX_MAGNITUDE: Final = 10.0
_FILL: Final = [124.0, 116.0, 104.0]  # ImageNet mean; fills areas outside the original frame
_MAX_ROTATION: Final = 30.0  # degrees
_MAX_SHEAR: Final = 0.3
_MAX_SHIFT: Final = 0.45  # fraction of the side length
_MAX_ENHANCEMENT: Final = 0.9


class Augmentation(NamedTuple):
    """What is done to the pixels of one batch in training.

    Args:
        config: what to do.
        key: seed and step.
        clip_ids: int64 array (B,), sample id times views plus view: names each clip's random numbers.
    """

    config: AugmentConfig
    key: StepKey
    clip_ids: np.ndarray


def augment_frames(frames_BTHWC: Tensor, config: AugmentConfig, key: StepKey, clip_ids: np.ndarray) -> Tensor:
    """Apply RandAugment, then color jitter, with separate random numbers per clip.

    RandAugment (Cubuk et al. 2019, arXiv 1909.13719) draws `rand_augment_ops` operations from `OPERATIONS` with
    replacement. It follows timm's `rand-m7-n4-mstd0.5-inc1`, which VideoMAE uses: each drawn operation is
    applied with probability 1/2, at a normally distributed magnitude with mean `rand_augment_magnitude` and
    standard deviation 1/2, clipped to 0..10. Differences: `SolarizeAdd` is not among the operations;
    posterization leaves at least one bit; tensors are resampled bilinearly, while VideoMAE resamples PIL images
    bicubically; and augmentation follows cropping and resizing, while in VideoMAE it precedes them.

    Color jitter multiplies brightness, contrast and saturation, in random order, by factors uniform in
    1 - s .. 1 + s, as in DeiT III (Touvron et al. 2022, arXiv 2204.07118, "3-Augment": s = 0.3).

    Args:
        frames_BTHWC: decoded frames, uint8 (B, T, H, W, 3), RGB.
        config: which augmentations to apply.
        key: seed and step.
        clip_ids: int64 array (B,), sample id times views plus view; selects the random numbers of each clip.

    Returns:
        uint8 (B, T, H, W, 3) on the same device; the input tensor itself if no augmentation is configured.

    Raises:
        ValueError: when there is not exactly one id per clip.
    """
    if config.color_jitter == 0 and config.rand_augment_ops == 0:
        return frames_BTHWC
    if len(clip_ids) != len(frames_BTHWC):
        raise ValueError(f"expected one id per clip, got {len(clip_ids)} ids for {len(frames_BTHWC)} clips")
    augmented_BTHWC = frames_BTHWC.clone()
    for row, clip_id in enumerate(clip_ids):
        generator = step_generator("augment", key, index=int(clip_id))
        frames_TCHW = frames_BTHWC[row].permute(0, 3, 1, 2)
        frames_TCHW = _rand_augment(frames_TCHW, config, generator=generator)
        frames_TCHW = _jitter_color(frames_TCHW, config.color_jitter, generator=generator)
        augmented_BTHWC[row] = frames_TCHW.permute(0, 2, 3, 1)
    return augmented_BTHWC


def _rand_augment(frames_TCHW: Tensor, config: AugmentConfig, *, generator: np.random.Generator) -> Tensor:
    operations = tuple(OPERATIONS.values())
    for _ in range(config.rand_augment_ops):
        operation = operations[generator.integers(len(operations))]
        magnitude = generator.normal(config.rand_augment_magnitude, MAGNITUDE_STD)
        sign = 1.0 if generator.random() < 0.5 else -1.0
        if generator.random() < APPLY_PROBABILITY:
            strength = float(np.clip(magnitude, 0.0, MAX_MAGNITUDE)) / MAX_MAGNITUDE
            frames_TCHW = operation(frames_TCHW, strength, sign)
    return frames_TCHW


def _jitter_color(frames_TCHW: Tensor, strength: float, *, generator: np.random.Generator) -> Tensor:
    if strength == 0:
        return frames_TCHW
    adjustments = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
    for i in generator.permutation(len(adjustments)):
        frames_TCHW = adjustments[i](frames_TCHW, generator.uniform(1.0 - strength, 1.0 + strength))
    return frames_TCHW


# Maps frames, a strength in [0, 1] and a sign to new frames; some operations ignore strength and sign.
Operation = Callable[[Tensor, float, float], Tensor]


def _enhanced(adjust: Callable[[Tensor, float], Tensor]) -> Operation:
    """Make an operation whose factor lies on either side of 1 (no change) and is at least 0.1."""

    def enhance(frames_TCHW: Tensor, strength: float, sign: float) -> Tensor:
        return adjust(frames_TCHW, max(0.1, 1.0 + sign * _MAX_ENHANCEMENT * strength))

    return enhance


def _posterize(frames_TCHW: Tensor, strength: float, _sign: float) -> Tensor:
    return functional.posterize(frames_TCHW, max(1, 4 - int(4 * strength)))


def _solarize(frames_TCHW: Tensor, strength: float, _sign: float) -> Tensor:
    threshold = 256 - int(256 * strength)
    return functional.solarize(frames_TCHW, threshold) if threshold <= 255 else frames_TCHW


def _rotate(frames_TCHW: Tensor, strength: float, sign: float) -> Tensor:
    angle = sign * _MAX_ROTATION * strength
    return functional.rotate(frames_TCHW, angle, InterpolationMode.BILINEAR, fill=_FILL)


def _affine(frames_TCHW: Tensor, *, shear: tuple[float, float], shift: tuple[float, float]) -> Tensor:
    """Shear by slopes (pixels per pixel) about the upper left corner, or shift by fractions of the sides."""
    height, width = frames_TCHW.shape[-2:]
    return functional.affine(
        frames_TCHW,
        angle=0.0,
        translate=[shift[0] * width, shift[1] * height],
        scale=1.0,
        shear=[math.degrees(math.atan(slope)) for slope in shear],
        interpolation=InterpolationMode.BILINEAR,
        fill=_FILL,
        center=[0.0, 0.0],
    )


OPERATIONS: Final[dict[str, Operation]] = {
    "auto-contrast": lambda frames, _strength, _sign: functional.autocontrast(frames),
    "equalize": lambda frames, _strength, _sign: functional.equalize(frames),
    "invert": lambda frames, _strength, _sign: functional.invert(frames),
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "saturation": _enhanced(functional.adjust_saturation),
    "contrast": _enhanced(functional.adjust_contrast),
    "brightness": _enhanced(functional.adjust_brightness),
    "sharpness": _enhanced(functional.adjust_sharpness),
    "shear-x": lambda frames, s, sign: _affine(frames, shear=(sign * _MAX_SHEAR * s, 0.0), shift=(0.0, 0.0)),
    "shear-y": lambda frames, s, sign: _affine(frames, shear=(0.0, sign * _MAX_SHEAR * s), shift=(0.0, 0.0)),
    "shift-x": lambda frames, s, sign: _affine(frames, shear=(0.0, 0.0), shift=(sign * _MAX_SHIFT * s, 0.0)),
    "shift-y": lambda frames, s, sign: _affine(frames, shear=(0.0, 0.0), shift=(0.0, sign * _MAX_SHIFT * s)),
}
