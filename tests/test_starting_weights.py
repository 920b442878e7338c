"""Weights of every family are opened: what they are, where they come from, and what a model takes from them."""

import dataclasses

import pytest
import torch
from small_models import (
    real_facts,
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
from avion_dali.models.starting_weights import contradictions, open_start


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
    with pytest.raises(UserError, match=r"has no pretrained ViT-Q"):
        open_start("open_clip:ViT-Q/openai")
    with pytest.raises(UserError, match=r"use open_clip:NAME/PRETRAINED"):
        open_start("open_clip:ViT-B-16")


def test_an_open_clip_name_on_other_weights_is_refused(tmp_path):
    path = save_as(tmp_path / "w.pt", small_dual_encoder(), "avion-flash")
    with pytest.raises(UserError, match="contains weights of avion; give the file without open_clip:"):
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
        export_safetensors(model, tmp_path / "w.safetensors", header={"config": config})
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


def test_our_files_with_options_left_open_mean_the_defaults(tmp_path):
    export_safetensors(
        small_dual_encoder("timesformer"),
        tmp_path / "w.safetensors",
        header={"config": own_config(encoder="timesformer")},
    )
    facts = open_start(str(tmp_path / "w.safetensors")).facts
    assert (facts.activation, facts.norm_eps) == ("quick_gelu", 1e-6)


def test_files_of_older_versions_and_of_other_objectives_are_known_by_their_header(tmp_path):
    """Fields that did not exist yet have their defaults, fields that went away are passed over."""
    model = {"encoder": "timesformer", "size": "tiny", "context_length": 12, "gone": 1}
    config = {"model": model, "data": {"num_frames": 8, "frame_size": 64}}
    dual_encoder, classifier = small_dual_encoder(), small_classifier()
    for objective, weights, role in (
        ({"name": "max-margin"}, dual_encoder, "dual-encoder"),
        ({}, dual_encoder, "dual-encoder"),
        ({"name": "of a user"}, dual_encoder, "dual-encoder"),
        ({"name": "of a user"}, classifier, "classifier"),
        ({"name": "classification"}, classifier, "classifier"),
    ):
        header = {"config": {**config, "objective": objective}}
        export_safetensors(weights, tmp_path / "w.safetensors", header=header)
        facts = open_start(str(tmp_path / "w.safetensors")).facts
        # The header decides, whatever the names of the parameters look like.
        assert (facts.encoder, facts.size, facts.role, facts.pre_norm) == ("timesformer", "tiny", role, True)
        assert (facts.num_frames, facts.frame_size, facts.normalization) == (8, 64, None)
        assert facts.num_classes == (5 if weights is classifier else 0)
        assert facts.context_length == (12 if weights is dual_encoder else 0)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"step": 1}, "does not describe its model"),
        ({"weights": {"encoder": "vit"}}, "its header belongs to another version"),
        (
            {"config": {"model": {"encoder": "vim"}}},
            "'vim' is not an encoder; choose one of vit, timesformer, videomae",
        ),
    ],
)
def test_our_files_that_do_not_say_what_they_are_are_refused(tmp_path, header, message):
    export_safetensors(small_dual_encoder(), tmp_path / "w.safetensors", header=header)
    with pytest.raises(UserError, match=rf"w\.safetensors.*{message}"):
        open_start(str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_unreadable_files(tmp_path, name):
    with pytest.raises(UserError, match="there is no"):
        open_start(str(tmp_path / name))
    (tmp_path / name).write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(UserError, match=r"w\.\w+ (is not a readable|cannot be read)"):
        open_start(str(tmp_path / name))


def test_a_file_of_unknown_weights_is_named(tmp_path):
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"w\.pt: .*not those of AVION"):
        open_start(str(tmp_path / "w.pt"))


def test_contradictions_are_listed():
    facts = real_facts()
    assert contradictions(facts, normalization="openai-avion", activation="gelu") == ()
    assert contradictions(facts) == ()
    found = contradictions(facts, normalization="openai", activation="quick_gelu")
    assert "data.normalization openai-avion, this run uses openai" in found[0]
    assert "model.activation gelu, this run uses quick_gelu" in found[1]
    assert "does not specify" in contradictions(real_facts(family="open_clip"), activation="gelu")[0]
