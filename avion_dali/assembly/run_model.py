"""Builds the model of a run and loads weights into it."""

from __future__ import annotations

import torch
from torch import nn

from avion_dali.assembly.resolve import ResolvedRun
from avion_dali.config import TrainConfig
from avion_dali.models.starting_weights import StartReport, StartWeights, apply_start


def build_model(run: ResolvedRun, *, num_classes: int) -> nn.Module:
    """Create the model of a run on its device, with weights drawn from the run's seed.

    Args:
        run: the resolved configuration.
        num_classes: classes of a recognition model; 0 for others.

    Raises:
        UserError: when the encoder does not fit the objective or the frames.
    """
    torch.manual_seed(run.config.run.seed)
    return run.task.build_model(run.config, num_classes).to(run.device)


def fill_model(model: nn.Module, start: StartWeights, config: TrainConfig) -> StartReport:
    """Load weights into a model; position tables are adapted to the configured frames.

    Args:
        model: the model that the configuration describes.
        start: the weights.
        config: the run's resolved configuration.

    Raises:
        UserError: when the weights do not fit the model.
    """
    assert config.model.activation != "auto"
    return apply_start(
        model,
        start,
        temporal_resize=config.model.temporal_resize,
        normalization=config.data.normalization,
        activation=config.model.activation,
    )


def load_model(run: ResolvedRun, start: StartWeights) -> nn.Module:
    """Create the model of a file of weights and load them, in evaluation mode.

    Args:
        run: the resolved configuration of the weights.
        start: the weights.

    Raises:
        UserError: when the weights do not fit the model.
    """
    # A video tower without a head gets an unused head with one class.
    model = build_model(run, num_classes=start.facts.num_classes or 1)
    fill_model(model, start, run.config)
    return model.eval()
