"""What only a CUDA device can show, see the `gpu` mark in pyproject.toml; what a CPU can do runs there, too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_objectives_train import KEY, ONE_EACH, make_batch, make_case
from torch import nn
from torch.nn.utils import parameters_to_vector

from avion_dali.config import AttentionBackend, AugmentConfig, ClassificationConfig, ModelConfig, OptimConfig
from avion_dali.contracts import ClipBatch, UserError
from avion_dali.decode import cpu_fused
from avion_dali.device_ops.augment import augment_frames
from avion_dali.device_ops.erasing import erase_boxes
from avion_dali.device_ops.masks import tube_masks
from avion_dali.device_ops.mixing import mix_clips
from avion_dali.device_ops.normalize import normalize_frames
from avion_dali.engine.checkpoint import load_checkpoint, save_checkpoint
from avion_dali.engine.optimizers import build_optimizer, parameter_groups
from avion_dali.engine.precision import autocast, gradient_scaler, resolve_precision
from avion_dali.engine.train_state import TrainState
from avion_dali.loading.clip_group import RowFacts
from avion_dali.loading.faults import LoaderStats
from avion_dali.loading.frames_strategy import FramesStrategy
from avion_dali.loading.ring import SharedRing
from avion_dali.loading.strategy import PendingBatch
from avion_dali.models.attention import attend, resolve_attention
from avion_dali.models.dual_encoder import build_dual_encoder
from avion_dali.models.masked_video import tube_targets

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
on_each_device = pytest.mark.parametrize(
    "device", [pytest.param(CPU, id="cpu"), pytest.param(CUDA, id="cuda", marks=pytest.mark.gpu)]
)


def on_device(batch: ClipBatch, device: torch.device) -> ClipBatch:
    """The batch as a loader delivers it: ids stay on the host."""
    names = ("frames_BTHWC", "tokens_BL", "labels_B")
    return replace(batch, **{name: getattr(batch, name).to(device) for name in names})


def differentiate(
    model: nn.Module, objective: object, device: torch.device, precision: str
) -> tuple[float, torch.Tensor]:
    """Loss and gradient (all parameters in a row, on the CPU) of one step."""
    model.to(device).zero_grad()
    with autocast(precision, device):
        loss, _ = objective.loss(objective.outputs(model, on_device(make_batch(), device), KEY))
    loss.backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return float(loss.detach()), parameters_to_vector(grads).cpu()


@on_each_device
def test_copies_from_the_ring_are_whole_and_slots_can_be_reused(device: torch.device) -> None:
    ring = SharedRing(2, (4, 1, 2, 64, 64, 3))
    strategy, stats = FramesStrategy(cpu_fused.decode_clip), LoaderStats()
    strategy.open(ring, device, stats)
    kept = []
    for turn in range(20):
        slot = turn % 2
        strategy.wait_until_free(slot)
        ring.frames(slot)[:] = turn + 1
        batch = PendingBatch[float](turn, 0, slot, [0, 1, 2], RowFacts.empty(3, 0))
        batch.valid[1], batch.results = False, [0.5, None, 0.25]
        kept.append(strategy.frames(batch))
    for turn, frames in enumerate(kept):
        assert frames.device.type == device.type and frames.shape == (3, 2, 64, 64, 3)
        assert (frames[[0, 2]] == turn + 1).all() and not frames[1].any()
    assert stats.decode_s == 20 * 0.75
    strategy.close()
    strategy.close()  # twice is allowed
    ring.close()


@on_each_device
@pytest.mark.parametrize(("encoder", "name"), ONE_EACH)
def test_steps_agree_with_those_of_the_cpu_in_float32(encoder: str, name: str, device: torch.device) -> None:
    model, objective = make_case(encoder, name)
    loss, grad = differentiate(model, objective, CPU, "fp32")
    assert float(grad.norm()) > 1e-3
    exact_loss, exact_grad = differentiate(model, objective, device, "fp32")
    assert exact_loss == pytest.approx(loss, rel=1e-3)
    assert float((exact_grad - grad).norm() / grad.norm()) < 1e-2
    half = resolve_precision("auto", device) if device == CUDA else "bf16"
    half_loss, half_grad = differentiate(model, objective, device, half)
    assert half_loss == pytest.approx(loss, rel=5e-2)
    assert float(torch.cosine_similarity(half_grad, grad, dim=0)) > 0.98


@on_each_device
@pytest.mark.parametrize(("encoder", "name"), ONE_EACH)
def test_steps_in_half_precision_lower_the_loss(encoder: str, name: str, device: torch.device) -> None:
    model, objective = make_case(encoder, name)
    groups = parameter_groups(model.to(device), 0.01)
    optimizer = build_optimizer(groups, OptimConfig(learning_rate=5e-4))
    losses = []
    for _ in range(4):
        losses.append(differentiate(model, objective, device, "bf16")[0])
        optimizer.step()
    assert losses[-1] < losses[0] and np.isfinite(losses).all()
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@on_each_device
@pytest.mark.parametrize("backend", ["sdpa", "flash-attn", "xformers"])
@pytest.mark.parametrize("queries", [1, 50])
def test_attention_and_its_gradient_equal_the_formula(
    backend: AttentionBackend, queries: int, device: torch.device
) -> None:
    try:
        resolve_attention(backend, device, dtype=torch.bfloat16)
    except UserError as error:
        pytest.skip(str(error))
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, length, 64) for length in (queries, 50, 50)]
    exact = [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]
    half = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    expected, mixed = attend(*exact, "math"), attend(*half, backend)
    towards = torch.randn(expected.shape, generator=generator).to(device)
    torch.testing.assert_close(mixed.float(), expected, atol=0.03, rtol=0.03)
    (expected * towards).sum().backward()
    (mixed.float() * towards).sum().backward()
    for ours, right in zip(half, exact, strict=True):
        error = (ours.grad.float() - right.grad).norm() / right.grad.norm()
        assert float(error) < 0.02


def clips(frames: int = 4, side: int = 32) -> torch.Tensor:
    """Smooth pictures, uint8 (6, T, H, W, 3): rounding differs between devices, and noise would multiply it."""
    generator = torch.Generator().manual_seed(2)
    coarse = torch.rand(6 * frames, 3, 4, 4, generator=generator) * 255
    smooth = nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 255).round().byte()
    return smooth.unflatten(0, (6, frames)).permute(0, 1, 3, 4, 2).contiguous()


@on_each_device
def test_augmentation_is_that_of_the_cpu(device: torch.device) -> None:
    frames, ids = clips(), np.arange(6)
    config = AugmentConfig(color_jitter=0.4, rand_augment_ops=2)
    expected = augment_frames(frames, config, KEY, ids).float()
    found = augment_frames(frames.to(device), config, KEY, ids)
    assert found.device.type == device.type and found.dtype == torch.uint8
    # A level more or less, which equalisation and solarisation can blow up here and there.
    difference = (found.cpu().float() - expected).abs()
    assert float(difference.mean()) < 1.5 and float((difference > 4).float().mean()) < 0.05
    assert float((frames.float() - expected).abs().mean()) > 10


@on_each_device
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_is_that_of_the_cpu(kind: str, device: torch.device) -> None:
    frames, labels = normalize_frames(clips(), "openai"), torch.arange(6) % 4
    options = {"num_classes": 4, "config": ClassificationConfig(**{kind: 1.0}, label_smoothing=0.1), "key": KEY}
    expected = mix_clips(frames, labels, **options)
    found = mix_clips(normalize_frames(clips().to(device), "openai"), labels.to(device), **options)
    assert not torch.equal(expected[0], frames)
    for ours, right in zip(found, expected, strict=True):
        assert ours.device.type == device.type
        torch.testing.assert_close(ours.cpu(), right, atol=1e-4, rtol=1e-4)


@on_each_device
def test_the_same_boxes_are_erased_as_on_the_cpu(device: torch.device) -> None:
    frames = normalize_frames(clips(), "openai")
    expected = erase_boxes(frames, 0.6, key=KEY, clip_ids=np.arange(6)) != frames
    moved = frames.to(device)
    found = erase_boxes(moved, 0.6, key=KEY, clip_ids=np.arange(6))
    assert torch.equal((found != moved).cpu(), expected)
    assert 0 < int(expected.flatten(1).any(dim=1).sum()) < 6
    noise = found[found != moved]  # drawn by the device itself
    assert abs(float(noise.mean())) < 0.1 and abs(float(noise.std()) - 1) < 0.1


@on_each_device
@pytest.mark.parametrize("normalize", [False, True])
def test_hidden_tubes_are_those_of_the_cpu(normalize: bool, device: torch.device) -> None:
    masks = tube_masks(np.arange(6), time_slots=2, places=4, ratio=0.5, key=KEY)
    assert masks.device == CPU
    expected = tube_targets(clips(), masks, normalize=normalize)
    found = tube_targets(clips().to(device), masks, normalize=normalize)
    assert found.device.type == device.type
    torch.testing.assert_close(found.cpu(), expected, atol=1e-3, rtol=1e-3)


@on_each_device
@pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])
def test_optimizers_move_as_their_formulas(name: str, device: torch.device) -> None:
    """On CPUs and GPUs the fused kernels, against a few lines in float64."""
    config = OptimConfig(optimizer=name, learning_rate=0.01, beta1=0.8, beta2=0.9, eps=1e-8)
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(4, 5, generator=generator)
    weights = nn.Parameter(start.clone().to(device))
    optimizer = build_optimizer([{"params": [weights], "weight_decay": 0.1}], config)
    assert name == "lion" or optimizer.param_groups[0]["fused"]
    grads = [torch.randn(4, 5, generator=generator) for _ in range(4)]
    for grad in grads:
        weights.grad = grad.to(device)
        optimizer.step()
    expected = by_formula(name, start.double(), [grad.double() for grad in grads])
    torch.testing.assert_close(weights.detach().cpu().double(), expected, atol=1e-5, rtol=1e-5)


def by_formula(name: str, weights: torch.Tensor, grads: list[torch.Tensor]) -> torch.Tensor:
    """Weights after some steps of rate 0.01, decay 0.1, betas 0.8 and 0.9."""
    first, second = torch.zeros_like(weights), torch.zeros_like(weights)
    for step, grad in enumerate(grads, start=1):
        if name == "sgd":
            first = 0.8 * first + grad + 0.1 * weights
            weights = weights - 0.01 * first
            continue
        weights = weights * (1 - 0.01 * 0.1)
        if name == "lion":
            weights = weights - 0.01 * (0.8 * first + 0.2 * grad).sign()
            first = 0.9 * first + 0.1 * grad
            continue
        first, second = 0.8 * first + 0.2 * grad, 0.9 * second + 0.1 * grad**2
        deviation = (second / (1 - 0.9**step)).sqrt() + 1e-8
        weights = weights - 0.01 * first / (1 - 0.8**step) / deviation
    return weights


def make_state(device: torch.device, *, seed: int) -> tuple[TrainState, object]:
    _, objective = make_case("vit", "contrastive")
    torch.manual_seed(seed)
    config = ModelConfig(size="tiny", context_length=8, embed_dim=32)
    model = build_dual_encoder(config, num_frames=2, frame_size=32).to(device)
    optimizer = build_optimizer(parameter_groups(model, 0.01), OptimConfig(learning_rate=2e-4))
    scaler = gradient_scaler("fp16" if device == CUDA else "bf16", device)
    return TrainState(model, optimizer, scaler, order={"seed": 0}), objective


def train_step(state: TrainState, objective: object, device: torch.device) -> float:
    with autocast("fp16" if device == CUDA else "bf16", device):
        loss, _ = objective.loss(objective.outputs(state.model, on_device(make_batch(), device), KEY))
    state.optimizer.zero_grad()
    state.scaler.scale(loss).backward()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    return float(loss.detach())


@on_each_device
def test_a_checkpoint_continues_where_it_was_taken(device: torch.device, tmp_path: Path) -> None:
    state, objective = make_state(device, seed=1)
    losses = [train_step(state, objective, device) for _ in range(6)]  # of fp16's, the first may overflow
    assert losses[-1] < losses[0]
    save_checkpoint(tmp_path / "c.pt", state.capture(config={}, world_size=1, keep=True))
    other, _ = make_state(device, seed=2)
    assert train_step(other, objective, device) not in losses
    read = load_checkpoint(tmp_path / "c.pt")
    assert {tensor.device for tensor in read.model.values()} == {CPU}
    other.restore(read, source="c.pt")
    for name, tensor in state.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], tensor), name
    assert other.scaler.get_scale() == state.scaler.get_scale()
    for ours, right in zip(other.optimizer.state.values(), state.optimizer.state.values(), strict=True):
        assert ours["exp_avg"].device.type == device.type
        assert torch.equal(ours["exp_avg_sq"], right["exp_avg_sq"])
    for _ in range(2):
        loss = train_step(state, objective, device)
        assert train_step(other, objective, device) == pytest.approx(loss, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("checkpoint_every", [0, 1])
def test_compiled_blocks_equal_plain_ones(checkpoint_every: int) -> None:
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        config = ModelConfig(
            size="tiny", context_length=8, compile=compiled, checkpoint_every=checkpoint_every, embed_dim=32
        )
        model = build_dual_encoder(config, num_frames=2, frame_size=32)
        _, objective = make_case("vit", "contrastive")
        found.append(differentiate(model, objective, CUDA, "bf16"))
    assert found[1][0] == pytest.approx(found[0][0], rel=2e-2)
    assert float(torch.cosine_similarity(found[1][1], found[0][1], dim=0)) > 0.99
