"""VideoMAE pre-training, evaluated by the held-out loss with fixed masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, cast

import torch
from torch import nn

from avion_dali.config import TrainConfig
from avion_dali.contracts import ClipBatch
from avion_dali.data.manifest import Manifest
from avion_dali.device_ops.step_key import StepKey
from avion_dali.models.masked_video import MaskedVideo, build_masked_video
from avion_dali.objectives.masked_reconstruction import MaskedReconstruction
from avion_dali.tasks.sample_means import PerSample
from avion_dali.tasks.task import Task

FIXED_MASKS: Final = StepKey(seed=0, step=0)


@dataclass(frozen=True)
class MaskedResult:
    """Result of an evaluation of masked-video pre-training, the same on every rank.

    Args:
        loss: mean squared error.
        clips: number of samples in the mean.
        unreadable: number of clips that could not be read; the mean excludes them.
    """

    loss: float
    clips: int
    unreadable: int

    def metrics(self) -> dict[str, float]:
        """Return the numbers to log; `reconstruction` is the negative error, so that larger is better."""
        return {
            "reconstruction": -self.loss,
            "loss": self.loss,
            "clips": self.clips,
            "unreadable": self.unreadable,
        }


class ReconstructionScorer:
    """Scores samples by their mean reconstruction error.

    A sample's mask depends only on its manifest row and view. It is the same in every evaluation and run and
    for any number of ranks, so results are comparable.

    Args:
        objective: the objective of the training.
    """

    def __init__(self, objective: MaskedReconstruction) -> None:
        self.objective = objective

    def scores(self, model: nn.Module, batch: ClipBatch) -> torch.Tensor:
        """Return the mean squared error of each view, float32 (B*V, 1).

        Args:
            model: a `MaskedVideo`.
            batch: B samples of V views each.
        """
        (errors_B,) = self.objective.outputs(model, batch, FIXED_MASKS)
        return errors_B[:, None]

    def result(self, model: nn.Module, samples: PerSample, device: torch.device) -> MaskedResult:
        """Average over the samples.

        Args:
            model: not used.
            samples: mean errors.
            device: not used.
        """
        del model, device
        loss = float(samples.means_SX.mean(dtype="float64"))
        return MaskedResult(loss, len(samples.sample_ids), samples.unreadable)


def _build_model(config: TrainConfig, _num_classes: int) -> nn.Module:
    return build_masked_video(
        config.model,
        num_frames=config.data.num_frames,
        frame_size=config.data.frame_size,
        decoder_depth=config.objective.masked_video.decoder_depth,
    )


def _build_objective(config: TrainConfig, model: nn.Module, _manifest: Manifest) -> MaskedReconstruction:
    masked = cast(MaskedVideo, model)
    return MaskedReconstruction(
        config.objective.masked_video,
        normalization=config.data.normalization,
        time_slots=masked.time_slots,
        places=masked.places,
    )


def _build_scorer(config: TrainConfig, model: nn.Module, manifest: Manifest) -> ReconstructionScorer:
    return ReconstructionScorer(_build_objective(config, model, manifest))


MASKED_VIDEO: Final = Task(
    command="pretrain",
    best_metric="reconstruction",
    build_model=_build_model,
    build_objective=_build_objective,
    build_scorer=_build_scorer,
    has_frozen_control=False,
    # As in fine-tuning, an embedding is the normalized mean of the encoder's tokens.
    hides_tubes=True,
    embeds_as="classification",
)
