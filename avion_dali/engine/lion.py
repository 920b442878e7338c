"""The Lion optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """Steps of equal size in the direction of the sign of an interpolated gradient, with decoupled decay.

    Source: Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675, program 1 (and
    algorithm 2 of its appendix). With moment m and gradient g: p <- p (1 - lr wd) - lr sign(b1 m + (1 - b1) g),
    then m <- b2 m + (1 - b2) g.

    Args:
        params: parameters or groups of them, which may carry `lr`, `betas` and `weight_decay` of their own.
        lr: learning rate.
        betas: of the step's direction and of the moment.
        weight_decay: share of the weights, times the rate, taken off each step.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Change all parameters that have a gradient.

        Args:
            closure: computes the loss again, with gradient; its value is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            pairs = [(p, p.grad) for p in group["params"] if p.grad is not None]
            if pairs:
                self._step_group([p for p, _ in pairs], [grad for _, grad in pairs], group)
        return loss

    def _step_group(self, params: list[torch.Tensor], grads: list[torch.Tensor], group: dict[str, Any]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["exp_avg"] = torch.zeros_like(p)
        moments = [self.state[p]["exp_avg"] for p in params]
        direction_beta, moment_beta = group["betas"]
        directions = torch._foreach_mul(moments, direction_beta)
        torch._foreach_add_(directions, grads, alpha=1.0 - direction_beta)
        for direction in directions:  # sign has no kernel over lists that knows sharded tensors
            direction.sign_()
        torch._foreach_mul_(params, 1.0 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, directions, alpha=-group["lr"])
        torch._foreach_lerp_(moments, grads, 1.0 - moment_beta)
