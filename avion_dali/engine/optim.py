"""AdamW's parameter groups and the learning rate of every step."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from avion_dali.config import OptimConfig
from avion_dali.contracts import UserError

UNDECAYED_TABLES = frozenset(
    {
        "pos_embed",
        "positional_embedding",
        "temporal_embedding",
        "temporal_embed",
        "class_embedding",
        "cls_token",
        "cls_emb",
        "mask_token",
    }
)
"""Names of position tables and learned single tokens: they are added to activations and, unlike the weights of
a matrix product, have no scale that decay could regularise. (AVION decays the temporal table and the mask
token only because its name filter misses them.)"""


def _is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Matrices decay; vectors and scalars (norms, biases, logit scale) and embedding-like tables do not."""
    return parameter.ndim >= 2 and name.rpartition(".")[2] not in UNDECAYED_TABLES


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters into one group with weight decay and one without.

    Args:
        model: the model; parameters with `requires_grad=False` are left out.
        weight_decay: decay of the first group.

    Returns:
        Groups as `torch.optim` takes them, in the model's own order; empty groups are left out.

    Raises:
        UserError: nothing is trainable.
    """
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decayed if _is_decayed(name, parameter) else undecayed).append(parameter)
    if not decayed and not undecayed:
        raise UserError("the model has no trainable parameter; unfreeze at least one part of it")
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over parameter groups.

    The fused kernel is used: on GPUs one launch per group and no device sync under a gradient scaler, on CPUs
    one pass over each parameter instead of six.

    Args:
        groups: as made by `parameter_groups`; a group may carry `lr_scale`, see `set_learning_rate`.
        config: betas, epsilon and peak learning rate.

    Returns:
        The optimizer.
    """
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def learning_rate_schedule(config: OptimConfig, steps_per_epoch: int) -> np.ndarray:
    """The learning rate of every optimizer step.

    Linear warm-up from `warmup_learning_rate` to the peak, both ends included, then a cosine from the peak
    towards `final_learning_rate`, which it never quite reaches; so the peak appears twice (AVION,
    arXiv 2309.16669, released recipe). `constant` keeps the peak after the warm-up.

    Args:
        config: peak, ends, warm-up and epochs.
        steps_per_epoch: optimizer steps of one epoch.

    Returns:
        float64 array (epochs * steps_per_epoch,).
    """
    total = config.epochs * steps_per_epoch
    warmup = min(int(config.warmup_epochs * steps_per_epoch), total)
    rising = np.linspace(config.warmup_learning_rate, config.learning_rate, warmup)
    rest = total - warmup
    if config.schedule == "constant":
        return np.concatenate([rising, np.full(rest, config.learning_rate)])
    phase = np.pi * np.arange(rest) / max(rest, 1)
    span = config.learning_rate - config.final_learning_rate
    return np.concatenate([rising, config.final_learning_rate + span * (1 + np.cos(phase)) / 2])


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the rate of every group: `learning_rate` times the group's own `lr_scale` (1 without one)."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)
