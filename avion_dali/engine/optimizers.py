"""Optimizers, their parameter groups, and the learning rate of each step."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from avion_dali.config import OptimConfig
from avion_dali.contracts import UserError
from avion_dali.models.layout import declared_layouts


class LayerScales:
    """Factors on the learning rate of each layer, relative to that of the head.

    Source: layer-wise decay as in BEiT (Bao et al. 2021, arXiv 2106.08254) and VideoMAE's fine-tuning. A
    tower of L blocks has L + 2 layers: its stem, position tables and learned tokens are layer 0, block i is
    layer i + 1, and the parameters after the blocks or outside of towers are layer L + 1. The factor of layer l
    is decay^(L + 1 - l). Towers declare the role of their parameters, see `TowerLayout`.

    Args:
        model: the model.
        decay: factor between a layer and the next layer, in (0, 1].
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._layouts = declared_layouts(model)
        self._depths = {
            prefix: sum(1 for _ in model.get_submodule(prefix + layout.blocks).children())
            if layout.blocks
            else 0
            for prefix, layout in self._layouts.items()
        }

    def of(self, name: str) -> float:
        """Return the factor of one parameter.

        Args:
            name: name of the parameter in the model.
        """
        prefixes = [prefix for prefix in self._layouts if name.startswith(prefix)]
        prefix = max(prefixes, key=len, default="")
        depth = self._depths.get(prefix, 0)
        if not depth:
            return 1.0
        layout, own_name = self._layouts[prefix], name.removeprefix(prefix)
        if own_name.startswith(f"{layout.blocks}."):
            layer = 1 + int(own_name.removeprefix(f"{layout.blocks}.").split(".")[0])
        else:
            layer = 0 if layout.in_stem(own_name) else depth + 1
        return float(self.decay ** (depth + 1 - layer))


def parameter_groups(
    model: nn.Module, weight_decay: float, *, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Split the trainable parameters by weight decay and, with layer decay, by layer.

    Weight decay applies to matrices. Vectors and scalars (norms, biases, the logit scale) are exempt, as are
    position tables and learned tokens, which towers declare in their `TowerLayout`.

    Args:
        model: the model; parameters with `requires_grad=False` are excluded.
        weight_decay: decay of the matrices.
        layer_decay: factor between the learning rates of a block and the next block, see `LayerScales`; 1 for
            equal rates.

    Returns:
        Groups for `torch.optim`, in the order of the model. With layer decay each has the `lr_scale` of its
        layer, see `set_learning_rate`. Without it, the first group has the matrices and the second the other
        parameters.

    Raises:
        UserError: no parameter is trainable.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise UserError("the model has no trainable parameter; unfreeze at least one part of it")
    scales = LayerScales(model, layer_decay)
    undecayed = {p + table for p, layout in declared_layouts(model).items() for table in layout.undecayed}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in trainable.items():
        is_exempt = parameter.ndim < 2 or name in undecayed
        groups.setdefault((scales.of(name), is_exempt), []).append(parameter)
    return [
        {"params": groups[scale, is_exempt], "weight_decay": 0.0 if is_exempt else weight_decay}
        | ({"lr_scale": scale} if layer_decay < 1 else {})
        for scale, is_exempt in sorted(groups)
    ]


def build_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """Create the configured optimizer over parameter groups.

    Fused kernels are used where available: on GPUs they need one launch per group and no device sync with a
    gradient scaler, on CPUs one pass over each parameter instead of six. SGD adds the weight decay to the
    gradient (as AVION's recipe does); the other optimizers decay the weights directly.

    Args:
        groups: output of `parameter_groups`.
        config: the optimizer, its constants and the peak learning rate.

    Returns:
        The optimizer.
    """
    rate, betas = config.learning_rate * config.rate_factor, (config.beta1, config.beta2)
    if config.optimizer == "lion":
        from timm.optim.lion import Lion  # imported here because it takes seconds

        return Lion(groups, lr=rate, betas=betas)
    if config.optimizer == "sgd":
        # Fused SGD does not support sharded parameters.
        sharded = any(isinstance(p, DTensor) for group in groups for p in group["params"])
        return torch.optim.SGD(groups, lr=rate, momentum=config.beta1, fused=not sharded)
    return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=config.eps, fused=True)


def learning_rate_schedule(config: OptimConfig, steps_per_epoch: int) -> np.ndarray:
    """Compute the learning rate of every optimizer step.

    A linear warm-up from `warmup_learning_rate` to the peak, including both ends, is followed by a cosine from
    the peak towards `final_learning_rate`, which it does not quite reach. The peak therefore occurs twice
    (AVION, arXiv 2309.16669, released recipe). `constant` keeps the peak after the warm-up.

    All rates are multiplied by `rate_factor`, including the first and the final one (AVION's classification
    recipe: 0.003 for a batch of 128 becomes 0.012 for 512, and 1e-6 and 1e-5 become 4e-6 and 4e-5).

    Args:
        config: learning rates, warm-up and epochs.
        steps_per_epoch: optimizer steps per epoch.

    Returns:
        float64 array (epochs * steps_per_epoch,).
    """
    first, peak, final = scaled_rates(config)
    total = config.epochs * steps_per_epoch
    warmup = min(int(config.warmup_epochs * steps_per_epoch), total)
    rising = np.linspace(first, peak, warmup)
    rest = total - warmup
    if config.schedule == "constant":
        return np.concatenate([rising, np.full(rest, peak)])
    phase = np.pi * np.arange(rest) / max(rest, 1)
    return np.concatenate([rising, final + (peak - final) * (1 + np.cos(phase)) / 2])


def scaled_rates(config: OptimConfig) -> tuple[float, float, float]:
    """Return the first, peak and final learning rates, scaled to the global batch."""
    rates = (config.warmup_learning_rate, config.learning_rate, config.final_learning_rate)
    first, peak, final = (rate * config.rate_factor for rate in rates)
    return first, peak, final


def describe_rates(config: OptimConfig) -> str:
    """Return one line that describes the learning rate and its derivation, for the start of a training.

    Args:
        config: the configuration.
    """
    first, peak, final = scaled_rates(config)
    text = f"learning rate {peak:g}"
    if config.rate_batch:
        text += f" = {config.learning_rate:g} x {config.global_batch} / {config.rate_batch}"
        text += " (optim.global_batch / optim.rate_batch)"
    if config.warmup_epochs:
        epochs = "epoch" if config.warmup_epochs == 1 else "epochs"
        text += f", after {config.warmup_epochs:g} {epochs} of warm-up from {first:g}"
    text += f", then a cosine to {final:g}" if config.schedule == "cosine" else ", then constant"
    return text + (f"; layer decay {config.layer_decay:g}" if config.layer_decay < 1 else "")


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of every group to `learning_rate` times the group's `lr_scale` (1 by default)."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)
