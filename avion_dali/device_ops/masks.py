"""Masks that hide tubes of clips for the masked-video objective. Axes: B clips, N tokens."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from avion_dali.contracts import UserError
from avion_dali.device_ops.step_key import StepKey, step_generator


def tube_masks(clip_ids: np.ndarray, *, time_slots: int, places: int, ratio: float, key: StepKey) -> Tensor:
    """Hide the same positions of a clip in all time slots.

    Source: Tong et al. 2022, arXiv 2203.12602, section 3.3 (tube masking). A clip's mask depends only on (seed,
    step, clip id), not on the number of ranks or micro-batches.

    Args:
        clip_ids: int64 array (B,), sample id times views plus view.
        time_slots: number of tokens along time.
        places: number of tokens per time slot.
        ratio: fraction of the positions to hide; their number is rounded down.
        key: seed and step.

    Returns:
        bool (B, N) on the CPU, N = time_slots * places in token order (time slot by time slot), True = hidden;
        every row has the same number of hidden tokens.

    Raises:
        UserError: when the ratio hides no position or all positions.
    """
    num_hidden = int(ratio * places)
    if not 0 < num_hidden < places:
        raise UserError(
            f"config: objective.masked_video.mask_ratio = {ratio} hides {num_hidden} of the {places} positions "
            "of a frame; at least one must be hidden and one must stay visible"
        )
    is_masked_BP = np.zeros((len(clip_ids), places), dtype=bool)
    for row, clip_id in enumerate(clip_ids):
        order = step_generator("mask", key, index=int(clip_id)).permutation(places)
        is_masked_BP[row, order[:num_hidden]] = True
    return torch.from_numpy(np.tile(is_masked_BP, (1, time_slots)))
