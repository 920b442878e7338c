"""What the project asks of PyTorch on a GPU: groups, shards, and attention where it is known to err."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from avion_dali.engine.checkpoint import load_checkpoint, save_checkpoint
from avion_dali.engine.distributed import barrier
from avion_dali.engine.precision import gradient_scaler
from avion_dali.engine.sharding import gradient_norm
from avion_dali.engine.signals import RankVotes
from avion_dali.engine.train_state import TrainState
from benchmarks.train.step import Case, Step

ON_EACH = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module", params=ON_EACH)
def device(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[torch.device]:
    """The device of a group of one rank: NCCL on a GPU, gloo without."""
    device = torch.device("cuda", 0) if request.param == "cuda" else torch.device("cpu")
    backend, bound = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group(backend, store=store, rank=0, world_size=1, device_id=bound)
    yield device
    dist.destroy_process_group()


def sharded_step(device: torch.device, *, compiled: bool = False) -> Step:
    """A step whose model is sharded as `avion_dali.engine.sharding` shards over several ranks."""
    case = Case(size="tiny", frames=2, batch=4, frame_size=64, compile=compiled, checkpoint_every=int(compiled))
    step = Step(case, str(device), dtype=torch.bfloat16)
    mesh = init_device_mesh(device.type, (1,))
    for blocks in [module for module in step.model.modules() if isinstance(module, nn.ModuleList)]:
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
    scalars = {parameter for parameter in step.model.parameters() if parameter.ndim == 0}
    fully_shard(step.model, mesh=mesh, reshard_after_forward=False, ignored_params=scalars)
    step.optimizer = torch.optim.AdamW([p for p in step.model.parameters() if p.requires_grad], lr=1e-5)
    return step


def test_a_group_adds_waits_and_votes(device: torch.device) -> None:
    number = torch.ones(1, device=device)
    dist.all_reduce(number)
    barrier()
    assert float(number) == 1.0
    votes = RankVotes(1)  # messages in a gloo group beside the first one
    votes.exchange([3])
    assert votes.exchange([0]) == [3]
    votes.close()


def test_shards_are_trained_and_saved_whole(device: torch.device, tmp_path: Path) -> None:
    step = sharded_step(device)
    loss = step.loss()
    loss.backward()
    parameters = list(step.model.parameters())
    norm = gradient_norm(parameters)
    nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
    step.optimizer.step()
    after = step.loss().detach()
    assert float(norm) > 0 and after.isfinite() and float(after) != float(loss.detach())
    state = TrainState(step.model, step.optimizer, gradient_scaler("bf16", device))
    save_checkpoint(tmp_path / "sharded.pt", state.capture(config={}, world_size=1, keep=True))
    saved = load_checkpoint(tmp_path / "sharded.pt").model
    assert {name: p.shape for name, p in saved.items()} == {
        n: p.shape for n, p in step.model.state_dict().items()
    }


@pytest.mark.gpu
def test_shards_that_are_recomputed_and_compiled_train() -> None:
    """Known to fail in some versions of PyTorch."""
    store = dist.HashStore()
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=torch.device("cuda", 0))
    try:
        sharded_step(torch.device("cuda", 0), compiled=True).run()
    finally:
        dist.destroy_process_group()


CUDNN, FLASH, EFFICIENT = (getattr(SDPBackend, f"{name}_ATTENTION") for name in ("CUDNN", "FLASH", "EFFICIENT"))
on_gpu = pytest.mark.gpu


@pytest.mark.parametrize("masked", [0, 64, 77, 192])
@pytest.mark.parametrize(
    ("kernel", "device_name"),
    [
        pytest.param(FLASH, "cpu", id="flash-cpu"),
        *(pytest.param(kernel, "cuda", marks=on_gpu, id=kernel.name) for kernel in (CUDNN, FLASH, EFFICIENT)),
    ],
)
def test_attention_is_finite_where_kernels_are_known_to_err(
    kernel: SDPBackend, device_name: str, masked: int
) -> None:
    """A single query whose scores are all strongly negative (0), and causal masks that are given as numbers.

    Known of cuDNN: NVIDIA/cudnn-frontend issue 1072; pytorch/pytorch issue 196678, where 64 of the last 128
    columns are left.
    """
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(3, 2, 8, masked or 785, 64, generator=generator)
    if not masked:
        exact[:2] = exact[:2] / 4 + torch.tensor([-4.0, 4.0]).view(2, 1, 1, 1, 1)
    q, k, v = exact.to(device_name, torch.bfloat16)
    q = (q if masked else q[:, :, :1]).detach().requires_grad_()
    hidden = torch.full((masked, masked), float("-inf"), device=q.device).triu(1) if masked else None
    with sdpa_kernel(SDPBackend.MATH):
        right = scaled_dot_product_attention(q.float(), k.float(), v.float(), hidden)
    try:
        with sdpa_kernel(kernel):
            mixed = scaled_dot_product_attention(q, k, v, hidden if hidden is None else hidden.to(q.dtype))
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    mixed.float().square().sum().backward()
    assert mixed.isfinite().all() and q.grad is not None and q.grad.isfinite().all()
    assert float((mixed - right).abs().max()) < 0.02
