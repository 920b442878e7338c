"""Converts decoded uint8 frames to normalized floating-point frames on the device, with augmentation.

Frames stay uint8 until here, which quarters the bytes in every queue and over PCIe.
Axes: B clips, T frames, H W pixels, C channels.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from avion_dali.config import Normalization
from avion_dali.device_ops.augment import Augmentation, augment_frames
from avion_dali.device_ops.erasing import erase_boxes


class PixelStatistics(NamedTuple):
    """Mean and standard deviation per channel (red, green, blue) of pixel values in 0..255."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


_CLIP_STD: Final = (68.5005327, 66.6321579, 70.32316305)

# `openai`: CLIP's published constants times 255. `openai-avion`: the same except for the red mean, which is
# 0.42481 instead of 0.48145466 in LaViLa and AVION; their released weights were trained with it.
PIXEL_STATISTICS: Final[dict[Normalization, PixelStatistics]] = {
    "openai": PixelStatistics((122.7709383, 116.7460125, 104.09373615), _CLIP_STD),
    "openai-avion": PixelStatistics((108.3272985, 116.7460125, 104.09373615), _CLIP_STD),
    "imagenet": PixelStatistics((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
}


def normalize_frames(
    frames_BTHWC: Tensor,
    normalization: Normalization,
    *,
    dtype: torch.dtype = torch.float32,
    augmentation: Augmentation | None = None,
) -> Tensor:
    """Augment the colors, subtract the mean of each channel, divide by its deviation, and erase boxes.

    The arithmetic is float32 for every `dtype`, because half precision loses accuracy near the mean.

    Args:
        frames_BTHWC: decoded frames, uint8 (B, T, H, W, 3), RGB.
        normalization: a key of `PIXEL_STATISTICS`.
        dtype: floating type of the result.
        augmentation: what is done before and after in training; nothing by default.

    Returns:
        (B, 3, T, H, W) of `dtype` on the same device, a view of channels-last memory.

    Raises:
        ValueError: when the frames are not uint8 RGB, or not as many as the augmentation has ids.
    """
    if frames_BTHWC.dtype != torch.uint8 or frames_BTHWC.ndim != 5 or frames_BTHWC.shape[-1] != 3:
        raise ValueError(f"frames must be uint8 (B, T, H, W, 3), got {frames_BTHWC.dtype} {frames_BTHWC.shape}")
    if augmentation is not None:
        frames_BTHWC = augment_frames(frames_BTHWC, *augmentation)
    statistics = PIXEL_STATISTICS[normalization]
    std_C = torch.tensor(statistics.std, dtype=torch.float64)
    mean_C = torch.tensor(statistics.mean, dtype=torch.float64)
    # One constant per value of a pixel row, because broadcasting along only 3 channels prevents vectorization
    # on CPUs.
    columns = frames_BTHWC.shape[3]
    scale_X = (1.0 / std_C).float().repeat(columns).to(frames_BTHWC.device, non_blocking=True)
    shift_X = (-mean_C / std_C).float().repeat(columns).to(frames_BTHWC.device, non_blocking=True)
    pixels_BTHX = frames_BTHWC.flatten(-2).float()
    torch.addcmul(shift_X, pixels_BTHX, scale_X, out=pixels_BTHX)
    frames_BCTHW = pixels_BTHX.to(dtype).view(frames_BTHWC.shape).permute(0, 4, 1, 2, 3)
    if augmentation is not None:
        config, key, clip_ids = augmentation
        frames_BCTHW = erase_boxes(frames_BCTHW, config.erasing_probability, key=key, clip_ids=clip_ids)
    return frames_BCTHW
