"""Turns the decoded frames of a batch into the input of a model during training.

Axes: B clips, V views of a clip, T frames, H W pixels, C channels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from avion_dali.config import AugmentConfig, Normalization
from avion_dali.contracts import ClipBatch, UserError
from avion_dali.device_ops.augment import augment_frames
from avion_dali.device_ops.erasing import erase_boxes
from avion_dali.device_ops.normalize import normalize_frames
from avion_dali.device_ops.step_key import StepKey


def view_clip_ids(batch: ClipBatch) -> np.ndarray:
    """Number each clip of a batch by sample and view, so that its random draws do not depend on its position.

    Args:
        batch: B samples of V views each.

    Returns:
        int64 (B*V,): sample id times V plus view.
    """
    views = len(batch.view_ids) // max(len(batch), 1)
    clip_ids: np.ndarray = np.repeat(batch.sample_ids, views) * views + batch.view_ids
    return clip_ids


def repeat_for_views(batch: ClipBatch, values_B: Tensor) -> Tensor:
    """Repeat the values of each sample for all its views: (B, ...) -> (B*V, ...)."""
    return values_B.repeat_interleave(len(batch.view_ids) // max(len(batch), 1), dim=0)


def require_one_view(batch: ClipBatch, objective: str) -> None:
    """Reject several views per clip for objectives that compare each clip with one text.

    Args:
        batch: the batch.
        objective: name of the objective, for the message.

    Raises:
        UserError: the clips have several views.
    """
    if len(batch.view_ids) != len(batch):
        raise UserError(
            f"{objective} training needs one view per clip, got {len(batch.view_ids)} views of {len(batch)} "
            "clips; set data.repeats to 1"
        )


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which the model's first layer runs under the caller's autocast."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return torch.float32


def training_frames(
    batch: ClipBatch, normalization: Normalization, *, augment: AugmentConfig, key: StepKey
) -> Tensor:
    """Augment, normalize and erase a batch's frames; random draws depend only on (seed, step, sample, view).

    Args:
        batch: decoded clips.
        normalization: pixel statistics that the model expects.
        augment: augmentation of the pixels.
        key: the optimizer step.

    Returns:
        (B*V, 3, T, H, W) in the dtype of the caller's autocast.
    """
    clip_ids = view_clip_ids(batch)
    frames_BTHWC = augment_frames(batch.frames_BTHWC, augment, key, clip_ids)
    frames_BCTHW = normalize_frames(frames_BTHWC, normalization, dtype=compute_dtype(batch.frames_BTHWC.device))
    return erase_boxes(frames_BCTHW, augment.erasing_probability, key, clip_ids)
