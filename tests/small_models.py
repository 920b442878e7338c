"""Models of a few thousand parameters, as published ones are built, for tests of weights."""

import argparse
import dataclasses
from pathlib import Path

import torch
from torch import nn

from avion_dali.config import ModelConfig, ModelSize
from avion_dali.models.blocks import VideoTowerConfig
from avion_dali.models.classifier import Classifier
from avion_dali.models.convert import from_ours
from avion_dali.models.dual_encoder import DualEncoder, build_dual_encoder
from avion_dali.models.find_facts import guessed_facts
from avion_dali.models.masked_video import MaskedVideo
from avion_dali.models.presets import PRESETS
from avion_dali.models.text_tower import TextTower, TextTowerConfig
from avion_dali.models.towers import ENCODERS, encoder_name
from avion_dali.models.weight_facts import Family, WeightFacts

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
    return randomize(DualEncoder(ENCODERS[encoder](config), TextTower(text_config)), seed)


def small_classifier(encoder: str = "vit", *, seed: int = 0, classes: int = 5, **tower) -> Classifier:
    torch.manual_seed(seed)
    visual = ENCODERS[encoder](dataclasses.replace(SHAPE, embed_dim=None, **tower))
    return randomize(Classifier(visual, classes), seed)


def small_masked_video(*, seed: int = 0, **tower) -> MaskedVideo:
    torch.manual_seed(seed)
    config = dataclasses.replace(SHAPE, embed_dim=None, **tower)
    return randomize(MaskedVideo(config, decoder_depth=1), seed)


def written(model: nn.Module, layout: str) -> dict[str, torch.Tensor]:
    """A model's weights in another project's names."""
    encoder = "videomae" if isinstance(model, MaskedVideo) else encoder_name(model.visual)
    return from_ours(model.state_dict(), layout, encoder=encoder)


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def save_as(path: Path, model: torch.nn.Module, layout: str, *, key: str = "state_dict") -> str:
    """A checkpoint as the reference programs write them: DDP's prefix, options in a Namespace."""
    state = {f"module.{name}": tensor for name, tensor in written(model, layout).items()}
    torch.save({key: state, "epoch": 3, "args": argparse.Namespace(lr=1.0)}, path)
    return str(path)


def small_open_clip(kind: str = "CLIP", *, quick_gelu: bool = False) -> nn.Module:
    """One of open_clip's own models, of the sizes of `small_dual_encoder` with one frame."""
    import open_clip

    vision = {"layers": 2, "width": 64, "head_width": 16, "patch_size": 8, "image_size": 32}
    text = {"context_length": 12, "vocab_size": 100, "width": 32, "heads": 4, "layers": 2}
    torch.manual_seed(4)
    return randomize(getattr(open_clip, kind)(16, vision, text, quick_gelu=quick_gelu))


def save_open_clip(path: Path) -> str:
    torch.save({"state_dict": small_open_clip().state_dict()}, path)
    return f"open_clip:ViT-B-16-quickgelu//{path}"


def real_facts(
    encoder: str = "vit", size: ModelSize = "vit_b16", family: Family = "avion", **known
) -> WeightFacts:
    """What weights of a published size are, from their shapes alone."""
    with torch.device("meta"):
        model = build_dual_encoder(
            ModelConfig(encoder=encoder, size=size), num_frames=4, frame_size=PRESETS[size].image_size
        )
    return guessed_facts(model.state_dict(), family, known=known)
