"""Shards parameters, gradients and optimizer state equally over the ranks (FSDP2).

Source: Zhao et al. 2023, "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", arXiv 2304.11277.
This is the per-parameter form, `torch.distributed.fsdp.fully_shard`. The parameters of a block are gathered
when it computes and freed afterwards. Tensors are gathered before they are written, so that files contain whole
tensors and a checkpoint can be resumed with any number of ranks, sharded or not.

`gathered` and `placed_like` handle weights, optimizer state and averages. The functions of
`torch.distributed.checkpoint.state_dict` are not used, because they change optimizers: to an optimizer without
state they apply a step with zero gradients, and the remaining step count of 1 changes Adam's bias correction
after a resume. Parameters that have not had a gradient yet are rejected or treated in the same way.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from avion_dali.config import RunConfig
from avion_dali.contracts import UserError
from avion_dali.engine.distributed import Distributed, require_agreement
from avion_dali.engine.precision import resolve_precision


def shard_model(model: nn.Module, run: RunConfig, *, distributed: Distributed) -> None:
    """Shard a model over all ranks in place, if the run requests it; call it before creating the optimizer.

    Each block is one unit, and the remaining parameters form another. Parameters are sent as float32, and
    autocast rounds them where they are used, so a sharded run computes the same numbers as a replicated one in
    every precision. With `run.sharding_dtype` bf16, blocks are sent in half the bytes, which also rounds their
    norms and the tokens between them; position tables and projections are not rounded. Scalars (a temperature)
    cannot be sharded; every rank keeps them, see `average_whole_gradients`.

    Args:
        model: the bare model, equal on all ranks, on this rank's device.
        run: sharding and precision.
        distributed: this process among all processes of the run; the model of a single process is not changed.

    Raises:
        UserError: the precision is fp16, whose gradient scaler does not support shards, or not bf16 although
            parameters are to be sent in bf16; or the weights differ between ranks.
    """
    if run.sharding != "shard" or distributed.world_size == 1:
        return
    precision = resolve_precision(run.precision, distributed.device)
    if precision == "fp16":
        raise UserError(
            "run.sharding = shard needs run.precision = bf16 or fp32; or set run.sharding = replicate"
        )
    if run.sharding_dtype == "bf16" and precision != "bf16":
        raise UserError(
            f"run.sharding_dtype = bf16 needs run.precision = bf16, not {precision}; set it to fp32"
        )
    # After sharding every rank holds a different part, so a difference could no longer be detected.
    require_agreement({"sum of all weights": weight_sum(model)})
    # The warning concerns the temperature, which the model returns expanded to one row per clip and never
    # modifies.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(distributed.device.type, (distributed.world_size,))
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = half if run.sharding_dtype == "bf16" else MixedPrecisionPolicy()
    for block in _blocks(model):
        fully_shard(block, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    scalars = {p for p in model.parameters() if p.ndim == 0}
    fully_shard(model, mesh=mesh, reshard_after_forward=False, ignored_params=scalars)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks, which are the members of the outermost module lists."""
    blocks: list[nn.Module] = []
    for child in model.children():
        blocks.extend(child if isinstance(child, nn.ModuleList) else _blocks(child))
    return blocks


def is_sharded(model: nn.Module) -> bool:
    """Return whether `shard_model` has sharded this model."""
    return isinstance(model, FSDPModule)


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Gather the whole model on every rank for a `with` block, so that ranks may call it unequally often.

    The last batch of an evaluation may be empty on some ranks, while a forward pass of shards needs all ranks.
    Methods other than `forward` (`encode_text`) may be called as well. This needs the memory of the whole
    model.

    Args:
        model: the bare model, sharded or not; its weights must not change inside the block.
    """
    if isinstance(model, FSDPModule):
        # In an evaluation before the first step, a block would otherwise be initialized as the root. Public
        # methods initialize no root but in a forward pass of the model, which needs all ranks.
        model._get_fsdp_state()._lazy_init()
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(unit is not model, recurse=False)
            unit.reshard()


@contextmanager
def keeps_gradients_local(model: nn.Module) -> Iterator[None]:
    """Keep the gradients of a `with` block on their rank; the next backward pass outside of it adds them."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def average_whole_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients of unsharded scalars over ranks, which FSDP does only for sharded parameters."""
    for parameter in parameters:
        if parameter.grad is not None and not isinstance(parameter, DTensor):
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the 2-norm () over all gradients; every rank must call it if they are sharded."""
    grads = [p.grad for p in parameters if p.grad is not None]
    parts = [grad.to_local() for grad in grads if isinstance(grad, DTensor)]
    rest = [grad for grad in grads if not isinstance(grad, DTensor)]
    if not parts:
        return nn.utils.get_total_norm(rest)
    square = nn.utils.get_total_norm(parts).square()
    dist.all_reduce(square)
    return (square + nn.utils.get_total_norm(rest).square()).sqrt() if rest else square.sqrt()


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, *, norm: Tensor) -> None:
    """Scale all gradients in place so that their norm is at most `max_norm`.

    The numbers are those of `torch.nn.utils.clip_grads_with_norm_`, which scales sharded gradients one by one
    instead of in one kernel.

    Args:
        parameters: the parameters; those without a gradient are skipped.
        max_norm: largest norm.
        norm: 2-norm () of all gradients, see `gradient_norm`.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    parts = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
    if parts:
        torch._foreach_mul_(parts, torch.clamp(max_norm / (norm + 1e-6), max=1.0))


def weight_sum(model: nn.Module) -> float:
    """Return the sum of the absolute weights, to compare ranks; every rank must call it if they are sharded.

    It is rounded to twelve digits, because the order of summation depends on the machine's number of threads.
    """
    tensors = [p.detach() for p in model.parameters()]
    total = sum(float(t.double().abs().sum()) for t in tensors if not isinstance(t, DTensor))
    parts = [t.to_local() for t in tensors if isinstance(t, DTensor)]
    if parts:
        cut = torch.stack([part.double().abs().sum() for part in parts]).sum()
        dist.all_reduce(cut)
        total += float(cut)
    return float(f"{total:.12g}")


def gathered(state: Any, *, keep: bool) -> Any:
    """Replace the sharded tensors of a state dict by whole ones; every rank must call it if there are any.

    Args:
        state: nested dicts and lists of tensors and plain values.
        keep: whether to return whole tensors, on the CPU; False on ranks that only take part in the collectives
            and whose result is not used.

    Returns:
        The same structure; tensors that were whole before are the same objects.
    """
    if isinstance(state, DTensor):
        whole = state.full_tensor()
        return whole.cpu() if keep else None
    if isinstance(state, Mapping):
        return {key: gathered(value, keep=keep) for key, value in state.items()}
    if isinstance(state, list):
        return [gathered(value, keep=keep) for value in state]
    return state


def placed_like(whole: Tensor, own: Tensor) -> Tensor:
    """Shard a whole tensor like `own`; return the tensor itself if `own` is whole."""
    if not isinstance(own, DTensor):
        return whole
    # Every rank has read the whole tensor from the file, so nothing needs to be sent.
    return distribute_tensor(
        whole.to(own.device, own.dtype), own.device_mesh, own.placements, src_data_rank=None
    )
