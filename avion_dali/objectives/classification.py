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
from avion_dali.device_ops.step_key import StepKey
from avion_dali.objectives.clips import batch_augmentation, compute_dtype, repeat_for_views


class Classification:
    """Mean cross-entropy between the logits and the soft targets of a step's views.

    Mixing and label smoothing make the targets soft. The loss of a sample does not depend on other samples, so
    each micro-batch and rank back-propagates its own mean. Without mixing, the result equals that of one large
    batch. With mixing, the weight and the box are the same for the whole step, but a clip's partner comes from
    its own micro-batch, so the pairs depend on the division into micro-batches; their distribution does not.
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
            augment: augmentation of the pixels before mixing.
            normalization: pixel statistics that the model expects.
            num_classes: K, the number of classes of the model's head.
        """
        self.config, self.augment, self.normalization = config, augment, normalization
        self.num_classes = num_classes

    def outputs(self, model: nn.Module, batch: ClipBatch, key: StepKey) -> tuple[Tensor, Tensor]:
        """Augment, mix and classify one micro-batch.

        Nothing here waits for the device, except RandAugment's geometric operations, for which torchvision
        copies small tables to the device one at a time.

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
                "classification needs labels, and this manifest has none; build it with a class in each row"
            )
        frames_BCTHW = normalize_frames(
            batch.frames_BTHWC,
            self.normalization,
            dtype=compute_dtype(batch.frames_BTHWC.device),
            augmentation=batch_augmentation(batch, self.augment, key=key),
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
        """Compute the mean cross-entropy.

        Args:
            outputs: logits and targets (B*V, K).

        Returns:
            Float32 scalar, and `accuracy`: the fraction of views whose highest logit belongs to the class with
            the largest target. With mixing it underestimates the accuracy on unmixed clips.
        """
        logits_BK, targets_BK = outputs
        with torch.autocast(logits_BK.device.type, enabled=False):
            loss = functional.cross_entropy(logits_BK.float(), targets_BK)
        hits_B = logits_BK.detach().argmax(dim=1) == targets_BK.argmax(dim=1)
        return loss, {"accuracy": hits_B.float().mean()}
