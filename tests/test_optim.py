"""Parameter groups, AdamW and the learning-rate schedule."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from avion_dali.config import ModelConfig, OptimConfig
from avion_dali.contracts import UserError
from avion_dali.engine.optim import (
    build_optimizer,
    learning_rate_schedule,
    parameter_groups,
    set_learning_rate,
)
from avion_dali.models.dual_encoder import build_dual_encoder


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(4))
        self.positional_embedding = nn.Parameter(torch.zeros(6, 4))
        self.temporal_embedding = nn.Parameter(torch.zeros(2, 4))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.token_embedding = nn.Embedding(9, 4)
        self.ln_pre = nn.LayerNorm(4)
        self.attention = nn.Linear(4, 12)
        self.projection = nn.Parameter(torch.zeros(4, 2))
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.frozen = nn.Parameter(torch.zeros(3, 3), requires_grad=False)


def names_of(model: nn.Module, group: dict) -> set[str]:
    ids = {id(p) for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in ids}


def test_only_matrices_decay():
    model = Tower()
    decayed, undecayed = parameter_groups(model, 0.2)
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.2, 0.0)
    assert names_of(model, decayed) == {"token_embedding.weight", "attention.weight", "projection"}
    tables = {"class_embedding", "positional_embedding", "temporal_embedding", "mask_token", "logit_scale"}
    assert names_of(model, undecayed) == tables | {"attention.bias", "ln_pre.weight", "ln_pre.bias"}


def test_the_dual_encoders_tables_are_exempt():
    model = build_dual_encoder(ModelConfig(size="tiny"), num_frames=2, frame_size=32)
    decayed, undecayed = parameter_groups(model, 0.2)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names_of(model, decayed) | names_of(model, undecayed) == trainable
    for name in names_of(model, decayed):
        assert not any(word in name for word in ("positional", "temporal", "class_emb", "cls", "pos_embed")), (
            name
        )
    assert any("temporal" in name for name in names_of(model, undecayed))


def test_nothing_trainable_is_a_user_error():
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(UserError, match="no trainable parameter"):
        parameter_groups(model, 0.1)


def test_empty_groups_are_left_out():
    assert len(parameter_groups(nn.Linear(2, 2, bias=False), 0.1)) == 1


VECTOR = [0.01, 0.34, 0.67, 1, 1, 0.965746, 0.868198, 0.722208, 0.55, 0.377792, 0.231802, 0.134254]
CONFIG = OptimConfig(
    epochs=3, warmup_epochs=1, learning_rate=1.0, warmup_learning_rate=0.01, final_learning_rate=0.1
)


def test_schedule_matches_the_released_recipe():
    np.testing.assert_allclose(learning_rate_schedule(CONFIG, 4), VECTOR, atol=5e-7)


def test_constant_schedule_keeps_the_peak_after_warmup():
    rates = learning_rate_schedule(replace(CONFIG, schedule="constant"), 4)
    np.testing.assert_allclose(rates, VECTOR[:4] + [1.0] * 8)


@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.3, 3.0])
def test_schedule_has_one_rate_per_step(warmup):
    rates = learning_rate_schedule(replace(CONFIG, warmup_epochs=warmup), 7)
    rising = int(warmup * 7)
    assert len(rates) == 21 and rates.max() == 1.0 and rates.min() >= 0.01
    assert (np.diff(rates[:rising]) > 0).all() and (np.diff(rates[rising:]) < 0).all()


def test_adamw_takes_one_textbook_step():
    config = OptimConfig(learning_rate=0.1, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.5)
    start = np.array([[1.0, -2.0], [0.5, 3.0]])
    weight = nn.Parameter(torch.tensor(start))
    optimizer = build_optimizer([{"params": [weight], "weight_decay": config.weight_decay}], config)
    grad = np.array([[0.3, -0.1], [0.0, 2.0]])
    weight.grad = torch.tensor(grad)
    optimizer.step()
    # Loshchilov and Hutter, arXiv 1711.05101, algorithm 2, at t = 1: both bias corrections cancel.
    expected = start * (1 - 0.1 * 0.5) - 0.1 * grad / (np.abs(grad) + 1e-3)
    np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-6)


def test_learning_rate_reaches_every_group_with_its_own_scale():
    parameters = list(nn.Linear(2, 2).parameters())
    groups = [{"params": [parameters[0]], "lr_scale": 0.25}, {"params": [parameters[1]]}]
    optimizer = build_optimizer(groups, OptimConfig())
    set_learning_rate(optimizer, 0.4)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.4]
