import dataclasses
import functools

import pytest
import torch
from torch import nn

from avion_dali.contracts import UserError
from avion_dali.models.blocks import ACTIVATIONS, PatchEmbedding, VideoTowerConfig, cut_patches
from avion_dali.models.residual import add_branch, drop_path_factors, run_blocks
from avion_dali.models.vit import VideoTower, drop_patches

SMALL = VideoTowerConfig(
    image_size=16, patch_size=4, num_frames=3, width=32, layers=2, heads=4, embed_dim=8, norm_eps=1e-5
)


def make_tower(**changes: object) -> VideoTower:
    torch.manual_seed(0)
    return VideoTower(dataclasses.replace(SMALL, **changes))


def randomize(tower: nn.Module) -> None:
    """Move every parameter off its initial value, so that none can be forgotten unnoticed."""
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def make_clips(frames: int = 3, clips: int = 2) -> torch.Tensor:
    return torch.randn(clips, 3, frames, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("channels_last", [True, False])
def test_patch_embedding_is_the_strided_convolution_of_every_frame(channels_last):
    torch.manual_seed(1)
    embedding = PatchEmbedding(4, 32)
    nn.init.normal_(embedding.weight)
    frames = torch.randn(2, 3, 3, 8, 12)
    if channels_last:
        frames = frames.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    expected = [
        nn.functional.conv2d(frames[:, :, t], embedding.weight, stride=4).flatten(2).transpose(1, 2)
        for t in range(3)
    ]
    assert torch.allclose(embedding(frames), torch.cat(expected, dim=1), atol=1e-5)


def test_tube_embedding_is_the_strided_convolution():
    torch.manual_seed(1)
    embedding = PatchEmbedding(4, 32, patch_frames=2, bias=True)
    nn.init.normal_(embedding.weight)
    nn.init.normal_(embedding.bias)
    frames = torch.randn(2, 3, 6, 8, 12)
    expected = nn.functional.conv3d(frames, embedding.weight, embedding.bias, stride=(2, 4, 4))
    assert torch.allclose(embedding(frames), expected.flatten(2).transpose(1, 2), atol=1e-5)


def test_cut_patches_keeps_every_value_and_dtype():
    frames = torch.arange(3 * 4 * 4 * 6).reshape(1, 3, 4, 4, 6).byte()
    patches = cut_patches(frames, patch_size=2, patch_frames=2)
    assert patches.shape == (1, 2 * 2 * 3, 24) and patches.dtype == torch.uint8
    tube = frames[0, :, 2:4, 0:2, 4:6]  # second time slot, first row, third column
    assert torch.equal(patches[0, 6 + 2], tube.permute(1, 2, 3, 0).flatten())


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_one_frame_tower_is_open_clips_vision_transformer(activation):
    from open_clip import transformer as open_clip

    theirs = open_clip.VisionTransformer(
        image_size=16,
        patch_size=4,
        width=32,
        layers=2,
        heads=4,
        mlp_ratio=4.0,
        output_dim=8,
        act_layer=open_clip.QuickGELU if activation == "quick_gelu" else nn.GELU,
    )
    randomize(theirs)
    weights = theirs.state_dict()
    weights["image_projection"] = weights.pop("proj")
    ours = make_tower(num_frames=1, activation=activation)
    ours.load_state_dict(weights, strict=True)
    clips = make_clips(frames=1)
    expected = theirs.train()(clips[:, :, 0])
    assert torch.allclose(ours(clips), expected, atol=1e-5)
    other = make_tower(num_frames=1, activation="gelu" if activation == "quick_gelu" else "quick_gelu")
    other.load_state_dict(weights)
    assert not torch.allclose(other(clips), expected, atol=1e-4)


def test_quick_gelu_values():
    x = torch.tensor([-2.0, 0.0, 1.0])
    expected = torch.tensor([-2.0 / (1 + 2.718281828 ** (1.702 * 2)), 0.0, 1 / (1 + 2.718281828**-1.702)])
    assert torch.allclose(ACTIVATIONS["quick_gelu"]()(x), expected, atol=1e-6)


def test_fresh_tower_does_not_see_the_order_of_frames_and_a_trained_one_does():
    tower, clips = make_tower(), make_clips()
    swapped = clips[:, :, [2, 0, 1]]
    assert torch.allclose(tower(clips), tower(swapped), atol=1e-5)
    randomize(tower)
    assert not torch.allclose(tower(clips), tower(swapped), atol=1e-3)


def test_every_frame_and_parameter_reaches_the_output():
    tower, clips = make_tower(), make_clips().requires_grad_()
    randomize(tower)
    tower(clips).square().sum().backward()
    assert (clips.grad.abs().sum(dim=(0, 1, 3, 4)) > 0).all()
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_initialisation_is_fit_for_training_from_scratch():
    tower = make_tower()
    for module in tower.modules():
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and (module.bias == 0).all() and module.eps == 1e-5
    assert (tower.temporal_embedding == 0).all()
    block = tower.transformer.resblocks[0]
    for weight in (block.attn.in_proj_weight, block.mlp.c_fc.weight, block.mlp.c_proj.weight):
        assert 0.015 < float(weight.detach().std()) < 0.025
    assert not hasattr(make_tower(num_frames=1), "temporal_embedding")
    assert VideoTower(SMALL)(make_clips()).std() > 1e-3


def test_drop_path_zeroes_whole_clips_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(4000, 2, 3)
    factors = drop_path_factors(x, 0.25)
    assert factors.shape == (4000, 1, 1)
    assert sorted(set(factors.flatten().tolist())) == pytest.approx([0.0, 4 / 3])
    assert abs(float(factors.mean()) - 1) < 0.03
    assert torch.equal(add_branch(x, 2 * x, factors), 1 + 2 * factors.expand_as(x))
    assert add_branch(x, x.bfloat16(), factors.half()).dtype == torch.float32


def test_drop_patches_keeps_an_own_subset_of_each_clip():
    torch.manual_seed(0)
    x = torch.arange(20.0).expand(6, 20).unsqueeze(-1) + 100 * torch.arange(6.0)[:, None, None]
    kept = drop_patches(x, rate=0.75)
    assert kept.shape == (6, 5, 1)
    places = [frozenset((row - 100 * clip).flatten().tolist()) for clip, row in enumerate(kept)]
    assert all(len(place) == 5 and place <= set(map(float, range(20))) for place in places)
    assert len(set(places)) > 1
    assert drop_patches(x, rate=0.99).shape[1] == 1


def test_patch_dropout_shortens_training_only_and_keeps_the_class_token():
    tower, lengths = make_tower(patch_dropout=0.5), []
    tower.transformer.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    tower(make_clips())
    full = tower.eval()(make_clips())
    assert lengths == [1 + 24, 1 + 48]
    assert torch.equal(full, make_tower().eval()(make_clips()))


def test_drop_path_acts_in_training_only():
    tower = make_tower(drop_path=0.5)
    assert not torch.equal(tower(make_clips()), make_tower()(make_clips()))
    assert torch.equal(tower.eval()(make_clips()), make_tower()(make_clips()))


def test_linear_drop_path_grows_with_depth():
    config = dataclasses.replace(SMALL, layers=4, drop_path=0.3, drop_path_schedule="linear")
    rates = [block.drop_path_rate for block in VideoTower(config).transformer.resblocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    constant = make_tower(layers=4, drop_path=0.3)
    assert [block.drop_path_rate for block in constant.transformer.resblocks] == [0.3] * 4
    assert dataclasses.replace(config, layers=1).drop_path_rate(0) == 0.0


@pytest.mark.parametrize("every", [1, 2])
def test_checkpointing_gives_the_same_gradients_with_randomness_on(every):
    grads = []
    for checkpoint_every in (0, every):
        tower = make_tower(checkpoint_every=checkpoint_every, drop_path=0.3, patch_dropout=0.3)
        torch.manual_seed(5)
        tower(make_clips(clips=6)).square().sum().backward()
        grads.append([parameter.grad for parameter in tower.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.allclose(plain, recomputed, atol=1e-6)


def test_checkpointing_really_recomputes():
    calls = []
    tower = make_tower(checkpoint_every=1)
    tower.transformer.resblocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    tower(make_clips()).sum().backward()
    assert len(calls) == 2
    with torch.no_grad():
        tower(make_clips())
    assert len(calls) == 3


@pytest.mark.parametrize(("every", "recomputed"), [(0, []), (1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3])])
def test_every_nth_block_is_recomputed(every, recomputed):
    calls = []
    blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))
    for i, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
    run_blocks(blocks, torch.randn(1, 2, 4), checkpoint_every=every).sum().backward()
    assert sorted(calls) == sorted([*range(5), *recomputed])


def test_features_are_what_is_projected():
    tower, clips = make_tower(), make_clips()
    randomize(tower)
    assert tower.width == 32 and tower.features(clips).shape == (2, 32)
    assert torch.allclose(tower(clips), tower.features(clips) @ tower.image_projection)
    bare = make_tower(embed_dim=None)
    assert torch.equal(bare(clips), bare.features(clips)) and not hasattr(bare, "image_projection")


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_any_number_of_frames(frames):
    tower = make_tower(num_frames=frames)
    assert tower(make_clips(frames)).shape == (2, 8)


def test_every_attention_kernel_gives_the_same_output():
    clips = make_clips()
    expected = make_tower(attention="math")(clips)
    for attention in ("auto", "sdpa"):
        assert torch.allclose(make_tower(attention=attention)(clips), expected, atol=1e-6)


def test_compile_reaches_every_block_and_keeps_names(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda call, **_: compiled.append(call) or call)
    names = make_tower(layers=3, compile=True).state_dict().keys()
    assert len(compiled) == 3
    assert names == make_tower(layers=3).state_dict().keys()
    assert len(compiled) == 3


@pytest.mark.parametrize("checkpoint_every", [0, 1])
def test_blocks_are_traced_whole(monkeypatch, checkpoint_every):
    """Dynamo without a code generator: one graph a block, the same gradients."""
    whole = functools.partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", lambda call, **_: whole(call))
    grads = []
    for compiled in (False, True):
        tower = make_tower(compile=compiled, checkpoint_every=checkpoint_every)
        tower(make_clips()).square().sum().backward()
        grads.append([parameter.grad for parameter in tower.parameters()])
    for plain, traced in zip(*grads, strict=True):
        assert torch.allclose(plain, traced, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 4, 16, 16), (2, 3, 3, 16, 12), (3, 3, 16, 16)])
def test_wrong_clip_shape_is_refused(shape):
    with pytest.raises(ValueError, match="takes clips"):
        make_tower()(torch.zeros(shape))


def test_patches_must_tile_the_frame():
    with pytest.raises(UserError, match="multiple of 16"):
        dataclasses.replace(SMALL, image_size=100, patch_size=16)
