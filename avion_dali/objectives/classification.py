"""Recognition: soft-target cross-entropy over classes, with mixed clips.

Axes: B clips, V views of a clip, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from avion_dali.config import AugmentConfig, ClassificationConfig, Normalization
from avion_dali.contracts import ClipBatch, UserError
from avion_dali.device_ops.mixing import mix_clips
from avion_dali.device_ops.normalize import normalize_frames
from avion_dali.device_ops.randomness import StepKey
from avion_dali.objectives.clips import batch_augmentation, compute_dtype, repeat_for_views


class Classification:
    """Mean cross-entropy of a step's views with their targets, which mixing and label smoothing make soft.

    A sample's loss needs no other sample, so micro-batches and ranks may each back-propagate their own: the
    mean is that of one large batch, exactly without mixing. With mixing the weight and the box are the same
    for the whole step, but a clip's partner lies in its own micro-batch, so the pairs (not their law) depend
    on how the batch is cut.
    """

    couples_samples = False

    def __init__(
        self,
        config: ClassificationConfig,
        augment: AugmentConfig,
        *,
        normalization: Normalization,
        num_classes: int,
    ) -> None:
        """Create the objective.

        Args:
            config: mixing and label smoothing.
            augment: what is done to the pixels before.
            normalization: pixel statistics the model expects.
            num_classes: K, as many as the model's head has.
        """
        self.config, self.augment, self.normalization = config, augment, normalization
        self.num_classes = num_classes

    def outputs(self, model: nn.Module, batch: ClipBatch, key: StepKey) -> tuple[Tensor, Tensor]:
        """Augment, mix and classify one micro-batch.

        Nothing here waits for the device, but for RandAugment's geometric operations, whose small tables
        torchvision copies one by one.

        Args:
            model: maps frames (B*V, 3, T, H, W) to logits (B*V, K).
            batch: B samples of V views each, with labels.
            key: the optimizer step.

        Returns:
            Logits and targets, float32 (B*V, K).

        Raises:
            UserError: the batch has no labels.
        """
        if batch.labels_B is None:
            raise UserError(
                "classification needs labels, and this manifest has none; build it with a class for every row"
            )
        frames_BCTHW = normalize_frames(
            batch.frames_BTHWC,
            self.normalization,
            dtype=compute_dtype(batch.frames_BTHWC.device),
            augmentation=batch_augmentation(batch, self.augment, key),
        )
        frames_BCTHW, targets_BK = mix_clips(
            frames_BCTHW,
            repeat_for_views(batch, batch.labels_B),
            num_classes=self.num_classes,
            config=self.config,
            key=key,
        )
        logits_BK: Tensor = model(frames_BCTHW)
        return logits_BK.float(), targets_BK

    def loss(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy.

        Args:
            outputs: logits and targets (B*V, K).

        Returns:
            Float32 scalar, and `accuracy`: the share of views whose highest logit is the class with the
            largest share of the target (with mixing an underestimate of what the model can do).
        """
        logits_BK, targets_BK = outputs
        with torch.autocast(logits_BK.device.type, enabled=False):
            loss = functional.cross_entropy(logits_BK.float(), targets_BK)
        hits_B = logits_BK.detach().argmax(dim=1) == targets_BK.argmax(dim=1)
        return loss, {"accuracy": hits_B.float().mean()}
