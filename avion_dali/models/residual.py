"""Residual blocks in order: stochastic depth, activation checkpointing and compilation.

Source of stochastic depth: Huang et al. 2016, "Deep Networks with Stochastic Depth", arXiv 1603.09382.
Axes: B clips or texts, N tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from avion_dali.config import CompileMode


class DropPathBlock(nn.Module):
    """Base class of residual blocks whose branches are dropped for random clips in training.

    `run_blocks` draws the factors of both branches and gives them to `forward`, so that the rate is no constant
    of a compiled block. Blocks with different rates share their compiled code, and a compiled block drops the
    same branches as a plain one.
    """

    def __init__(self, drop_path_rate: float) -> None:
        """Store the rate.

        Args:
            drop_path_rate: probability that a branch of a clip is zeroed, in [0, 1).
        """
        super().__init__()
        self.drop_path_rate = drop_path_rate

    def branch_factors(self, x_BND: Tensor) -> tuple[Tensor, ...]:
        """Draw the factors of the block's two branches.

        Args:
            x_BND: input of the block, float (B, N, D).

        Returns:
            Two tensors (B, 1, 1) for `forward`, in the input's dtype; none if nothing is dropped.
        """
        if not self.training or self.drop_path_rate == 0.0:
            return ()
        return drop_path_factors(x_BND, self.drop_path_rate), drop_path_factors(x_BND, self.drop_path_rate)


def drop_path_factors(x_BND: Tensor, rate: float) -> Tensor:
    """Draw the factors that zero a residual branch for random clips and preserve its expectation.

    Args:
        x_BND: tokens, float (B, N, D), which determine dtype and device.
        rate: probability that the branch of a clip is zeroed, in [0, 1).

    Returns:
        (B, 1, 1): 0 or 1 / (1 - rate).
    """
    keep = 1.0 - rate
    return x_BND.new_empty(x_BND.shape[0], 1, 1).bernoulli_(keep) / keep


def add_branch(x_BND: Tensor, branch_BND: Tensor, factors_B11: Tensor | None) -> Tensor:
    """Add a residual branch, multiplied by its drop path factors if there are any: float (B, N, D)."""
    if factors_B11 is None:
        return x_BND + branch_BND
    return x_BND + branch_BND * factors_B11.to(branch_BND.dtype)


def run_blocks(blocks: nn.ModuleList, x_BND: Tensor, *, checkpoint_every: int) -> Tensor:
    """Apply blocks in order, storing only the input of those that are recomputed in the backward pass.

    Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174.

    Args:
        blocks: the blocks; each maps float (B, N, D) to (B, N, D). A `DropPathBlock` also gets its factors.
        x_BND: tokens.
        checkpoint_every: recompute the first block and every n-th block after it; 0 recomputes none.
    """
    for i, block in enumerate(blocks):
        factors = block.branch_factors(x_BND) if isinstance(block, DropPathBlock) else ()
        if checkpoint_every and i % checkpoint_every == 0 and torch.is_grad_enabled():
            x_BND = checkpoint(block, x_BND, *factors, use_reentrant=False)
        else:
            x_BND = block(x_BND, *factors)
    return x_BND


def compile_blocks(blocks: nn.ModuleList, *, enabled: bool, mode: CompileMode) -> None:
    """Compile each block in place at its first call, so that parameters keep their names.

    The blocks of a tower share the compiled code, because their weights and drop path factors are its inputs.

    Args:
        blocks: blocks of a tower.
        enabled: False does nothing.
        mode: torch.compile's mode.
    """
    if enabled:
        for block in blocks:
            block.compile(mode=mode)


class BlockStack(nn.Module):
    """Blocks in order; this class gives them the parameter names `resblocks.<i>` of CLIP's towers."""

    def __init__(
        self, blocks: list[nn.Module], *, checkpoint_every: int, compile: bool, compile_mode: CompileMode
    ) -> None:
        """Collect the blocks.

        Args:
            blocks: the blocks.
            checkpoint_every: see `run_blocks`.
            compile: whether to run torch.compile on each block.
            compile_mode: torch.compile's mode.
        """
        super().__init__()
        self.checkpoint_every = checkpoint_every
        self.resblocks = nn.ModuleList(blocks)
        compile_blocks(self.resblocks, enabled=compile, mode=compile_mode)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Float (B, N, D) -> (B, N, D)."""
        return run_blocks(self.resblocks, x_BND, checkpoint_every=self.checkpoint_every)
