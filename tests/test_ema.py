"""The average of the weights: its formula, its swap, and resuming."""

from __future__ import annotations

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from avion_dali.contracts import UserError
from avion_dali.engine.ema import WeightAverage


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    model[1].requires_grad_(False)
    return model


def change(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn(p.shape, generator=generator)


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_average_follows_the_formula():
    model = make_model()
    average, expected = WeightAverage(model, decay=0.9), snapshot(model)
    for seed in range(3):
        change(model, seed)
        average.update()
        expected = {name: 0.9 * expected[name] + 0.1 * p for name, p in snapshot(model).items()}
    assert average.state_dict().keys() == expected.keys()
    for name, value in average.state_dict().items():
        torch.testing.assert_close(value, expected[name])


def test_averages_take_the_weights_places_and_give_them_back():
    model = make_model()
    average = WeightAverage(model, decay=0.5)
    change(model, 1)
    average.update()
    weights, averages = snapshot(model), average.state_dict()
    with pytest.raises(RuntimeError, match="inside"), average.applied():
        for name, p in snapshot(model).items():
            assert torch.equal(p, averages[name]) and not torch.equal(p, weights[name])
        assert all(torch.equal(value, averages[name]) for name, value in average.state_dict().items())
        raise RuntimeError("inside")
    for name, p in snapshot(model).items():
        assert torch.equal(p, weights[name])


def test_resumed_average_equals_the_uninterrupted_one():
    straight_model = make_model()
    straight = WeightAverage(straight_model, decay=0.99)
    model = make_model()
    first = WeightAverage(model, decay=0.99)
    for seed in range(4):
        change(straight_model, seed)
        straight.update()
        change(model, seed)
        first.update()
        saved, weights = first.state_dict(), snapshot(model)
        model = make_model()
        model.load_state_dict(weights)
        first = WeightAverage(model, decay=0.99)
        first.load_state_dict(saved)
    for name, value in straight.state_dict().items():
        assert torch.equal(first.state_dict()[name], value)


def test_saved_averages_are_copies():
    model = make_model()
    average = WeightAverage(model, decay=0.5)
    saved = average.state_dict()
    before = saved["0.weight"].clone()
    change(model, 3)
    average.update()
    assert torch.equal(saved["0.weight"], before)


def test_average_of_another_model_is_refused():
    average = WeightAverage(make_model(), decay=0.5)
    with pytest.raises(UserError, match=r"0\.weight"):
        average.load_state_dict(WeightAverage(nn.Sequential(nn.Linear(3, 5)), decay=0.5).state_dict())


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def train(model: nn.Module, average: WeightAverage, x: torch.Tensor) -> list[torch.Tensor]:
    """Two steps, each with an evaluation of the averages after it; what these put out."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    outputs = []
    for _ in range(2):
        optimizer.zero_grad()
        model(x).pow(2).sum().backward()
        optimizer.step()
        average.update()
        with torch.no_grad():
            before = model(x)
            with average.applied():
                outputs.append(model(x))
            assert torch.equal(model(x), before), "the weights are back"
        assert not torch.allclose(outputs[-1], before)
    return outputs


def test_sharded_weights_are_averaged_swapped_and_resumed_like_whole_ones(one_rank):
    whole, sharded = make_model(), make_model()
    fully_shard(sharded, mesh=one_rank)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(5))
    averages = [WeightAverage(model, decay=0.5) for model in (whole, sharded)]
    outputs = [train(model, average, x) for model, average in zip((whole, sharded), averages, strict=True)]
    assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True))
    saved = [average.state_dict() for average in averages]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[1][name], value) for name, value in saved[0].items())
    averages[1].load_state_dict(WeightAverage(make_model(), decay=0.5).state_dict())
    start = dict(make_model().named_parameters())
    assert all(torch.equal(value, start[name]) for name, value in averages[1].state_dict().items())
