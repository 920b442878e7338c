"""VideoMAE: predicts the pixels of hidden tubes.

Axes: B clips (each view counts), N tokens, M hidden tokens, X pixels of a tube.
"""

from __future__ import annotations

from torch import Tensor, nn

from avion_dali.config import MaskedVideoConfig, Normalization
from avion_dali.contracts import ClipBatch
from avion_dali.device_ops.masks import tube_masks
from avion_dali.device_ops.normalize import normalize_frames
from avion_dali.device_ops.step_key import StepKey
from avion_dali.models.masked_video import tube_targets
from avion_dali.objectives.clips import compute_dtype, view_clip_ids


class MaskedReconstruction:
    """Mean squared error over the pixels of hidden tubes.

    Source: Tong et al. 2022, "VideoMAE", arXiv 2203.12602, section 3.1 and equation 1. Targets are the uint8
    frames as decoded; the mean of each tube is subtracted and the result divided by its standard deviation,
    unless the configuration turns this off. A clip's mask depends on (seed, step, sample, view), so its loss
    does not depend on other clips: the mean over micro-batches and ranks of equal size equals that of one large
    batch. Each view of a decoded clip (`data.repeats`) has its own mask.
    """

    couples_samples = False

    def __init__(
        self, config: MaskedVideoConfig, *, normalization: Normalization, time_slots: int, places: int
    ) -> None:
        """Create the objective.

        Args:
            config: fraction of tubes to hide, and form of the targets.
            normalization: pixel statistics that the model expects.
            time_slots: number of tokens along time in the model.
            places: number of tokens per time slot in the model.
        """
        self.config, self.normalization = config, normalization
        self.time_slots, self.places = time_slots, places

    def outputs(self, model: nn.Module, batch: ClipBatch, key: StepKey) -> tuple[Tensor]:
        """Hide tubes and predict them.

        Args:
            model: a `MaskedVideo`, or its data-parallel wrapper.
            batch: B samples of V views each.
            key: the optimizer step, which determines the masks.

        Returns:
            Mean squared error of each clip, float32 (B*V,).
        """
        is_masked_BN = tube_masks(
            view_clip_ids(batch),
            time_slots=self.time_slots,
            places=self.places,
            ratio=self.config.mask_ratio,
            key=key,
        )
        dtype = compute_dtype(batch.frames_BTHWC.device)
        frames_BCTHW = normalize_frames(batch.frames_BTHWC, self.normalization, dtype=dtype)
        predictions_BMX = model(frames_BCTHW, is_masked_BN)
        targets_BMX = tube_targets(batch.frames_BTHWC, is_masked_BN, normalize=self.config.normalize_target)
        # Squares are computed in float32, because half precision is too coarse.
        errors_BMX = (predictions_BMX.float() - targets_BMX) ** 2
        return (errors_BMX.mean(dim=(1, 2)),)

    def loss(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        """Average the errors over clips.

        Args:
            outputs: errors (B*V,).

        Returns:
            Float32 scalar, and an empty report.
        """
        return outputs[0].mean(), {}
