"""Tokens between the blocks in bf16: where they are, how far numbers move, and that training works."""

import dataclasses

import pytest
import torch
from torch import nn

from avion_dali.models.blocks import VideoTowerConfig
from avion_dali.models.masked_video import MaskedVideo
from avion_dali.models.towers import ENCODERS

TOWER = VideoTowerConfig(16, 4, 4, 32, 3, 4, 8, drop_path=0.1)


def make_tower(encoder: str, dtype: str) -> nn.Module:
    torch.manual_seed(0)
    return ENCODERS[encoder](dataclasses.replace(TOWER, residual_dtype=dtype))


def clips() -> torch.Tensor:
    return torch.randn(6, 3, 4, 16, 16, generator=torch.Generator().manual_seed(1))


def token_dtypes(tower: nn.Module, blocks: nn.ModuleList, *inputs: torch.Tensor) -> set[torch.dtype]:
    """Dtypes of what goes into the blocks, and of what comes out of the last."""
    found = []
    hooks = [block.register_forward_pre_hook(lambda _, given: found.append(given[0].dtype)) for block in blocks]
    hooks.append(blocks[-1].register_forward_hook(lambda _, __, output: found.append(output.dtype)))
    tower(*inputs)
    for hook in hooks:
        hook.remove()
    return set(found)


def blocks_of(tower: nn.Module) -> nn.ModuleList:
    blocks = tower.get_submodule(tower.layout.blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


@pytest.mark.parametrize("encoder", ENCODERS)
def test_tokens_are_bf16_where_the_run_computes_in_bf16(encoder):
    plain, half = make_tower(encoder, "fp32"), make_tower(encoder, "bf16")
    assert token_dtypes(half, blocks_of(half), clips()) == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert token_dtypes(plain, blocks_of(plain), clips()) == {torch.float32}
        assert token_dtypes(half, blocks_of(half), clips()) == {torch.bfloat16}


def test_shapes_can_be_counted_without_a_device():
    with torch.device("meta"):
        tower = make_tower("vit", "bf16")
        assert tower(torch.empty(2, 3, 4, 16, 16)).shape == (2, 8)


def test_masked_video_too():
    model = MaskedVideo(dataclasses.replace(TOWER, residual_dtype="bf16"), decoder_depth=2)
    masks = (torch.arange(32) < 24).expand(6, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for part in (model.encoder, model.decoder):
            assert token_dtypes(model, part.blocks, clips(), masks) == {torch.bfloat16}


@pytest.mark.parametrize("encoder", ENCODERS)
def test_vectors_and_gradients_move_within_the_rounding_of_bf16(encoder):
    found = []
    for dtype, half in (("fp32", False), ("fp32", True), ("bf16", True)):
        tower = make_tower(encoder, dtype).eval()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            vectors = tower(clips()).float()
        vectors.square().sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in tower.parameters()])
        found.append((vectors.detach().flatten(), gradient))
    exact, bf16, residual = found
    for right, before, after in zip(exact, bf16, residual, strict=True):
        error = float((after - right).norm() / right.norm())
        assert 0 < error < max(0.03, 4 * float((before - right).norm() / right.norm()))


@pytest.mark.parametrize("checkpoint_every", [0, 1])
def test_training_learns_and_weights_go_to_a_model_with_fp32_tokens(checkpoint_every):
    torch.manual_seed(0)
    config = dataclasses.replace(TOWER, residual_dtype="bf16", checkpoint_every=checkpoint_every)
    tower, wanted = ENCODERS["vit"](config), torch.randn(6, 8)
    optimizer, losses = torch.optim.AdamW(tower.parameters(), 3e-3), []
    for _ in range(12):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.mse_loss(tower(clips()).float(), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    plain = make_tower("vit", "fp32")
    plain.load_state_dict(tower.state_dict(), strict=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = tower.eval()(clips()).float(), plain.eval()(clips()).float()
    assert torch.nn.functional.cosine_similarity(ours, theirs).min() > 0.999
