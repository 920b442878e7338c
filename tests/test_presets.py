import json
from pathlib import Path
from typing import get_args

import pytest
import torch

from avion_dali.config import ModelConfig, ModelSize
from avion_dali.models.convert import remap_avion_keys
from avion_dali.models.dual_encoder import build_dual_encoder
from avion_dali.models.presets import PRESETS

TABLES = json.loads((Path(__file__).parent / "clip_shapes.json").read_text())
SIZES = {
    "CLIP_VITB16_fast_flash_T4_dim256": ("vit_b16", 149_296_129, 303),
    "CLIP_VITB16_conv_mha_T4_dim256": ("vit_b16", 149_296_129, 303),
    "CLIP_VITL14_fast_flash_T4_dim256": ("vit_l14", 426_703_105, 447),
    "CLIP_VITL14_336PX_fast_flash_T4_dim256": ("vit_l14_336", 427_030_785, 447),
}


def expand(table: dict) -> dict[str, torch.Tensor]:
    """The full table: a row with `*` stands for one row per block of its tower."""
    weights = {}
    for key, shape in table["shapes"].items():
        blocks = range(table["layers"][key.split(".")[0]]) if ".*." in key else range(1)
        weights.update({key.replace("*", str(i)): torch.empty(shape, device="meta") for i in blocks})
    return weights


@pytest.mark.parametrize("name", SIZES)
def test_names_and_shapes_are_those_of_published_checkpoints(name):
    size, parameters, entries = SIZES[name]
    with torch.device("meta"):
        model = build_dual_encoder(ModelConfig(size=size), num_frames=4, frame_size=PRESETS[size].image_size)
    theirs = expand(TABLES[name])
    assert len(theirs) == entries
    ours = {key: tuple(weight.shape) for key, weight in model.state_dict().items()}
    assert ours == {key: tuple(weight.shape) for key, weight in remap_avion_keys(theirs).items()}
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_every_size_has_a_preset_that_fits_its_own_frames():
    assert set(PRESETS) == set(get_args(ModelSize))
    for preset in PRESETS.values():
        assert preset.image_size % preset.patch_size == 0
        assert preset.video_width % preset.video_heads == preset.text_width % preset.text_heads == 0


def test_tiny_runs_on_a_laptop():
    model = build_dual_encoder(ModelConfig(size="tiny"), num_frames=4, frame_size=64)
    video_parameters = sum(parameter.numel() for parameter in model.visual.parameters())
    assert video_parameters < 2_500_000
    assert model.visual(torch.zeros(1, 3, 4, 64, 64)).shape == (1, 256)
