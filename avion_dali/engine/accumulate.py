"""Gradient accumulation: several micro-batches with the result of one large batch, and their random draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from avion_dali.engine.sharding import is_sharded, keeps_gradients_local

Outputs = tuple[torch.Tensor, ...]
Report = Mapping[str, torch.Tensor | float]
_UINT64 = 0xFFFF_FFFF_FFFF_FFFF


def micro_seed(seed: int, step: int, *, rank: int, micro: int) -> int:
    """Derive the seed of torch's generators for one forward pass: SplitMix64 over the four numbers in turn.

    Dropout, drop path and masks of a pass depend only on these numbers. Therefore a resumed run repeats them
    without stored random state, and so does the second pass of `coupled_backward`.

    Args:
        seed: the run's seed.
        step: optimizer step.
        rank: rank of this process.
        micro: index of the micro-batch within the step.

    Returns:
        A 64-bit number.
    """
    state = 0
    for value in (seed, step, rank, micro):
        state = (state + value + 0x9E37_79B9_7F4A_7C15) & _UINT64
        state = ((state ^ (state >> 30)) * 0xBF58_476D_1CE4_E5B9) & _UINT64
        state = ((state ^ (state >> 27)) * 0x94D0_49BB_1331_11EB) & _UINT64
        state ^= state >> 31
    return state


def averages_gradients(model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """Return the context of one micro-batch that averages gradients over ranks only in the last micro-batch.

    Until then, sharded gradients stay whole on every rank, so that they are sent once per step.
    """
    if last:
        return nullcontext()
    if is_sharded(model):
        return keeps_gradients_local(model)
    if not isinstance(model, DistributedDataParallel):
        return nullcontext()
    no_sync: AbstractContextManager[None] = model.no_sync()
    return no_sync


def coupled_backward(
    forward: Callable[[int], Outputs],
    *,
    micro_batches: int,
    loss_of: Callable[[Outputs], tuple[torch.Tensor, Report]],
    backward: Callable[[torch.Tensor], None],
    context: Callable[[int], AbstractContextManager[None]],
) -> tuple[torch.Tensor, Report]:
    """Run the backward pass of one loss over several micro-batches, keeping the graph of only one at a time.

    Cached features (GradCache, arXiv 2101.06983, section 3): a first pass without graph collects all outputs,
    the loss gives the gradient of each output, and a second pass propagates it to the weights. The result is
    that of one large batch, provided that `forward` repeats its random draws.

    Args:
        forward: maps the index of a micro-batch to its outputs, each (samples, ...).
        micro_batches: number of micro-batches.
        loss_of: maps the concatenated outputs of all micro-batches to (loss (), report).
        backward: back-propagates the loss, scaled if the precision requires it.
        context: entered around the second forward and backward of a micro-batch.

    Returns:
        The loss and the report.
    """
    with torch.no_grad():
        cached = [forward(micro) for micro in range(micro_batches)]
    columns = list(zip(*cached, strict=True))
    leaves = tuple(torch.cat(column).requires_grad_() for column in columns)
    loss, report = loss_of(leaves)
    backward(loss)
    grads = [_split_grad(leaf, column) for leaf, column in zip(leaves, columns, strict=True)]
    for micro in range(micro_batches):
        with context(micro):
            pairs = [(out, grad[micro]) for out, grad in zip(forward(micro), grads, strict=True)]
            live = [(out, grad) for out, grad in pairs if out.requires_grad and grad is not None]
            torch.autograd.backward([out for out, _ in live], [grad for _, grad in live])
    return loss.detach(), report


def _split_grad(leaf: torch.Tensor, column: Outputs) -> list[torch.Tensor | None]:
    """Split the gradient of one output into micro-batches; None if the loss does not use the output."""
    if leaf.grad is None:
        return [None] * len(column)
    return list(leaf.grad.split([part.shape[0] for part in column]))


def mean_over_micro_batches(
    results: list[tuple[torch.Tensor, Report]],
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Average the losses and reports of micro-batches of equal size: () float32 on the device of the loss."""
    loss = torch.stack([loss for loss, _ in results]).float().mean()
    names = results[0][1]
    columns = {name: [torch.as_tensor(report[name]).to(loss) for _, report in results] for name in names}
    return loss, {name: torch.stack(column).mean() for name, column in columns.items()}
