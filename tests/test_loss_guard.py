"""Loss spikes (against the running median: logged, skipped, or the end), and numbers that are not finite."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch
from toy_training import ToyLoader, ToySamplewise, assert_same, make_loop, make_settings, weights

from avion_dali.engine.checkpoint import LATEST_NAME, load_checkpoint
from avion_dali.engine.loss_guard import (
    WARM_UP,
    WINDOW,
    FiniteGuard,
    LossSpikeError,
    NonFiniteLossError,
    SpikeWatch,
)
from avion_dali.engine.run_log import LOG_NAME, read_rows

CPU = torch.device("cpu")


def test_excess_is_loss_over_factor_times_median_of_the_window():
    rng = np.random.default_rng(0)
    losses = rng.uniform(1, 2, 250).astype(np.float32).tolist()
    watch = SpikeWatch(3.0, CPU)
    for i, loss in enumerate(losses):
        excess = float(watch.excess(torch.tensor(loss)))
        known = sorted(losses[max(0, i - WINDOW) : i])
        # torch takes the lower of two middle values.
        expected = loss / (3.0 * statistics.median_low(known)) if i >= WARM_UP else 0.0
        assert excess == pytest.approx(expected, rel=1e-5)


def test_zero_loss_has_no_spikes_and_state_continues():
    watch = SpikeWatch(2.0, CPU)
    for _ in range(50):
        assert float(watch.excess(torch.tensor(0.0))) == 0
    assert float(watch.excess(torch.tensor(1.0))) == 0
    one, two = SpikeWatch(2.0, CPU), SpikeWatch(2.0, CPU)
    for i in range(40):
        one.excess(torch.tensor(1.0 + i))
    two.load_state_dict(one.state_dict())
    two_fresh = SpikeWatch(2.0, CPU)
    two_fresh.load_state_dict({})
    assert float(one.excess(torch.tensor(99.0))) == float(two.excess(torch.tensor(99.0))) > 1
    assert float(two_fresh.excess(torch.tensor(99.0))) == 0


class Jumping(ToySamplewise):
    """Multiplies the loss of some steps."""

    def __init__(self, steps: set[int]) -> None:
        self.steps, self.step = steps, -1

    def outputs(self, model, batch, key):
        self.step = key.step
        return super().outputs(model, batch, key)

    def loss(self, outputs):
        loss, report = super().loss(outputs)
        return loss * (1000 if self.step in self.steps else 1), report


def spiky(folder, on_spike: str, *, steps: set[int] = frozenset({25, 27}), max_steps: int = 30):
    settings = make_settings(folder, spike_factor=5.0, on_spike=on_spike, max_steps=max_steps)
    settings = replace(settings, optim=replace(settings.optim, learning_rate=1e-4))
    return make_loop(folder, objective=Jumping(steps), loader=ToyLoader(steps_per_epoch=30), settings=settings)


def spike_rows(folder) -> list[dict]:
    return [row for row in read_rows(folder / LOG_NAME) if row["kind"] == "spike"]


def test_spikes_are_logged_with_their_samples(tmp_path):
    spiky(tmp_path, "log").run()
    rows = spike_rows(tmp_path)
    assert [row["step"] for row in rows] == [26, 28] and not rows[0]["skipped"]
    assert rows[0]["sample_ids"] == [25 * 128 + i for i in range(4)] and rows[0]["excess"] > 100


def test_a_skipped_step_leaves_weights_and_moments_alone(tmp_path):
    loop = spiky(tmp_path, "skip", max_steps=25)
    loop.run()
    before = weights(loop.model)
    moments = {key: value.clone() for key, value in loop.optimizer.state[loop.parameters[0]].items()}
    again = spiky(tmp_path, "skip", max_steps=26)
    again.restore(tmp_path / LATEST_NAME)  # the window of losses is part of the checkpoint
    again.run()
    assert_same(before, weights(again.model))
    assert_same(moments, dict(again.optimizer.state[again.parameters[0]]))
    assert [(row["step"], row["skipped"]) for row in spike_rows(tmp_path)] == [(26, True)]


def test_stop_ends_before_anything_is_saved(tmp_path):
    loop = spiky(tmp_path, "stop")
    with pytest.raises(LossSpikeError, match=r"step 25: the loss is .*samples 3200, 3201, 3202, 3203\. Lower"):
        loop.run()
    assert not (tmp_path / LATEST_NAME).exists()


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
    with pytest.raises(NonFiniteLossError, match=r"gradient norm is nan.* 16, 17 and 92 more \(all are listed"):
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
