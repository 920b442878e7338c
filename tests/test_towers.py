"""Encoders by name, and what a configuration leaves open for them."""

import dataclasses

import pytest
from small_models import real_facts
from torch import nn

from avion_dali.config import ModelConfig
from avion_dali.contracts import UserError
from avion_dali.models.towers import ENCODERS, build_video_tower, encoder_name, resolve_model


def test_encoders_are_known_by_name_and_an_unknown_one_is_refused():
    for name in ENCODERS:
        tower = build_video_tower(
            ModelConfig(encoder=name, size="tiny"), num_frames=2, frame_size=32, embed_dim=8
        )
        assert encoder_name(tower) == name
    with pytest.raises(
        UserError, match=r"model\.encoder = 'vim' is not an encoder; choose one of vit, timesformer, videomae"
    ):
        build_video_tower(ModelConfig(encoder="vim"), num_frames=2, frame_size=32, embed_dim=8)
    with pytest.raises(UserError, match="Linear is not a known encoder"):
        encoder_name(nn.Linear(2, 2))


def test_a_model_from_random_weights_leaves_nothing_open() -> None:
    for encoder, activation in (("vit", "gelu"), ("videomae", "gelu"), ("timesformer", "quick_gelu")):
        model = resolve_model(ModelConfig(encoder=encoder))
        assert (model.activation, model.norm_eps) == (activation, 1e-6)
    named = ModelConfig(activation="quick_gelu", norm_eps=1e-5)
    assert resolve_model(named) == named


def test_resolving_takes_from_the_weights_what_is_left_open():
    config = ModelConfig(weights="w")
    resolved = resolve_model(config, real_facts())
    assert (resolved.activation, resolved.norm_eps) == ("gelu", 1e-6)
    assert resolved == dataclasses.replace(config, activation="gelu", norm_eps=1e-6)
    resolved = resolve_model(config, real_facts(family="open_clip", activation="quick_gelu"))
    assert (resolved.activation, resolved.norm_eps) == ("quick_gelu", 1e-5)
    assert resolve_model(config, real_facts(family="open_clip")).activation == "gelu"
    own = ModelConfig(activation="gelu", norm_eps=1e-3)
    assert resolve_model(own, real_facts(family="open_clip", activation="quick_gelu")) == own


def test_resolving_starts_a_timesformer_from_an_image_model_only():
    config = ModelConfig(encoder="timesformer", weights="w")
    assert resolve_model(config, real_facts(family="open_clip")).activation == "quick_gelu"
    with pytest.raises(UserError, match=r"set model\.encoder: vit"):
        resolve_model(config, real_facts())
    with pytest.raises(UserError, match=r"set model\.encoder: timesformer"):
        resolve_model(ModelConfig(weights="w"), real_facts("timesformer", family="lavila"))


@pytest.mark.parametrize(("actual", "wrong"), [("vit_l14", "vit_b16"), ("vit_l14_336", "tiny")])
def test_resolving_names_the_right_size(actual, wrong):
    with pytest.raises(
        UserError, match=rf"width 1024, 24 blocks and patches of 14; set model\.size: {actual}$"
    ):
        resolve_model(ModelConfig(size=wrong, weights="w"), real_facts(size=actual))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"patch_dropout": 0.5}, "is for model.encoder vit"),
        ({"pre_norm": False}, "is for model.encoder timesformer"),
    ],
)
def test_options_are_refused_by_encoders_that_do_not_declare_them(option, message):
    with pytest.raises(UserError, match=message):
        resolve_model(ModelConfig(encoder="videomae", **option))


def test_resolving_twice_changes_nothing():
    for name in ENCODERS:
        once = resolve_model(ModelConfig(encoder=name))
        assert resolve_model(once) == once and once.activation != "auto" and once.norm_eps
