"""Models of a few thousand parameters, as published ones are built, for tests of weights."""

import dataclasses

import torch
from torch import nn

from avion_dali.models.blocks import VideoTowerConfig
from avion_dali.models.classifier import Classifier
from avion_dali.models.dual_encoder import DualEncoder
from avion_dali.models.masked_video import MaskedVideo
from avion_dali.models.text import TextTowerConfig, build_text_tower
from avion_dali.models.timesformer import TimeSformer
from avion_dali.models.videomae import VideoMAETower
from avion_dali.models.vit import VideoTower

TOWERS = {"vit": VideoTower, "timesformer": TimeSformer, "videomae": VideoMAETower}
SHAPE = VideoTowerConfig(32, 8, 4, 64, 2, 4, 16)
TEXT = TextTowerConfig(12, 100, 32, 2, 4, 16)


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move every parameter, so that none equals its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def small_dual_encoder(
    encoder: str = "vit", *, seed: int = 0, text: dict | None = None, **tower
) -> DualEncoder:
    config = dataclasses.replace(SHAPE, **tower)
    text_config = dataclasses.replace(
        TEXT, activation=config.activation, embed_dim=config.embed_dim, **(text or {})
    )
    torch.manual_seed(seed)
    return randomize(DualEncoder(TOWERS[encoder](config), build_text_tower(text_config)), seed)


def small_classifier(encoder: str = "vit", *, seed: int = 0, classes: int = 5, **tower) -> Classifier:
    torch.manual_seed(seed)
    visual = TOWERS[encoder](dataclasses.replace(SHAPE, embed_dim=None, **tower))
    return randomize(Classifier(visual, classes), seed)


def small_masked_video(*, seed: int = 0, **tower) -> MaskedVideo:
    torch.manual_seed(seed)
    config = dataclasses.replace(SHAPE, embed_dim=None, **tower)
    return randomize(MaskedVideo(config, decoder_depth=1), seed)


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
