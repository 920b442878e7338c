"""What the objectives ask a batch before a model is trained on it.

Axes: B clips, V views of a clip, T frames, H W pixels, C channels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from avion_dali.config import AugmentConfig
from avion_dali.contracts import ClipBatch, UserError
from avion_dali.device_ops.augment import Augmentation
from avion_dali.device_ops.randomness import StepKey


def view_clip_ids(batch: ClipBatch) -> np.ndarray:
    """Number every row of frames by sample and view, so that its random draws are its own wherever it lies.

    Args:
        batch: B samples of V views each.

    Returns:
        int64 (B*V,): sample id times V plus view.
    """
    views = len(batch.view_ids) // max(len(batch), 1)
    clip_ids: np.ndarray = np.repeat(batch.sample_ids, views) * views + batch.view_ids
    return clip_ids


def repeat_for_views(batch: ClipBatch, values_B: Tensor) -> Tensor:
    """Repeat what belongs to a sample for each of its views: (B, ...) -> (B*V, ...)."""
    return values_B.repeat_interleave(len(batch.view_ids) // max(len(batch), 1), dim=0)


def require_one_view(batch: ClipBatch, objective: str) -> None:
    """Refuse repeated augmentation where every clip is compared with one text.

    Args:
        batch: the batch.
        objective: its name, for the message.

    Raises:
        UserError: clips have several views.
    """
    if len(batch.view_ids) != len(batch):
        raise UserError(
            f"{objective} training takes one view a clip, got {len(batch.view_ids)} of {len(batch)}; "
            "set data.repeats to 1"
        )


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return the precision the model's first layer will run in under the caller's autocast."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return torch.float32


def batch_augmentation(batch: ClipBatch, config: AugmentConfig, key: StepKey) -> Augmentation | None:
    """Say how a batch is augmented; its random draws depend on (seed, step, sample, view) alone.

    Args:
        batch: decoded clips.
        config: what is done to the pixels.
        key: the optimizer step.

    Returns:
        What `normalize_frames` takes; None when nothing is to be done.
    """
    if not (config.color_jitter or config.rand_augment_ops or config.erasing_probability):
        return None
    return Augmentation(config, key, view_clip_ids(batch))
