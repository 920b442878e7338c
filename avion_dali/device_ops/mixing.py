"""Mixup and CutMix of clips, with their soft targets.

Axes: B clips, C channels, T frames, H W pixels, K classes.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from avion_dali.config import ClassificationConfig
from avion_dali.device_ops.step_key import StepKey, step_generator


def mix_clips(
    frames_BCTHW: Tensor, labels_B: Tensor, *, num_classes: int, config: ClassificationConfig, key: StepKey
) -> tuple[Tensor, Tensor]:
    """Mix clip i of a micro-batch with clip B - 1 - i; the weight and the box are the same for a whole step.

    Mixup (Zhang et al. 2018, arXiv 1710.09412, equation 1) averages all pixels; CutMix (Yun et al. 2019, arXiv
    1905.04899, equations 1 and 2) pastes one box of the partner into all frames. The weight of a clip's own
    label is the fraction of its own pixels that remain, which accounts for boxes cut off at the frame's edge.

    Args:
        frames_BCTHW: normalized frames, floating (B, 3, T, H, W).
        labels_B: int64 (B,), class indices in [0, K).
        num_classes: K.
        config: how and how often to mix, and label smoothing.
        key: seed and step.

    Returns:
        Frames of the same shape and dtype (the input tensor itself if this step does not mix), and targets,
        float32 (B, K), whose rows sum to 1.

    Raises:
        ValueError: when there is not exactly one label per clip.
    """
    if labels_B.shape != frames_BCTHW.shape[:1]:
        raise ValueError(
            f"expected one label per clip, got labels of shape {tuple(labels_B.shape)} for "
            f"{frames_BCTHW.shape[0]} clips"
        )
    targets_BK = smooth_targets(labels_B, num_classes=num_classes, smoothing=config.label_smoothing)
    generator = step_generator("mix", key)
    if generator.random() >= config.mix_probability or config.mixup == config.cutmix == 0:
        return frames_BCTHW, targets_BK
    is_cutmix = config.mixup == 0 or (config.cutmix > 0 and generator.random() < config.switch_probability)
    alpha = config.cutmix if is_cutmix else config.mixup
    own_share = float(generator.beta(alpha, alpha))
    if is_cutmix:
        frames_BCTHW, own_share = _paste_box(frames_BCTHW, own_share, generator=generator)
    else:
        frames_BCTHW = torch.lerp(frames_BCTHW.flip(0), frames_BCTHW, own_share)
    return frames_BCTHW, torch.lerp(targets_BK.flip(0), targets_BK, own_share)


def smooth_targets(labels_B: Tensor, *, num_classes: int, smoothing: float) -> Tensor:
    """Return one-hot targets with a part of the probability spread over all classes.

    Source: Szegedy et al. 2016, arXiv 1512.00567, section 7.

    Args:
        labels_B: int64 (B,), class indices in [0, K).
        num_classes: K.
        smoothing: the part that is spread, in [0, 1).

    Returns:
        float32 (B, K), rows sum to 1.
    """
    one_hot_BK = functional.one_hot(labels_B, num_classes).float()
    return one_hot_BK * (1.0 - smoothing) + smoothing / num_classes


def _paste_box(
    frames_BCTHW: Tensor, own_share: float, *, generator: np.random.Generator
) -> tuple[Tensor, float]:
    """Paste one box of the partner's pixels; also return the fraction of a clip's own pixels that remain."""
    height, width = frames_BCTHW.shape[-2:]
    side = math.sqrt(1.0 - own_share)
    top, bottom = _draw_span(height, int(height * side), generator=generator)
    left, right = _draw_span(width, int(width * side), generator=generator)
    mixed_BCTHW = frames_BCTHW.clone()
    mixed_BCTHW[..., top:bottom, left:right] = frames_BCTHW[..., top:bottom, left:right].flip(0)
    return mixed_BCTHW, 1.0 - (bottom - top) * (right - left) / (height * width)


def _draw_span(size: int, length: int, *, generator: np.random.Generator) -> tuple[int, int]:
    """Draw a span around a random center; return its ends, clipped to the frame."""
    start = int(generator.integers(size)) - length // 2
    return max(0, start), min(size, start + length)
