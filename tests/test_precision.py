"""Precision by device, and the guard that stops a run before broken numbers are saved."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from toy_training import ToyLoader, ToySamplewise, make_loop, make_settings

from avion_dali.contracts import UserError
from avion_dali.engine.checkpoint import LATEST_NAME, load_checkpoint
from avion_dali.engine.precision import (
    MAX_OVERFLOWS,
    FiniteGuard,
    NonFiniteLossError,
    OverflowCount,
    autocast,
    gradient_scaler,
    resolve_precision,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp16")])
def test_auto_takes_what_the_device_has(monkeypatch, native, expected):
    # Emulated bf16 does not count: it is slower than fp16 on the GPUs that need it.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert resolve_precision("auto", GPU) == expected
    assert resolve_precision("auto", CPU) == "fp32"
    assert resolve_precision("fp32", GPU) == "fp32"
    assert resolve_precision("bf16", CPU) == "bf16"


def test_fp16_on_the_cpu_is_refused():
    with pytest.raises(UserError, match="run.precision = 'fp16' needs a GPU"):
        resolve_precision("fp16", CPU)


def test_autocast_and_scaler_follow_the_precision():
    left, right = torch.ones(2, 2), torch.ones(2, 2)
    with autocast("bf16", CPU):
        assert (left @ right).dtype == torch.bfloat16
    with autocast("fp32", CPU):
        assert (left @ right).dtype == torch.float32
    assert not gradient_scaler("bf16", CPU).is_enabled()
    scaler = gradient_scaler("fp16", CPU)
    assert scaler.is_enabled() and float(scaler.scale(torch.tensor(1.0))) == 65536.0


def watch(guard: FiniteGuard, step: int, loss: float, grad_norm: float = 1.0, samples: int = 3) -> None:
    guard.watch(
        step,
        loss=torch.tensor(loss),
        grad_norm=torch.tensor(grad_norm),
        sample_ids=np.arange(samples) + 10,
    )


def test_guard_passes_finite_numbers_and_names_broken_ones(tmp_path):
    guard = FiniteGuard(tmp_path, rank=0)
    for step in range(5):
        watch(guard, step, 1e30, 0.0)
    guard.check()
    assert not guard.path.exists()
    with pytest.raises(NonFiniteLossError, match="step 5: the loss is inf.*samples 10, 11, 12 "):
        watch(guard, 5, float("inf"))
    record = json.loads(guard.path.read_text())
    assert record == {"step": 5, "loss": "inf", "grad_norm": "1.0", "sample_ids": [10, 11, 12]}


def test_guard_names_the_gradient_shortens_long_lists_and_writes_per_rank(tmp_path):
    guard = FiniteGuard(tmp_path, rank=3)
    with pytest.raises(NonFiniteLossError, match=r"gradient norm is nan.* 16, 17 and 92 more \(all in"):
        watch(guard, 0, 1.0, float("nan"), samples=100)
    assert len(json.loads((tmp_path / "nonfinite.rank3.json").read_text())["sample_ids"]) == 100


def test_check_may_leave_the_newest_step_for_later(tmp_path, monkeypatch):
    """The order on a GPU, where the newest numbers are still under way."""
    guard = FiniteGuard(tmp_path, rank=0)
    check = guard.check
    monkeypatch.setattr(guard, "check", lambda keep=0: check(keep=1))
    watch(guard, 0, 1.0)
    watch(guard, 1, float("nan"))
    with pytest.raises(NonFiniteLossError, match="step 1"):
        watch(guard, 2, 1.0)
    monkeypatch.undo()
    guard.check()


def test_overflows_are_borne_until_there_are_too_many_in_a_row():
    count, inf, fine = OverflowCount(), torch.tensor(float("inf")), torch.tensor(3.0)
    for _ in range(MAX_OVERFLOWS - 1):
        assert float(count.watched_norm(inf)) == 0
    assert float(count.watched_norm(fine)) == 0
    for _ in range(MAX_OVERFLOWS - 1):
        assert float(count.watched_norm(torch.tensor(float("nan")))) == 0
    assert float(count.watched_norm(inf)) == float("inf")


class Overflowing(ToySamplewise):
    """Has a finite loss and an infinite gradient in every step."""

    def loss(self, outputs):
        loss, report = super().loss(outputs)
        return loss + (loss * 0).sqrt(), report


def test_a_scaler_that_skips_for_ever_ends_the_run(tmp_path):
    loop = make_loop(tmp_path, objective=Overflowing(), loader=ToyLoader(steps_per_epoch=100))
    loop.scaler = torch.amp.GradScaler("cpu")  # as under fp16, which the CPU lacks
    before = [p.detach().clone() for p in loop.model.parameters()]
    with pytest.raises(NonFiniteLossError, match=f"step {MAX_OVERFLOWS - 1}: the gradient norm is nan"):
        loop.run()
    assert all(torch.equal(a, b) for a, b in zip(before, loop.model.parameters(), strict=True))
    assert loop.scaler.get_scale() < 1


class PoisonedAt(ToySamplewise):
    """Turns the loss of one step into NaN."""

    def __init__(self, call: int, where: str) -> None:
        self.call, self.where, self.calls = call, where, 0

    def loss(self, outputs):
        loss, report = super().loss(outputs)
        self.calls += 1
        if self.calls != self.call:
            return loss, report
        if self.where == "loss":
            return loss * float("nan"), report
        # A finite loss whose gradient is not: the derivative of sqrt at 0 is infinite.
        return loss + (loss * 0).sqrt(), report


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_numbers_stop_the_run_before_anything_is_saved(tmp_path, where):
    settings = make_settings(tmp_path, save_every=1)
    loader = ToyLoader()
    train_loop = make_loop(tmp_path, objective=PoisonedAt(3, where), loader=loader, settings=settings)
    with pytest.raises(NonFiniteLossError, match=f"step 2: the {where}.*samples 256, 257, 258, 259 "):
        train_loop.run()
    saved = load_checkpoint(tmp_path / LATEST_NAME)
    assert saved.step == 2
    assert all(bool(torch.isfinite(tensor).all()) for tensor in saved.model.values())
    assert all(bool(torch.isfinite(p).all()) for p in train_loop.model.parameters())
    record = (tmp_path / "nonfinite.json").read_text()
    assert '"step": 2' in record and "259" in record
    assert loader.closed == 1
