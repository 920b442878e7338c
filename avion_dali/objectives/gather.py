"""Gathers the rows of all ranks in one tensor, with or without gradients; no process group means one rank.

Axes: B rows of this rank, G rows of all ranks, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from avion_dali.contracts import UserError


def world_size() -> int:
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Gather(torch.autograd.Function):
    """All-gather whose backward pass sums the gradient over ranks.

    `torch.distributed.nn.functional.all_gather` does the same, but PyTorch has deprecated it in favor of a
    private module, and it gathers into a list of tensors, which needs another copy.
    """

    @staticmethod
    def forward(ctx: Any, x_BD: Tensor) -> Tensor:
        ctx.rows = x_BD.shape[0]
        x_GD = x_BD.new_empty(world_size() * x_BD.shape[0], *x_BD.shape[1:])
        dist.all_gather_into_tensor(x_GD, x_BD.contiguous())
        return x_GD

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        grad_GD = grad_outputs[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad_GD)
        first = dist.get_rank() * ctx.rows
        return grad_GD[first : first + ctx.rows]


def gather_with_grad(x_BD: Tensor) -> Tensor:
    """Stack the rows of all ranks in rank order.

    The gradient of a rank's rows is summed over ranks. If every rank computes the same loss from the gathered
    rows, the sum is `world_size()` times the gradient of the loss, and the mean over ranks in data-parallel
    training makes it exact. Every rank must call it, forward and backward, with the same number of rows (see
    `check_equal_rows`).

    Args:
        x_BD: this rank's rows, (B, ...).

    Returns:
        (world_size * B, ...); the input itself without a process group or with one rank.
    """
    if world_size() == 1:
        return x_BD
    gathered: Tensor = _Gather.apply(x_BD)
    return gathered


def rank() -> int:
    """Return the rank of this process; 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


def gather_rows(x_BD: Tensor) -> Tensor:
    """Stack the rows of all ranks in rank order, without gradient.

    Args:
        x_BD: this rank's rows, (B, ...), the same number on every rank.

    Returns:
        (world_size * B, ...), detached.
    """
    x_BD = x_BD.detach()
    if world_size() == 1:
        return x_BD
    x_GD = x_BD.new_empty(world_size() * x_BD.shape[0], *x_BD.shape[1:])
    dist.all_gather_into_tensor(x_GD, x_BD.contiguous())
    return x_GD


def check_equal_rows(rows: int, device: torch.device) -> None:
    """Check that all ranks hold the same number of rows; every rank must call it.

    It waits for the device, so it should be called once and not in every step.

    Args:
        rows: rows of this rank.
        device: device of the process group's tensors (CPU for gloo, the rank's GPU for NCCL).

    Raises:
        UserError: when the ranks differ; lists the number of each rank.
    """
    if world_size() == 1:
        return
    rows_R = torch.empty(world_size(), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(rows_R, torch.tensor([rows], dtype=torch.int64, device=device))
    counts: list[int] = rows_R.tolist()
    if len(set(counts)) > 1:
        raise UserError(
            f"the ranks hold {counts} clips of one step, but all must hold the same number; "
            "make optim.global_batch a multiple of the number of ranks"
        )


class EqualRows:
    """Rejects steps in which ranks hold different numbers of rows, which the collectives cannot handle.

    Ranks are compared only in the first step. Later each rank compares with its own first step, without
    waiting.
    """

    def __init__(self) -> None:
        self._rows: int | None = None

    def check(self, rows: int, device: torch.device) -> None:
        """Check the number of rows; every rank must call it in every step.

        Args:
            rows: rows of this rank.
            device: device of the process group's tensors.

        Raises:
            UserError: the numbers differ.
        """
        if self._rows is None:
            check_equal_rows(rows, device)
            self._rows = rows
        if world_size() > 1 and rows != self._rows:
            raise UserError(
                f"this rank holds {rows} clips in this step and held {self._rows} before; all steps must "
                "hold the same number"
            )
