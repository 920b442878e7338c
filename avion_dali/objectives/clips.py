"""What the objectives need of a batch before a model is trained on it.

Axes: B clips, V views of a clip, T frames, H W pixels, C channels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from avion_dali.config import AugmentConfig
from avion_dali.contracts import ClipBatch, UserError
from avion_dali.device_ops.augment import Augmentation
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


def batch_augmentation(batch: ClipBatch, config: AugmentConfig, *, key: StepKey) -> Augmentation | None:
    """Return how a batch is augmented; its random draws depend only on (seed, step, sample, view).

    Args:
        batch: decoded clips.
        config: augmentation of the pixels.
        key: the optimizer step.

    Returns:
        What `normalize_frames` takes; None when nothing is augmented.
    """
    if not (config.color_jitter or config.rand_augment_ops or config.erasing_probability):
        return None
    return Augmentation(config, key, view_clip_ids(batch))
