"""Random erasing: fills a box of a clip with noise. Axes: B clips, C channels, T frames, H W pixels."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import torch
from torch import Tensor

from avion_dali.device_ops.step_key import StepKey, step_generator

AREA: Final = (0.02, 1 / 3)  # fraction of the frame
ASPECT: Final = (0.3, 1 / 0.3)  # height / width
_ATTEMPTS: Final = 100


def erase_boxes(frames_BCTHW: Tensor, probability: float, *, key: StepKey, clip_ids: np.ndarray) -> Tensor:
    """Fill a box of randomly chosen clips with normal noise; the box is the same in all frames of a clip.

    Source: Zhong et al. 2017, arXiv 1708.04896, algorithm 1, as VideoMAE uses it: separate noise per pixel
    instead of one color, and the logarithm of the aspect ratio is uniform. The chosen clips, their boxes and
    the seeds of the noise are the same on every device. The noise itself is drawn on the device of the frames
    and therefore reproducible only on the same kind of device; drawing it on the CPU would cost milliseconds
    per clip.

    Args:
        frames_BCTHW: normalized frames, floating (B, 3, T, H, W).
        probability: probability that a box of a clip is erased.
        key: seed and step.
        clip_ids: int64 array (B,), sample id times views plus view; selects the random numbers of each clip.

    Returns:
        Frames of the same shape, dtype and device; the input tensor itself if no clip is chosen.

    Raises:
        ValueError: when the frames are not floating point or there is not exactly one id per clip.
    """
    if not frames_BCTHW.is_floating_point() or len(clip_ids) != len(frames_BCTHW):
        raise ValueError(
            f"expected floating-point frames and one id per clip, got {frames_BCTHW.dtype} "
            f"{tuple(frames_BCTHW.shape)} and {len(clip_ids)} ids"
        )
    if probability == 0:
        return frames_BCTHW
    erased_BCTHW = frames_BCTHW
    noise = torch.Generator(frames_BCTHW.device)
    for row, clip_id in enumerate(clip_ids):
        generator = step_generator("erase", key, index=int(clip_id))
        box = _draw_box(generator, probability, height=frames_BCTHW.shape[-2], width=frames_BCTHW.shape[-1])
        if box is None:
            continue
        if erased_BCTHW is frames_BCTHW:
            erased_BCTHW = frames_BCTHW.clone()
        noise.manual_seed(int(generator.integers(2**63)))
        erased_BCTHW[row, :, :, box[0], box[1]].normal_(generator=noise)
    return erased_BCTHW


def _draw_box(
    generator: np.random.Generator, probability: float, *, height: int, width: int
) -> tuple[slice, slice] | None:
    """Draw the rows and columns of a clip's box; None if nothing is erased."""
    if generator.random() >= probability:
        return None
    for _ in range(_ATTEMPTS):
        area = generator.uniform(*AREA) * height * width
        aspect = math.exp(generator.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        box_height, box_width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_height < height and 0 < box_width < width:
            top = int(generator.integers(height - box_height + 1))
            left = int(generator.integers(width - box_width + 1))
            return slice(top, top + box_height), slice(left, left + box_width)
    return None
