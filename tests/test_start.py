"""Weights of every family are opened: what they are, where they come from, and what a model takes from them."""

import dataclasses

import pytest
import torch
from small_models import (
    same_tensors,
    save_as,
    save_open_clip,
    small_classifier,
    small_dual_encoder,
    small_masked_video,
    small_open_clip,
)

from avion_dali.config import ModelConfig, TrainConfig
from avion_dali.contracts import UserError
from avion_dali.engine.checkpoint import Checkpoint, export_safetensors, save_checkpoint
from avion_dali.models.dual_encoder import build_dual_encoder
from avion_dali.models.presets import PRESETS
from avion_dali.models.start import contradictions, open_start, settle
from avion_dali.models.weight_facts import facts_of


def test_avion_checkpoint(tmp_path):
    model = small_dual_encoder(seed=1)
    start = open_start(save_as(tmp_path / "w.pt", model, "avion-flash"))
    facts = start.facts
    assert (facts.family, facts.role, facts.encoder) == ("avion", "dual-encoder", "vit")
    assert (facts.activation, facts.norm_eps, facts.normalization) == ("gelu", 1e-6, "openai-avion")
    assert (facts.num_frames, facts.frame_size, facts.patch_size) == (4, 32, 8)
    assert (facts.width, facts.layers, facts.embed_dim, facts.context_length) == (64, 2, 16, 12)
    assert same_tensors(start.state, model.state_dict())


def test_lavila_checkpoint(tmp_path):
    model = small_dual_encoder("timesformer", seed=1)
    start = open_start(save_as(tmp_path / "w.pt", model, "lavila"))
    facts = start.facts
    assert (facts.family, facts.encoder, facts.activation) == ("lavila", "timesformer", "quick_gelu")
    assert (facts.normalization, facts.num_frames, facts.frame_size) == ("openai-avion", 4, 32)
    assert same_tensors(start.state, model.state_dict())


@pytest.mark.parametrize("layout", ["videomae", "avion-flash"])
def test_videomae_checkpoints(tmp_path, layout):
    start = open_start(save_as(tmp_path / "w.pt", small_masked_video(), layout, key="model"))
    facts = start.facts
    assert (facts.family, facts.role, facts.encoder) == ("videomae", "masked-video", "videomae")
    assert (facts.activation, facts.norm_eps, facts.normalization) == ("gelu", 1e-6, "imagenet")
    assert (facts.width, facts.layers, facts.num_frames) == (64, 2, 0)
    start = open_start(save_as(tmp_path / "w.pt", small_classifier("videomae"), layout, key="module"))
    assert (start.facts.role, start.facts.num_classes) == ("classifier", 5)


def test_open_clip_file_and_its_name(tmp_path):
    facts = open_start(save_open_clip(tmp_path / "w.pt")).facts
    assert (facts.family, facts.num_frames, facts.norm_eps) == ("open_clip", 1, 1e-5)
    assert (facts.activation, facts.normalization) == ("quick_gelu", "openai")
    assert open_start(f"open_clip:ViT-B-16//{tmp_path}/w.pt").facts.activation == "gelu"
    assert open_start(str(tmp_path / "w.pt")).facts.activation is None


def test_open_clip_file_below_the_working_directory(tmp_path, monkeypatch):
    save_open_clip(tmp_path / "w.pt")
    monkeypatch.chdir(tmp_path)
    assert open_start("open_clip:ViT-B-16//w.pt").facts.family == "open_clip"
    with pytest.raises(UserError, match=r"there is no file at other\.pt"):
        open_start("open_clip:ViT-B-16//other.pt")


def test_openais_own_constants_tell_the_activation(tmp_path):
    state = {**small_open_clip().state_dict(), "input_resolution": torch.tensor(32)}
    torch.save(state, tmp_path / "w.pt")
    start = open_start(str(tmp_path / "w.pt"))
    assert start.facts.activation == "quick_gelu" and "input_resolution" in start.left_over


@pytest.mark.parametrize(
    ("published", "activation", "normalization"),
    [
        ("ViT-B-16/openai", "quick_gelu", "openai"),
        ("ViT-B-16/laion2b_s34b_b88k", "gelu", "openai"),
        ("ViT-B-16-quickgelu/dfn2b", "quick_gelu", "openai"),
        ("ViT-B-16-SigLIP/webli", "gelu", None),
    ],
)
def test_published_weights(tmp_path, monkeypatch, published, activation, normalization):
    from open_clip import pretrained

    save_open_clip(tmp_path / "w.pt")
    asked = []
    monkeypatch.setattr(pretrained, "download_pretrained", lambda c: asked.append(c) or str(tmp_path / "w.pt"))
    facts = open_start("open_clip:" + published).facts
    assert (facts.activation, facts.normalization) == (activation, normalization)
    assert len(asked) == 1


def test_published_weights_that_cannot_be_had(monkeypatch):
    from open_clip import pretrained

    def offline(published: dict) -> str:
        raise FileNotFoundError("no route to host")

    monkeypatch.setattr(pretrained, "download_pretrained", offline)
    with pytest.raises(UserError, match=r"no route to host.*open_clip:ViT-B-16//path/to/file"):
        open_start("open_clip:ViT-B-16/openai")
    with pytest.raises(UserError, match=r"open_clip has ViT-B-16 as: openai, "):
        open_start("open_clip:ViT-B-16/opanai")
    with pytest.raises(UserError, match=r"knows no pretrained ViT-Q"):
        open_start("open_clip:ViT-Q/openai")
    with pytest.raises(UserError, match=r"write open_clip:NAME/PRETRAINED"):
        open_start("open_clip:ViT-B-16")


def test_an_open_clip_name_on_other_weights_is_refused(tmp_path):
    path = save_as(tmp_path / "w.pt", small_dual_encoder(), "avion-flash")
    with pytest.raises(UserError, match="holds weights of avion; name the file without open_clip:"):
        open_start(f"open_clip:ViT-B-16/{path}")


def own_config(**model) -> dict:
    config = TrainConfig(model=ModelConfig(**model))
    return dataclasses.asdict(
        dataclasses.replace(config, data=dataclasses.replace(config.data, num_frames=4, frame_size=32))
    )


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("form", ["checkpoint", "safetensors"])
def test_our_own_files(tmp_path, form, averaged):
    model = small_dual_encoder(seed=2)
    config = own_config(activation="quick_gelu", norm_eps=1e-5)
    expected = model.state_dict()
    if form == "safetensors":
        export_safetensors(model, tmp_path / "w.safetensors", {"config": config})
    else:
        average = {name: 0.5 * p.detach() for name, p in model.named_parameters()} if averaged else {}
        expected = {**expected, **average}
        save_checkpoint(
            tmp_path / "w.pt", Checkpoint(model.state_dict(), {}, {}, 7, {}, config=config, average=average)
        )
    start = open_start(str(next(tmp_path.iterdir())))
    assert start.facts.family == "avion_dali"
    assert TrainConfig.from_plain(start.config) == TrainConfig.from_plain(config)
    assert (start.facts.activation, start.facts.norm_eps) == ("quick_gelu", 1e-5)
    assert (start.facts.normalization, start.facts.num_frames) == ("openai", 4)
    assert same_tensors(start.state, expected)


def test_our_files_without_settled_options_mean_the_defaults(tmp_path):
    export_safetensors(
        small_dual_encoder("timesformer"),
        tmp_path / "w.safetensors",
        {"config": own_config(encoder="timesformer")},
    )
    facts = open_start(str(tmp_path / "w.safetensors")).facts
    assert (facts.activation, facts.norm_eps) == ("quick_gelu", 1e-6)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_unreadable_files(tmp_path, name):
    with pytest.raises(UserError, match="there is no"):
        open_start(str(tmp_path / name))
    (tmp_path / name).write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(UserError, match=r"w\.\w+ (is not a readable|cannot be read)"):
        open_start(str(tmp_path / name))


def test_a_file_of_unknown_weights_is_named(tmp_path):
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"w\.pt: .*none of AVION's"):
        open_start(str(tmp_path / "w.pt"))


def real_facts(encoder="vit", size="vit_b16", family="avion", **known):
    with torch.device("meta"):
        model = build_dual_encoder(
            ModelConfig(encoder=encoder, size=size), num_frames=4, frame_size=PRESETS[size].image_size
        )
    return facts_of(model.state_dict(), family, known=known)


def test_settling_takes_what_is_left_open():
    config = ModelConfig(weights="w")
    settled = settle(config, real_facts())
    assert (settled.activation, settled.norm_eps) == ("gelu", 1e-6)
    assert settled == dataclasses.replace(config, activation="gelu", norm_eps=1e-6)
    settled = settle(config, real_facts(family="open_clip", activation="quick_gelu"))
    assert (settled.activation, settled.norm_eps) == ("quick_gelu", 1e-5)
    assert settle(config, real_facts(family="open_clip")).activation == "gelu"
    own = ModelConfig(activation="gelu", norm_eps=1e-3)
    assert settle(own, real_facts(family="open_clip", activation="quick_gelu")) == own


def test_settling_starts_a_timesformer_from_an_image_model_only():
    config = ModelConfig(encoder="timesformer", weights="w")
    assert settle(config, real_facts(family="open_clip")).activation == "quick_gelu"
    with pytest.raises(UserError, match=r"set model\.encoder: vit"):
        settle(config, real_facts())
    with pytest.raises(UserError, match=r"set model\.encoder: timesformer"):
        settle(ModelConfig(weights="w"), real_facts("timesformer", family="lavila"))


@pytest.mark.parametrize(("actual", "wrong"), [("vit_l14", "vit_b16"), ("vit_l14_336", "tiny")])
def test_settling_names_the_right_size(actual, wrong):
    with pytest.raises(
        UserError, match=rf"width 1024, 24 blocks and patches of 14; set model\.size: {actual}$"
    ):
        settle(ModelConfig(size=wrong, weights="w"), real_facts(size=actual))


def test_contradictions_are_said():
    facts = real_facts()
    assert contradictions(facts, normalization="openai-avion", activation="gelu") == ()
    assert contradictions(facts) == ()
    found = contradictions(facts, normalization="openai", activation="quick_gelu")
    assert "data.normalization openai-avion, this run uses openai" in found[0]
    assert "model.activation gelu, this run uses quick_gelu" in found[1]
    assert "does not tell" in contradictions(real_facts(family="open_clip"), activation="gelu")[0]
