"""Derives a configuration from weights of other projects, so that they can be evaluated without training."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from avion_dali.config import DataConfig, ModelConfig, ObjectiveConfig, TrainConfig
from avion_dali.models.weight_facts import WeightFacts

# VideoMAE's files contain no position tables to infer these from; all its published models take such clips.
VIDEOMAE_FRAMES = 16
VIDEOMAE_FRAME_SIZE = 224


def plain_config(facts: WeightFacts) -> dict[str, Any]:
    """Return the configuration that builds the model of these weights, as plain values.

    Args:
        facts: facts about the weights.

    Returns:
        Input of `TrainConfig.from_plain`; empty if no `model.size` has these dimensions.
    """
    if facts.size is None:
        return {}
    names: dict[str, Any] = {
        "dual-encoder": "contrastive",
        "classifier": "classification",
        "masked-video": "masked-video",
        "video-tower": "classification",  # with a new head; useful for features and as initial weights
    }
    model = ModelConfig(
        encoder=facts.encoder,
        size=facts.size,
        embed_dim=facts.embed_dim or ModelConfig.embed_dim,
        activation=facts.activation or "auto",
        norm_eps=facts.norm_eps,
        pre_norm=facts.pre_norm,
        context_length=facts.context_length or ModelConfig.context_length,
    )
    data = DataConfig(
        num_frames=facts.num_frames or VIDEOMAE_FRAMES,
        frame_size=facts.frame_size or VIDEOMAE_FRAME_SIZE,
        normalization=facts.normalization or DataConfig.normalization,
    )
    return asdict(TrainConfig(model=model, data=data, objective=ObjectiveConfig(name=names[facts.role])))
