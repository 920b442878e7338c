"""Precision by device, and overflows under fp16."""

from __future__ import annotations

import pytest
import torch
from toy_training import ToyLoader, ToySamplewise, make_loop

from avion_dali.contracts import UserError
from avion_dali.engine.loss_guard import NonFiniteLossError
from avion_dali.engine.precision import (
    MAX_OVERFLOWS,
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
