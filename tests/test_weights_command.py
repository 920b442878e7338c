"""`avion-dali weights`: what it says, and that what it writes is read again."""

import argparse
import json

import pytest
import torch
from safetensors import safe_open
from small_models import (
    same_tensors,
    save_as,
    small_classifier,
    small_dual_encoder,
    small_masked_video,
    written,
)

from avion_dali.cli import weights
from avion_dali.config import ModelConfig, TrainConfig
from avion_dali.contracts import UserError
from avion_dali.engine.checkpoint import restore_model
from avion_dali.models.dual_encoder import build_dual_encoder
from avion_dali.models.safetensors_files import read_safetensors
from avion_dali.models.starting_weights import open_start


def command(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    weights.add_arguments(parser)
    return weights.run(parser.parse_args([str(a) for a in arguments]))


def test_a_description_says_what_the_file_is(tmp_path, capsys):
    assert command(save_as(tmp_path / "w.pt", small_dual_encoder(), "avion-flash")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(tmp_path / "w.pt")
    said = {line[:17].strip(): line[17:] for line in lines[1:]}
    assert said == {
        "family": "avion, dual-encoder",
        "encoder": "vit, width 64, 2 blocks, patches of 8 pixels (none of model.size)",
        "clips": "4 frames of 32 x 32 pixels",
        "shared space": "16 wide, texts of 12 tokens",
        "normalization": "openai-avion",
        "activation": "gelu",
        "norm eps": "1e-06",
        "parameters": f"{sum(p.numel() for p in small_dual_encoder().parameters()):,}",
    }
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_description_names_what_is_unknown_and_left_over(tmp_path, capsys):
    state = written(small_dual_encoder(num_frames=1), "open_clip")
    torch.save({**state, "context_length": torch.tensor(12)}, tmp_path / "w.pt")
    command(tmp_path / "w.pt")
    out = capsys.readouterr().out
    assert "activation     not stored with the weights" in out and "1 frame (an image model) of 32" in out
    assert "left over      context_length (a constant, not a weight)" in out
    command(save_as(tmp_path / "w.pt", small_classifier("videomae"), "videomae"))
    out = capsys.readouterr().out
    assert "classes        5" in out and "clips          not stored with the weights" in out
    assert "shared space" not in out


@pytest.mark.parametrize(
    ("make", "layout"),
    [
        (small_dual_encoder, "avion-flash"),
        (small_dual_encoder, "avion-plain"),
        (lambda: small_dual_encoder(num_frames=1), "open_clip"),
        (lambda: small_dual_encoder("timesformer"), "lavila"),
        (small_masked_video, "avion-flash"),
        (lambda: small_classifier("videomae"), "avion-flash"),
    ],
)
def test_ways_there_and_back_are_exact(tmp_path, make, layout):
    """A file of another project, ours, theirs again, ours again: tensors and facts stay."""
    source = save_as(tmp_path / "w.pt", make(), layout)
    ours, theirs, again = (tmp_path / f"{name}.safetensors" for name in ("ours", "theirs", "again"))
    assert command(source, "--output", ours) == 0
    assert command(ours, "--output", theirs, "--to", layout) == 0
    assert command(theirs, "--output", again) == 0
    with safe_open(theirs, framework="pt") as file:
        expected = written(make(), layout)
        assert same_tensors({name: file.get_tensor(name) for name in expected}, expected)
        assert len(list(file.keys())) == len(expected)
        assert json.loads(file.metadata()["avion_dali"])["layout"] == layout
    started, first, last = (open_start(str(path)) for path in (source, ours, again))
    assert same_tensors(first.state, make().state_dict()) and same_tensors(last.state, first.state)
    assert first.facts.family == "avion_dali"
    for start in (first, open_start(str(theirs)), last):
        for name in ("activation", "norm_eps", "normalization", "num_frames", "frame_size", "encoder", "role"):
            assert getattr(start.facts, name) == getattr(started.facts, name), name


def test_a_model_of_a_known_size_can_be_evaluated_at_once(tmp_path):
    """The header builds the model, as `train.evaluate` does."""
    config = ModelConfig(size="tiny", embed_dim=24)
    model = build_dual_encoder(config, num_frames=4, frame_size=64)
    output = tmp_path / "ours.safetensors"
    command(save_as(tmp_path / "w.pt", model, "avion-flash"), "--output", output)
    state, header = read_safetensors(output)
    trained = TrainConfig.from_plain(header["config"])
    assert (trained.model.size, trained.model.embed_dim, trained.model.activation) == ("tiny", 24, "gelu")
    assert (trained.data.num_frames, trained.data.frame_size) == (4, 64)
    assert trained.data.normalization == "openai-avion" and trained.objective.name == "contrastive"
    built = build_dual_encoder(
        trained.model, num_frames=trained.data.num_frames, frame_size=trained.data.frame_size
    )
    restore_model(built, state, source="ours")
    assert same_tensors(built.state_dict(), model.state_dict())


def test_our_own_configuration_is_kept(tmp_path):
    model = build_dual_encoder(ModelConfig(size="tiny"), num_frames=2, frame_size=32)
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    command(save_as(tmp_path / "w.pt", model, "avion-plain"), "--output", first)
    command(first, "--output", second)
    assert read_safetensors(first)[1]["config"] == read_safetensors(second)[1]["config"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to", "lavila"), "--to requires --output"),
        (("--output", "w.pt"), r"must end in \.safetensors"),
        (("--output", "w.safetensors", "--to", "lavila"), "cannot be written as lavila"),
    ],
)
def test_wrong_options_write_nothing(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    save_as(tmp_path / "source.pt", small_dual_encoder(), "avion-flash")
    with pytest.raises(UserError, match=message):
        command("source.pt", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["source.pt"]
