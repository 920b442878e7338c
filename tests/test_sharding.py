"""Four processes started once: sharded training equals replicated training equals one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from sharded_training import fresh_model, gradients, make_training, rank_main, whole_weights
from test_distributed import free_port
from torch import nn

from avion_dali.config import RunConfig
from avion_dali.contracts import UserError
from avion_dali.engine.checkpoint import LATEST_NAME, load_checkpoint
from avion_dali.engine.distributed import Distributed
from avion_dali.engine.run_log import LOG_NAME, read_rows
from avion_dali.engine.sharding import (
    clip_gradients,
    gathered,
    gradient_norm,
    is_sharded,
    placed_like,
    shard_model,
    unsharded,
)
from avion_dali.models.safetensors_files import read_safetensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`chain` is trained to step 3 by one process, to 6 by two, to 9 by four that share, to 12 by one."""
    folder = tmp_path_factory.mktemp("sharding")
    make_training(folder / "one", Distributed()).run()
    make_training(folder / "chain", Distributed(), max_steps=3).run()
    ports = free_port(), free_port()
    mp.spawn(rank_main, args=(folder, ports), nprocs=4)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict]:
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(4)]


def rows(folder: Path, kind: str = "train") -> list[dict]:
    return [row for row in read_rows(folder / LOG_NAME) if row["kind"] == kind]


@pytest.mark.parametrize("name", ["two", "four"])
def test_losses_and_norms_agree_with_one_process(folder, name):
    one, other = rows(folder / "one"), rows(folder / name)
    assert len(one) == len(other) == 5
    assert [r["loss"] for r in other] == pytest.approx([r["loss"] for r in one], abs=1e-4)
    assert [r["grad_norm"] for r in other] == pytest.approx([r["grad_norm"] for r in one], rel=1e-3)
    assert one[4]["loss"] != one[0]["loss"]


def test_ranks_hold_equal_parts(results):
    for result in results:
        assert result["own_share"] == pytest.approx(0.25, abs=0.01)
    whole = sum(float(p.detach().double().abs().sum()) for p in fresh_model().parameters())
    assert [result["weight_sum"] for result in results] == pytest.approx([whole] * 4)


@pytest.mark.parametrize("accum_steps", [1, 2])
def test_sharded_gradients_are_exact(results, tmp_path, accum_steps):
    exact = gradients(make_training(tmp_path, Distributed(), clip_grad_norm=0.0))
    for result in results:
        for name, gradient in result[f"gradients{accum_steps}"].items():
            torch.testing.assert_close(gradient, exact[name], atol=1e-5, rtol=1e-4, msg=name)


def test_a_checkpoint_fits_any_number_of_ranks(folder, results, tmp_path):
    """The chain's steps are those of a run that was always one process, up to rounding."""
    chain = make_training(folder / "chain", Distributed(), max_steps=12)
    chain.restore(folder / "chain" / LATEST_NAME)
    assert chain.step == 9
    chain.run()
    straight = make_training(tmp_path, Distributed(), max_steps=12)
    straight.run()
    losses = [[row["loss"] for row in rows(place)] for place in (folder / "chain", tmp_path)]
    assert len(losses[0]) == 12 and losses[0] == pytest.approx(losses[1], abs=2e-4)
    scores = [[row["score"] for row in rows(place, "evaluation")] for place in (folder / "chain", tmp_path)]
    assert len(scores[0]) == 4 and scores[0] == pytest.approx(scores[1], abs=1e-3)
    headers = [(row["world_size"], row["sharding"]) for row in rows(folder / "chain", "header")]
    assert headers == [(1, "replicate"), (2, "replicate"), (4, "shard"), (1, "replicate")]


def test_files_hold_whole_tensors(folder, results):
    saved = load_checkpoint(folder / "four" / LATEST_NAME)
    shapes = {name: tensor.shape for name, tensor in fresh_model().state_dict().items()}
    assert {name: tensor.shape for name, tensor in saved.model.items()} == shapes
    assert saved.average.keys() == shapes.keys() and saved.world_size == 4
    moments = [value["exp_avg"] for value in saved.optimizer["state"].values()]
    assert all(type(moment) is torch.Tensor for moment in moments)
    exported, _ = read_safetensors(folder / "four.safetensors")
    for name, tensor in exported.items():
        torch.testing.assert_close(tensor, saved.average[name], atol=0, rtol=0)


def test_lion_shards_too(results, tmp_path):
    loop = make_training(tmp_path, Distributed(), max_steps=2, optimizer="lion")
    loop.run()
    # Lion takes the sign of a gradient: where one is zero up to rounding, a step may differ.
    matrices = {key: tensor for key, tensor in whole_weights(loop.model).items() if tensor.ndim >= 2}
    for key, expected in matrices.items():
        close = torch.isclose(results[0]["lion"][key], expected, atol=1e-5)
        assert close.float().mean() > 0.98, key


def test_half_precision_is_that_of_one_process(results, tmp_path):
    loop = make_training(tmp_path, Distributed(), precision="bf16")
    (numbers,) = loop.steps(0, 1)
    assert results[0]["half"] == pytest.approx(float(numbers["loss"]), abs=5e-3)
    assert len({result["half"] for result in results}) == 1


def test_blocks_sent_in_half_give_the_loss_of_one_process_and_keep_whole_weights(results, tmp_path):
    loop = make_training(tmp_path, Distributed(), precision="bf16")
    losses = [float(numbers["loss"]) for numbers in loop.steps(0, 3)]
    for result in results:
        assert result["sent_half"][0] == pytest.approx(losses[0], abs=2e-2)
        assert result["sent_half"] == pytest.approx(losses, rel=5e-2)
        assert result["sent_dtypes"] == {torch.float32}
        assert result["used_dtypes"] == {torch.bfloat16}
    assert len({result["sent_half"][-1] for result in results}) == 1


def test_one_process_is_left_alone():
    model = nn.Linear(2, 2)
    shard_model(model, RunConfig(sharding="shard"), distributed=Distributed())
    assert not is_sharded(model)
    with unsharded(model):
        assert model(torch.ones(1, 2)).shape == (1, 2)
    state = {"a": [model.weight], "b": 1}
    assert gathered(state, keep=True)["a"][0] is model.weight
    assert placed_like(model.weight, model.weight) is model.weight
    model(torch.ones(1, 2)).sum().backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    torch.testing.assert_close(gradient_norm(model.parameters()), expected)


@pytest.mark.parametrize("max_norm", [0.5, 50.0])
def test_gradients_are_clipped_as_torch_does(max_norm):
    ours, theirs = ([nn.Parameter(torch.zeros(n)) for n in (3, 4, 5)] for _ in range(2))
    for mine, other in zip(ours[:2], theirs[:2], strict=True):
        mine.grad = torch.randn(mine.shape, generator=torch.Generator().manual_seed(mine.numel()))
        other.grad = mine.grad.clone()
    norm = gradient_norm(ours)
    clip_gradients(ours, max_norm, norm=norm)
    nn.utils.clip_grads_with_norm_(theirs, max_norm, norm)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours[:2], theirs[:2], strict=True))
    assert float(gradient_norm(ours)) == pytest.approx(min(max_norm, float(norm)), rel=1e-5)
    clip_gradients(ours[2:], max_norm, norm=norm)


def test_precisions_that_do_not_fit_are_refused():
    here = Distributed(world_size=2, device=torch.device("cuda", 0))
    with pytest.raises(UserError, match="run.sharding = shard needs run.precision = bf16 or fp32"):
        shard_model(nn.Linear(2, 2), RunConfig(sharding="shard", precision="fp16"), distributed=here)
    exact = RunConfig(sharding="shard", precision="fp32", sharding_dtype="bf16")
    with pytest.raises(UserError, match="run.sharding_dtype = bf16 needs run.precision = bf16, not fp32"):
        shard_model(nn.Linear(2, 2), exact, distributed=here)
