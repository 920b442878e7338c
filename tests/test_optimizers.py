"""Parameter groups, the optimizers and the learning-rate schedule."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from avion_dali.config import ModelConfig, OptimConfig
from avion_dali.contracts import UserError
from avion_dali.engine.optimizers import (
    LayerScales,
    build_optimizer,
    describe_rates,
    learning_rate_schedule,
    parameter_groups,
    set_learning_rate,
)
from avion_dali.models.classifier import build_classifier
from avion_dali.models.dual_encoder import build_dual_encoder
from avion_dali.models.layout import TowerLayout
from avion_dali.models.masked_video import build_masked_video


class Tower(nn.Module):
    layout = TowerLayout(
        tokens=("class_embedding", "mask_token"),
        frame_positions=("temporal_embedding",),
        place_positions=("positional_embedding",),
    )

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


def test_declared_tables_are_exempt_in_every_part_and_under_no_other_name():
    whole = nn.ModuleDict({"a": Tower(), "b": nn.Module()})
    whole["b"].register_parameter("mask_token", nn.Parameter(torch.zeros(1, 1, 4)))
    decayed, undecayed = (names_of(whole, group) for group in parameter_groups(whole, 0.2))
    assert "a.positional_embedding" in undecayed and "a.mask_token" in undecayed
    assert "b.mask_token" in decayed  # this part declares nothing


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


def one_parameter(values: list[float], config: OptimConfig) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    weight = nn.Parameter(torch.tensor([values], dtype=torch.float64))
    return weight, build_optimizer([{"params": [weight], "weight_decay": config.weight_decay}], config)


def test_lion_takes_the_published_steps():
    """Vector computed with the released implementation."""
    config = OptimConfig(optimizer="lion", learning_rate=0.1, beta1=0.9, beta2=0.95, weight_decay=0.05)
    weight, optimizer = one_parameter([1.0, -2.0, 0.5], config)
    steps = [
        ([0.3, -0.1, 0.0], [0.895, -1.89, 0.4975], [0.015, -0.005, 0.0]),
        ([-4.0, 0.2, 0.0], [0.990525, -1.980550, 0.495012], [-0.18575, 0.00525, 0.0]),
    ]
    for grad, expected, moment in steps:
        weight.grad = torch.tensor([grad], dtype=torch.float64)
        optimizer.step()
        np.testing.assert_allclose(weight.detach().numpy()[0], expected, atol=1e-6)
        np.testing.assert_allclose(optimizer.state[weight]["exp_avg"].numpy()[0], moment, atol=1e-9)


def test_lion_is_the_published_formula():
    """Chen et al. 2023, arXiv 2302.06675, program 1, over groups with decay and rate of their own."""
    generator = torch.Generator().manual_seed(0)
    config = OptimConfig(optimizer="lion", learning_rate=0.01, beta1=0.9, beta2=0.99)
    values = [torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2)]
    weights = [nn.Parameter(value.clone()) for value in values]
    groups = [{"params": [weights[0]], "weight_decay": 0.3, "lr_scale": 0.5}]
    groups.append({"params": [weights[1]], "weight_decay": 0.0})
    optimizer = build_optimizer(groups, config)
    moments = [torch.zeros(5, 7, dtype=torch.float64) for _ in range(2)]
    for step in range(20):
        set_learning_rate(optimizer, rate := 0.01 * (1 + step))
        for i, (lr, decay) in enumerate(((0.5 * rate, 0.3), (rate, 0.0))):
            grad = torch.randn(5, 7, generator=generator, dtype=torch.float64)
            weights[i].grad = grad
            direction = (0.9 * moments[i] + 0.1 * grad).sign()
            values[i] = values[i] * (1 - lr * decay) - lr * direction
            moments[i] = 0.99 * moments[i] + 0.01 * grad
        optimizer.step()
        for i in range(2):
            torch.testing.assert_close(weights[i].detach(), values[i], atol=1e-7, rtol=0)
            torch.testing.assert_close(optimizer.state[weights[i]]["exp_avg"], moments[i], atol=1e-12, rtol=0)
            assert optimizer.state[weights[i]].keys() == {"exp_avg"}  # as in checkpoints


def test_both_ways_of_lion_agree():
    """Parameter by parameter, as on CPUs, and all at once, as on GPUs."""
    generator = torch.Generator().manual_seed(0)
    start, grad = torch.randn(2, 3, 6, 5, generator=generator)
    results = []
    for foreach in (False, True):
        weights = [nn.Parameter(value.clone()) for value in start]
        optimizer = build_optimizer(
            [{"params": weights, "weight_decay": 0.1, "foreach": foreach}], OptimConfig(optimizer="lion")
        )
        for _ in range(3):
            for weight, value in zip(weights, grad, strict=True):
                weight.grad = value.clone()
            optimizer.step()
        results.append(torch.stack([weight.detach() for weight in weights]))
    torch.testing.assert_close(results[0], results[1], atol=1e-7, rtol=0)


def test_lion_goes_on_from_its_saved_state():
    config = OptimConfig(optimizer="lion", learning_rate=0.1)
    grads = torch.tensor([[[0.3, -0.1]], [[-0.2, 0.1]], [[0.1, 0.1]]], dtype=torch.float64)

    def train(weight: nn.Parameter, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        for grad in grads[first:last]:
            weight.grad = grad
            optimizer.step()

    straight = one_parameter([1.0, 2.0], config)
    train(*straight, 0, 3)
    part = one_parameter([1.0, 2.0], config)
    train(*part, 0, 2)
    resumed = one_parameter(part[0].detach()[0].tolist(), config)
    resumed[1].load_state_dict(part[1].state_dict())
    train(*resumed, 2, 3)
    assert torch.equal(resumed[0], straight[0])


def test_lion_passes_parameters_without_gradient_over_and_runs_a_closure():
    config = OptimConfig(optimizer="lion", learning_rate=0.1, weight_decay=0.5)
    weight, optimizer = one_parameter([1.0, 2.0], config)
    assert optimizer.step() is None
    assert weight.tolist() == [[1.0, 2.0]]
    assert optimizer.step(lambda: 3.0) == 3.0


def test_sgd_has_momentum_and_coupled_decay():
    config = OptimConfig(optimizer="sgd", learning_rate=0.1, beta1=0.9, weight_decay=0.5)
    weight, optimizer = one_parameter([1.0, -2.0], config)
    value, speed = np.array([1.0, -2.0]), np.zeros(2)
    for grad in ([0.3, -0.1], [0.2, 0.4]):
        weight.grad = torch.tensor([grad], dtype=torch.float64)
        optimizer.step()
        speed = 0.9 * speed + (np.array(grad) + 0.5 * value)
        value = value - 0.1 * speed
    np.testing.assert_allclose(weight.detach().numpy()[0], value, rtol=1e-9)


def test_layer_decay_vector():
    """Of a tower with 12 blocks at 0.75, as VideoMAE fine-tunes."""
    with torch.device("meta"):
        model = build_classifier(
            ModelConfig(encoder="videomae"), num_classes=5, num_frames=2, frame_size=32, dropout=0.0
        )
    scales = LayerScales(model, 0.75)
    assert scales.of("visual.patch_embed.proj.weight") == pytest.approx(0.023757, abs=5e-7)
    assert scales.of("visual.blocks.0.mlp.fc1.weight") == pytest.approx(0.031676, abs=5e-7)
    assert scales.of("visual.blocks.11.norm1.weight") == 0.75
    assert scales.of("visual.fc_norm.weight") == scales.of("fc_cls.weight") == 1.0


def test_encoder_and_decoder_of_a_masked_video_model_have_layers_of_their_own():
    config = ModelConfig(encoder="videomae", size="tiny")
    scales = LayerScales(build_masked_video(config, num_frames=2, frame_size=32, decoder_depth=2), 0.5)
    assert scales.of("encoder.patch_embed.proj.bias") == 0.5**5
    assert scales.of("encoder.blocks.3.norm1.weight") == scales.of("decoder.blocks.1.norm1.weight") == 0.5
    assert (
        scales.of("mask_token") == scales.of("encoder_to_decoder.weight") == scales.of("decoder.head.bias") == 1
    )


@pytest.mark.parametrize("encoder", ["vit", "timesformer", "videomae"])
def test_layers_of_all_encoders_are_known(encoder):
    model = build_classifier(
        ModelConfig(encoder=encoder, size="tiny"), num_classes=5, num_frames=2, frame_size=32, dropout=0.0
    )
    groups = parameter_groups(model, 0.1, layer_decay=0.5)
    scale_of = {name: group["lr_scale"] for group in groups for name in names_of(model, group)}
    assert scale_of.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    last = {name for name, scale in scale_of.items() if scale == 1.0}
    assert {"fc_cls.weight", "fc_cls.bias"} <= last
    assert all(name.startswith(("fc_cls", "visual.ln_post", "visual.norm", "visual.fc_norm")) for name in last)
    stem = {name.removeprefix("visual.").split(".")[0] for name, scale in scale_of.items() if scale == 0.5**5}
    tables = {"class_embedding", "positional_embedding", "temporal_embedding"}
    others = {"cls_token", "pos_embed", "temporal_embed", "patch_embed", "ln_pre", "conv1"}
    assert stem and stem <= tables | others
    for name, scale in scale_of.items():
        if "blocks." in name:
            assert scale == 0.5 ** (4 - int(name.split("blocks.")[1].split(".")[0])), name
    decays = {name: group["weight_decay"] for group in groups for name in names_of(model, group)}
    plain = {name: g["weight_decay"] for g in parameter_groups(model, 0.1) for name in names_of(model, g)}
    assert decays == plain


def test_both_towers_of_a_dual_encoder_have_layers_of_their_own():
    model = build_dual_encoder(ModelConfig(size="tiny"), num_frames=2, frame_size=32)  # 4 and 2 blocks
    scales = LayerScales(model, 0.5)
    assert scales.of("visual.conv1.weight") == 0.5**5
    assert scales.of("textual.token_embedding.weight") == 0.5**3
    assert scales.of("textual.transformer.resblocks.1.ln_1.weight") == 0.5
    assert scales.of("visual.image_projection") == scales.of("logit_scale") == 1.0


CLASSIFICATION = OptimConfig(
    optimizer="sgd",
    global_batch=512,
    epochs=100,
    learning_rate=3e-3,
    rate_batch=128,
    warmup_epochs=2,
    warmup_learning_rate=1e-6,
    final_learning_rate=1e-5,
)


def test_rates_are_stated_for_a_batch_and_scaled_to_the_run():
    """The effective values of AVION's recognition recipe."""
    rates = learning_rate_schedule(CLASSIFICATION, 131)
    assert rates[0] == pytest.approx(4e-6) and rates.max() == pytest.approx(0.012)
    assert rates[-1] == pytest.approx(4e-5, rel=0.01) and rates[-1] > 4e-5
    assert build_optimizer([{"params": [nn.Parameter(torch.zeros(1))]}], CLASSIFICATION).defaults["lr"] == 0.012
    plain = learning_rate_schedule(replace(CLASSIFICATION, rate_batch=0), 131)
    np.testing.assert_allclose(rates, 4 * plain)


def test_rates_are_described():
    assert describe_rates(CLASSIFICATION) == (
        "learning rate 0.012 = 0.003 x 512 / 128 (optim.global_batch / optim.rate_batch), "
        "after 2 epochs of warm-up from 4e-06, then a cosine to 4e-05"
    )
    config = OptimConfig(schedule="constant", layer_decay=0.75)
    assert describe_rates(config) == "learning rate 3e-05, then constant; layer decay 0.75"
