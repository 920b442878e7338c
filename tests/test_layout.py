"""What towers declare exists in them, and is found wherever the tower stands in a model."""

import pytest
import torch
from torch import nn

from avion_dali.config import ModelConfig
from avion_dali.models.dual_encoder import build_dual_encoder
from avion_dali.models.layout import TowerLayout, declared_layouts
from avion_dali.models.masked_video import build_masked_video
from avion_dali.models.towers import ENCODERS

NAMES = (*ENCODERS, "masked")


def build(name: str) -> nn.Module:
    """A dual encoder with an encoder, or the masked-video model; shapes only."""
    with torch.device("meta"):
        if name != "masked":
            return build_dual_encoder(ModelConfig(encoder=name, size="tiny"), num_frames=4, frame_size=32)
        config = ModelConfig(encoder="videomae", size="tiny")
        return build_masked_video(config, num_frames=4, frame_size=32, decoder_depth=2)


@pytest.mark.parametrize("name", NAMES)
def test_everything_declared_exists(name):
    model = build(name)
    layouts, parameters = declared_layouts(model), dict(model.named_parameters())
    prefixes = {"", "encoder.", "decoder."} if name == "masked" else {"visual.", "textual."}
    assert layouts.keys() == prefixes
    for prefix, layout in layouts.items():
        tables = (*layout.undecayed, *layout.vocabulary, *filter(None, [layout.patches]))
        assert {prefix + table for table in tables} <= parameters.keys()
        modules = (*layout.stem, *layout.not_pretrained, *filter(None, [layout.optional_pre_norm]))
        for module in modules:
            assert isinstance(model.get_submodule(prefix + module), nn.Module)
        if layout.blocks:
            blocks = model.get_submodule(prefix + layout.blocks)
            assert isinstance(blocks, nn.ModuleList) and len(blocks) > 0
            assert all(hasattr(blocks[0], part) for part in layout.time_parts)
        in_front = [
            key for key in parameters if key.startswith(prefix) and layout.in_stem(key.removeprefix(prefix))
        ]
        assert in_front or not layout.stem


@pytest.mark.parametrize("name", NAMES)
def test_no_table_of_positions_or_tokens_is_forgotten(name):
    """Whatever is a parameter of a tower itself, and no projection, is one."""
    model = build(name)
    for prefix, layout in declared_layouts(model).items():
        tower = model.get_submodule(prefix.removesuffix("."))
        own = {key for key, _ in tower.named_parameters(recurse=False)}
        assert own - {"image_projection", "text_projection"} <= set(layout.undecayed)


def test_names_in_front_of_the_blocks():
    layout = TowerLayout(stem=("conv",), tokens=("cls",), frame_positions=("time",))
    assert layout.undecayed == ("cls", "time")
    assert layout.in_stem("conv.weight") and layout.in_stem("cls") and layout.in_stem("time")
    assert not layout.in_stem("conv1.weight") and not layout.in_stem("time.weight")
    assert declared_layouts(nn.Linear(2, 2)) == {}
