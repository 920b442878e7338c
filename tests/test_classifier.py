import dataclasses

import pytest
import torch
from golden_fill import TOWERS, close, fill_model, videomae_flash_name, wave

from avion_dali.config import ModelConfig
from avion_dali.contracts import UserError
from avion_dali.models.blocks import VideoTowerConfig
from avion_dali.models.classifier import Classifier, build_classifier
from avion_dali.models.videomae import VideoMAETower
from avion_dali.models.vit import VideoTower

ENCODERS = ("vit", "timesformer", "videomae")


def make_model(encoder: str, **options: object) -> Classifier:
    torch.manual_seed(0)
    config = ModelConfig(encoder=encoder, size="tiny", **options)
    return build_classifier(config, num_classes=7, num_frames=4, frame_size=32, dropout=0.5)


def make_clips(clips: int = 3) -> torch.Tensor:
    return torch.randn(clips, 3, 4, 32, 32, generator=torch.Generator().manual_seed(1))


def flash_name(key: str) -> str:
    for ours, theirs in (
        (".attn.in_proj_", ".attn.Wqkv."),
        (".mlp.c_fc", ".mlp.fc1"),
        (".mlp.c_proj", ".mlp.fc2"),
    ):
        key = key.replace(ours, theirs)
    return key


@pytest.mark.parametrize(("style", "rename"), [("plain", str), ("flash", flash_name)])
def test_golden_vector_of_the_plain_transformer(style, rename):
    tower = VideoTower(VideoTowerConfig(32, 8, 4, 64, 2, 4, None))
    model = fill_model(Classifier(tower, 5, 0.5), rename)
    assert close(model(wave(2, 3, 4, 32, 32)), TOWERS["classifier_tiny"][style])


def test_golden_vector_of_videomae():
    def their_name(key: str) -> str:
        return videomae_flash_name(key.removeprefix("visual.").replace("fc_cls", "head"))

    model = Classifier(VideoMAETower(VideoTowerConfig(32, 16, 16, 48, 2, 4, None)), 5, 0.0)
    fill_model(model, their_name)
    assert close(model(wave(2, 3, 16, 32, 32)), TOWERS["videomae_finetune_tiny"]["logits"])


@pytest.mark.parametrize("encoder", ENCODERS)
def test_logits_are_the_head_of_the_features(encoder):
    model, clips = make_model(encoder).eval(), make_clips()
    features = model.visual.features(clips)
    assert features.shape == (3, model.visual.width)
    assert torch.equal(model(clips), model.fc_cls(features))
    assert torch.equal(model(clips), model(clips))
    assert not [name for name, _ in model.named_parameters() if "image_projection" in name]
    assert {name.split(".")[0] for name in model.state_dict()} == {"visual", "fc_cls"}


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_parameter_learns(encoder):
    model = make_model(encoder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model(make_clips()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_dropout_acts_in_training_only():
    model, clips = make_model("vit"), make_clips()
    assert not torch.equal(model(clips), model(clips))


def test_heads_start_small():
    for encoder, deviation in (("vit", 0.01), ("timesformer", 0.01), ("videomae", 0.02 * 0.001)):
        head = make_model(encoder).fc_cls
        assert float(head.weight.detach().std()) == pytest.approx(deviation, rel=0.1)
        assert (head.bias == 0).all()


@pytest.mark.parametrize("encoder", ENCODERS)
def test_checkpointing_gives_the_same_gradients(encoder):
    grads = []
    for every in (0, 2):
        model = make_model(encoder, checkpoint_every=every, drop_path=0.2, drop_path_schedule="linear")
        torch.manual_seed(5)
        model(make_clips()).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.allclose(plain, recomputed, atol=1e-6)


def test_videomae_tells_time_by_positions_alone():
    """The mean over tokens: without positions, exchanging time slots changes nothing."""
    model, clips = make_model("videomae").eval(), make_clips()
    swapped = clips[:, :, [2, 3, 0, 1]]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        assert not torch.allclose(model.visual(clips), model.visual(swapped), atol=1e-3)
        model.visual.positions_ND.zero_()
        assert torch.allclose(model.visual(clips), model.visual(swapped), atol=1e-4)


def test_a_classifier_needs_classes_and_videomae_an_even_number_of_frames():
    config = ModelConfig(encoder="videomae", size="tiny")
    with pytest.raises(UserError, match="clips of 3 frames"):
        build_classifier(config, num_classes=3, num_frames=3, frame_size=32, dropout=0.0)
    with pytest.raises(UserError, match="no classes"):
        build_classifier(config, num_classes=0, num_frames=4, frame_size=32, dropout=0.0)
    with pytest.raises(UserError, match="patch_dropout is for model.encoder vit"):
        options = dataclasses.replace(config, patch_dropout=0.5)
        build_classifier(options, num_classes=3, num_frames=4, frame_size=32, dropout=0.0)
