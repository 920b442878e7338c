import dataclasses

import pytest
import torch
from golden_fill import TOWERS, close, fill_model, wave

from avion_dali.models.blocks import VideoTowerConfig
from avion_dali.models.timesformer import DividedAttention, TimeSformer

SMALL = VideoTowerConfig(
    image_size=16, patch_size=4, num_frames=3, width=32, layers=2, heads=4, embed_dim=8, activation="quick_gelu"
)


def make_tower(**changes: object) -> TimeSformer:
    torch.manual_seed(0)
    return TimeSformer(dataclasses.replace(SMALL, **changes))


def randomize(tower: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return tower


def make_clips(frames: int = 3, clips: int = 2) -> torch.Tensor:
    return torch.randn(clips, 3, frames, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("attention", ["sdpa", "math"])
def test_golden_vector(attention):
    config = VideoTowerConfig(32, 8, 4, 64, 2, 4, None, activation="quick_gelu", attention=attention)
    tower = fill_model(TimeSformer(config))
    assert close(tower(wave(2, 3, 4, 32, 32)).flatten()[:32], TOWERS["timesformer_tiny"]["out"])


@pytest.mark.parametrize("over", ["time", "space"])
def test_divided_attention_is_masked_attention(over):
    """Against full attention under a mask that lets a patch see the class token and its own group."""
    torch.manual_seed(1)
    frames, places, heads = 3, 5, 2
    layer = DividedAttention(8, heads, over=over, places=places, backend="sdpa")
    x = torch.randn(2, 1 + frames * places, 8)
    token = torch.arange(frames * places)
    group = token % places if over == "time" else token // places
    allowed = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
    allowed[1:, 1:] = group[:, None] == group[None, :]
    q, k, v = layer.qkv(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-1, -2) / 2.0).masked_fill(~allowed, -torch.inf)
    expected = layer.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    assert torch.allclose(layer(x), expected, atol=1e-6)


def test_residual_of_both_attentions_is_the_input():
    torch.manual_seed(0)
    block = randomize(make_tower().blocks[0])
    x = torch.randn(2, 1 + 3 * 16, 32)
    y = x + block.attn(block.norm1(x + block.timeattn(block.norm3(x))))
    assert torch.allclose(block(x), y + block.mlp(block.norm2(y)), atol=1e-6)


def test_time_is_silent_at_first_but_learns():
    tower, clips = make_tower(), make_clips()
    block = tower.blocks[0]
    assert (block.timeattn.qkv.weight == 0).all() and (block.timeattn.qkv.bias == 0).all()
    assert (block.timeattn.proj.weight == 1).all() and (block.timeattn.proj.bias == 0).all()
    assert (block.timeattn(torch.randn(2, 49, 32)) == 0).all()
    before = tower(clips)
    swapped = clips[:, :, [2, 0, 1]]
    assert torch.allclose(before, tower(swapped), atol=1e-5)
    before.square().sum().backward()
    values = block.timeattn.qkv.weight.grad[64:]
    assert values.abs().sum() > 0
    assert not torch.allclose(randomize(tower)(clips), tower(swapped), atol=1e-3)


def test_initialisation_is_fit_for_training_from_scratch():
    tower = make_tower()
    block = tower.blocks[1]
    for weight in (block.attn.qkv.weight, block.mlp.fc1.weight, tower.patch_embed.proj.weight):
        assert 0.015 < float(weight.detach().std()) < 0.025
    assert (block.norm3.weight == 1).all() and (tower.temporal_embed == 0).all()
    assert tower.ln_pre.eps == 1e-5 and tower.norm.eps == block.norm1.eps == 1e-6
    assert tower(make_clips()).std() > 1e-3


def test_without_the_first_norm_patches_have_a_bias():
    with_norm, without = make_tower().state_dict(), make_tower(pre_norm=False).state_dict()
    assert with_norm.keys() - without.keys() == {"ln_pre.weight", "ln_pre.bias"}
    assert without.keys() - with_norm.keys() == {"patch_embed.proj.bias"}
    assert not without["patch_embed.proj.bias"].any()


@pytest.mark.parametrize("pre_norm", [True, False])
def test_every_frame_and_parameter_reaches_the_output(pre_norm):
    tower, clips = randomize(make_tower(pre_norm=pre_norm)), make_clips().requires_grad_()
    tower(clips).square().sum().backward()
    assert (clips.grad.abs().sum(dim=(0, 1, 3, 4)) > 0).all()
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_fewer_frames_take_the_first_positions():
    tower = randomize(make_tower())
    short = make_tower(num_frames=2)
    weights = tower.state_dict()
    weights["temporal_embed"] = weights["temporal_embed"][:, :2]
    short.load_state_dict(weights)
    clips = make_clips(frames=2)
    assert torch.allclose(tower(clips), short(clips), atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 4, 16, 16), (2, 3, 3, 16, 12), (3, 3, 16, 16)])
def test_wrong_clip_shape_is_refused(shape):
    with pytest.raises(ValueError, match="takes clips"):
        make_tower()(torch.zeros(shape))


def test_features_are_what_is_projected():
    tower, clips = randomize(make_tower()), make_clips()
    assert tower.width == 32 and tower.features(clips).shape == (2, 32)
    assert torch.allclose(tower(clips), tower.features(clips) @ tower.image_projection)
    bare = make_tower(embed_dim=None)
    assert torch.equal(bare(clips), bare.features(clips)) and not hasattr(bare, "image_projection")


def test_one_clip_trains_in_train_mode():
    tower = make_tower(drop_path=0.2).train()
    tower(make_clips(clips=1)).sum().backward()


def test_checkpointing_gives_the_same_gradients_with_randomness_on():
    grads = []
    for every in (0, 1, 2):
        tower = randomize(make_tower(checkpoint_every=every, drop_path=0.3))
        torch.manual_seed(5)
        tower(make_clips(clips=6)).square().sum().backward()
        grads.append([parameter.grad for parameter in tower.parameters()])
    for plain, *recomputed in zip(*grads, strict=True):
        assert all(torch.allclose(plain, other, atol=1e-5) for other in recomputed)


def test_drop_path_acts_in_training_only():
    tower = make_tower(drop_path=0.5)
    assert not torch.equal(tower(make_clips()), make_tower()(make_clips()))
    assert torch.equal(tower.eval()(make_clips()), make_tower()(make_clips()))
