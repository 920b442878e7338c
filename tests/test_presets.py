import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from golden_fill import shape_table, videomae_flash_name

from avion_dali.config import ModelConfig, ModelSize
from avion_dali.models.classifier import build_classifier
from avion_dali.models.convert import from_ours, identify, remap_avion_keys, to_ours
from avion_dali.models.dual_encoder import build_dual_encoder
from avion_dali.models.find_facts import guessed_facts
from avion_dali.models.masked_video import build_masked_video
from avion_dali.models.presets import PRESETS
from avion_dali.models.towers import ENCODERS, build_video_tower, resolve_model
from avion_dali.models.weight_fitting import fit_weights

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


def shapes_and_count(model: torch.nn.Module) -> tuple[dict[str, tuple[int, ...]], int]:
    shapes = {key: tuple(weight.shape) for key, weight in model.state_dict().items()}
    return shapes, sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("size", "entries", "parameters"),
    [("vit_b16", 224, 114_169_344), ("vit_l14", 440, 403_994_624), ("vit_l14_336", 440, 404_322_304)],
)
def test_timesformers_are_those_of_lavila(size, entries, parameters):
    with torch.device("meta"):
        tower = build_video_tower(
            ModelConfig(encoder="timesformer", size=size),
            num_frames=4,
            frame_size=PRESETS[size].image_size,
            embed_dim=None,
        )
    shapes, count = shapes_and_count(tower)
    assert (len(shapes), count) == (entries, parameters)
    if size == "vit_b16":
        assert shapes == shape_table("LaViLa_TSF_B_visual_T4")


def in_their_style(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Our VideoMAE's shapes as in AVION's files with flash attention and a linear patch embedding."""
    theirs = {}
    for key, shape in shapes.items():
        name = videomae_flash_name(key.removeprefix("visual.").replace("fc_cls", "head"))
        theirs[name] = (768, 1536) if shape == (768, 3, 2, 16, 16) else shape
    return theirs


def test_videomae_is_that_of_avion():
    config = ModelConfig(encoder="videomae", size="vit_b16")
    with torch.device("meta"):
        masked = build_masked_video(config, num_frames=16, frame_size=224, decoder_depth=4)
        tuned = build_classifier(config, num_classes=400, num_frames=16, frame_size=224, dropout=0.0)
    assert masked.time_slots * masked.places == 1568
    shapes, count = shapes_and_count(masked)
    assert (len(shapes), count) == (202, 94_221_696)
    assert in_their_style(shapes) == shape_table("VIDEOMAE_VITB16_dec4_flash_channellast")
    shapes, count = shapes_and_count(tuned)
    assert count == 86_544_016
    assert in_their_style(shapes) == shape_table("vit_base_patch16_224_k400_flash_channellast")


def test_videomaes_large_weights_find_their_size():
    """Widths and blocks are those of ViT-L in the VideoMAE paper, its decoder half as wide."""
    width, blocks, decoder = 1024, 24, 512
    with torch.device("meta"):
        masked = build_masked_video(
            ModelConfig(encoder="videomae", size="vit_l16"), num_frames=16, frame_size=224, decoder_depth=12
        )
    patch = 2 * 3 * 16 * 16
    encoder = width * patch + width + blocks * (12 * width**2 + 13 * width) + 2 * width
    decoding = 12 * (12 * decoder**2 + 13 * decoder) + 2 * decoder + patch * decoder + patch
    shapes, count = shapes_and_count(masked)
    assert count == encoder + decoding + decoder + width * decoder
    assert masked.time_slots * masked.places == 1568
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    published = from_ours(weights, "videomae", encoder="videomae")
    assert "encoder.blocks.23.attn.q_bias" in published
    state, left_over = to_ours(published, identify(published))
    facts = guessed_facts(state, "videomae")
    assert (facts.size, facts.role) == ("vit_l16", "masked-video") and not left_over
    config = ModelConfig(encoder="videomae", size="vit_l16")
    assert resolve_model(config, facts).activation == "gelu"
    with torch.device("meta"):
        tuned = build_classifier(config, num_classes=400, num_frames=16, frame_size=224, dropout=0.0)
    fit = fit_weights(tuned, state, facts=facts, temporal_resize="interpolate")
    assert not fit.problems and {name.split(".")[-2] for name in fit.fresh} == {"fc_cls", "fc_norm"}


def test_classifier_is_that_of_avion():
    with torch.device("meta"):
        model = build_classifier(
            ModelConfig(size="vit_b16"), num_classes=3806, num_frames=4, frame_size=224, dropout=0.5
        )
    assert shapes_and_count(model)[1] == 88_729_310


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


@pytest.mark.parametrize("encoder", ENCODERS)
def test_tiny_comes_with_every_encoder(encoder):
    config = ModelConfig(encoder=encoder, size="tiny")
    tower = build_video_tower(config, num_frames=4, frame_size=64, embed_dim=24)
    clips = torch.zeros(2, 3, 4, 64, 64)
    assert tower(clips).shape == (2, 24) and tower.features(clips).shape == (2, tower.width) == (2, 192)
    assert torch.allclose(tower(clips), tower.features(clips) @ tower.image_projection)
