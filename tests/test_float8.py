"""MLPs in fp8, emulated on the CPU: which maps, how far numbers move, that training works, what is refused."""

import dataclasses
import importlib
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from avion_dali.contracts import UserError
from avion_dali.models.blocks import VideoTowerConfig
from avion_dali.models.float8 import convert_mlps, require_fp8
from avion_dali.models.towers import ENCODERS

pytestmark = pytest.mark.skipif(find_spec("torchao") is None, reason="the extra fp8 is not installed")

TOWER = VideoTowerConfig(16, 8, 2, 1024, 1, 16, 8)
GPU = torch.device("cuda", 0)


def make_tower(encoder: str = "vit", *, fp8: bool = True, width: int = 1024) -> nn.Module:
    torch.manual_seed(0)
    tower = ENCODERS[encoder](dataclasses.replace(TOWER, width=width))
    if fp8:
        convert_mlps(tower, emulate=True)
    return tower


def clips() -> torch.Tensor:
    return torch.randn(4, 3, 2, 16, 16, generator=torch.Generator().manual_seed(1))


def train(tower: nn.Module) -> list[float]:
    """Losses of six steps."""
    wanted = torch.randn(4, 8, generator=torch.Generator().manual_seed(3))
    optimizer, losses = torch.optim.AdamW(tower.parameters(), 3e-5), []
    for _ in range(6):
        loss = nn.functional.mse_loss(tower(clips()), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def maps_in_fp8(tower: nn.Module) -> list[str]:
    return [name for name, part in tower.named_modules() if type(part).__name__ == "Float8Linear"]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_both_maps_of_a_wide_mlp_are_converted_and_no_other(encoder):
    tower, plain = make_tower(encoder), make_tower(encoder, fp8=False)
    blocks = tower.layout.blocks
    names = [name.removeprefix(f"{blocks}.0.mlp.") for name in maps_in_fp8(tower)]
    assert names == [
        name for name, part in plain.get_submodule(f"{blocks}.0.mlp").named_children() if name != "act"
    ]
    assert not maps_in_fp8(make_tower(encoder, width=512))


def test_vectors_and_gradients_move_within_the_rounding_of_fp8():
    found = []
    for fp8 in (False, True):
        tower = make_tower(fp8=fp8)
        mlp = tower.transformer.resblocks[0].mlp
        vectors = mlp(torch.randn(10, 1024, generator=torch.Generator().manual_seed(2)))
        vectors.square().sum().backward()
        found.append((vectors.detach(), *(weight.grad for weight in mlp.parameters())))
    for right, rounded in zip(*found, strict=True):
        # E4M3 has 3 bits of mantissa and E5M2 has 2: numbers move by up to 1/16 and 1/8 of themselves.
        assert 0 < float((rounded - right).norm() / right.norm()) < 0.125


def test_training_learns_and_its_weights_fit_an_unconverted_model(tmp_path):
    tower, plain = make_tower(), make_tower(fp8=False)
    losses = train(tower)
    assert losses[-1] < 0.4 * losses[0]
    assert losses == pytest.approx(train(plain), rel=0.05)
    torch.save(tower.state_dict(), tmp_path / "weights.pt")
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert {name: (value.shape, value.dtype) for name, value in weights.items()} == {
        name: (value.shape, value.dtype) for name, value in plain.state_dict().items()
    }
    plain.load_state_dict(weights, strict=True)
    with torch.no_grad():
        assert torch.cosine_similarity(tower(clips()), plain(clips())).min() > 0.99
    again = make_tower()
    again.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(again(clips()), tower(clips()))


def test_converted_blocks_are_traced_whole():
    tower = make_tower()
    expected = tower(clips())
    for block in tower.transformer.resblocks:
        block.compile(backend="eager", fullgraph=True)
    assert torch.allclose(tower(clips()), expected, atol=1e-6)


def test_where_fp8_cannot_run_is_said(monkeypatch):
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    require_fp8(GPU, width=1024)
    with pytest.raises(UserError, match="768 wide.*width of 1024 on; set model.mlp_dtype = default"):
        require_fp8(GPU, width=768)
    with pytest.raises(UserError, match="needs a GPU, and the model is on cpu"):
        require_fp8(torch.device("cpu"), width=1024)
    capability = (8, 6)
    with pytest.raises(UserError, match=r"compute capability 8\.9 or later .*, and this one has 8\.6"):
        require_fp8(GPU, width=1024)


def test_a_missing_torchao_is_said(monkeypatch):
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UserError, match="torchao.float8 cannot be imported .*; pip install torchao"):
        require_fp8(GPU, width=1024)


@pytest.mark.gpu
def test_kernels_agree_with_their_emulation():
    """With 9 tokens a clip, so that the products of weight gradients are padded."""
    if torch.cuda.get_device_capability(0) < (8, 9):
        pytest.skip("needs a GPU with products in fp8")
    found = []
    for emulate in (True, False):
        tower = make_tower(fp8=False)
        convert_mlps(tower, emulate=emulate)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            vectors = tower.to(GPU)(clips().to(GPU)).float()
        vectors.square().sum().backward()
        found.append(torch.cat([vectors.flatten(), *(p.grad.flatten() for p in tower.parameters())]))
    assert float(torch.cosine_similarity(*found, dim=0)) > 0.99
