"""The training loop: exact accumulation, replayed randomness, evaluation, best weights, clean ends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_training import (
    ROWS,
    ToyContrastive,
    ToyLoader,
    ToySamplewise,
    assert_same,
    gradients_after_one_step,
    make_loop,
    make_settings,
    reference_gradients,
    toy_batch,
    weights,
)

from avion_dali.config import TrainConfig
from avion_dali.contracts import UserError
from avion_dali.engine.accumulate import micro_seed
from avion_dali.engine.checkpoint import (
    BEST_NAME,
    LATEST_NAME,
    find_checkpoint,
    load_checkpoint,
)
from avion_dali.engine.distributed import Distributed
from avion_dali.engine.loop import TrainLoop
from avion_dali.engine.loop_settings import LoopSettings
from avion_dali.engine.run_log import LOG_NAME, read_rows
from avion_dali.models.safetensors_files import read_safetensors


@pytest.mark.parametrize("objective", [ToyContrastive(), ToySamplewise()], ids=["coupled", "samplewise"])
@pytest.mark.parametrize("accum_steps", [1, 3])
def test_accumulation_equals_one_large_batch(tmp_path, objective, accum_steps):
    train_loop = make_loop(tmp_path, objective=objective, loader=ToyLoader(accum_steps=accum_steps))
    grads = gradients_after_one_step(train_loop)
    assert_same(grads, reference_gradients(objective, micro_batches=accum_steps), atol=1e-6)
    two_passes = objective.couples_samples and accum_steps > 1
    assert train_loop.model.forwards == accum_steps * (2 if two_passes else 1)


def test_coupled_accumulation_differs_from_averaging_micro_losses(tmp_path):
    """Guards the test above: with in-batch negatives, averaging per micro-batch is another gradient."""
    naive = ToyContrastive()
    naive.couples_samples = False
    grads = gradients_after_one_step(make_loop(tmp_path, objective=naive, loader=ToyLoader(accum_steps=3)))
    exact = reference_gradients(ToyContrastive(), micro_batches=3)
    assert max(float((grads[name] - exact[name]).abs().max()) for name in exact) > 1e-3


def test_coupled_accumulation_skips_outputs_without_gradient(tmp_path):
    train_loop = make_loop(tmp_path, loader=ToyLoader(accum_steps=2))
    train_loop.model.logit_scale.requires_grad_(False)
    (_,) = train_loop.steps(0, 1)
    assert train_loop.model.logit_scale.grad is None
    reference = reference_gradients(ToyContrastive(), micro_batches=2)
    name, weight = "video.0.weight", train_loop.model.video[0].weight
    torch.testing.assert_close(weight.grad, reference[name], rtol=0, atol=1e-6)


def splitmix64(state: int) -> int:
    """One output of Vigna's public-domain generator, in numpy's wrapping arithmetic."""
    with np.errstate(over="ignore"):
        z = np.uint64(state) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return int(z ^ (z >> np.uint64(31)))


def test_micro_seed_is_chained_splitmix_and_spreads():
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # the published first output for seed 0
    expected = 0
    for value in (5, 17, 2, 1):
        expected = splitmix64((expected + value) % 2**64)
    assert micro_seed(5, 17, rank=2, micro=1) == expected
    grid = [(a, b, c, d) for a in range(4) for b in range(4) for c in range(4) for d in range(4)]
    seeds = {micro_seed(a, b, rank=c, micro=d) for a, b, c, d in grid}
    assert len({seed & 0xFFFF_FFFF for seed in seeds}) == 256  # the CPU generator takes the low half


def test_loss_falls_and_rows_are_complete(tmp_path):
    settings = make_settings(tmp_path)
    settings = replace(settings, optim=replace(settings.optim, epochs=20, warmup_epochs=1))
    train_loop = make_loop(tmp_path, objective=ToySamplewise(), settings=settings)
    summary = train_loop.run()
    rows = [row for row in read_rows(tmp_path / LOG_NAME) if row["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert [row["epoch"] for row in rows[:7]] == [0, 0, 0, 1, 1, 1, 2]
    assert np.mean([r["loss"] for r in rows[-5:]]) < 0.7 * np.mean([r["loss"] for r in rows[:5]])
    assert summary.step == 60 and summary.loss == rows[-1]["loss"]
    assert rows[0]["learning_rate"] == pytest.approx(1e-6) and rows[3]["learning_rate"] == pytest.approx(0.01)
    needed = {"clips_per_s", "data_wait_share", "memory_mb", "replaced", "grad_norm", "decoder", "constant"}
    assert needed <= rows[0].keys()
    assert rows[4]["delivered"] == 5 * ROWS
    header = read_rows(tmp_path / LOG_NAME)[0]
    assert header["kind"] == "header" and header["accum_steps"] == 1 and header["precision"] == "fp32"


def test_steps_and_train_step_are_what_run_does(tmp_path):
    """The public parts, put together by a caller, give the numbers and weights of `run`."""
    settings = make_settings(tmp_path / "run")
    whole = make_loop(tmp_path / "run", settings=settings, loader=ToyLoader(accum_steps=2))
    whole.run()
    losses = [r["loss"] for r in read_rows(tmp_path / "run" / LOG_NAME) if r["kind"] == "train"]
    ranged = make_loop(tmp_path / "none", loader=ToyLoader(accum_steps=2))
    numbers = [*ranged.steps(0, 4), *ranged.steps(4, 6)]
    assert [float(row["loss"]) for row in numbers] == losses
    given = make_loop(tmp_path / "none", loader=ToyLoader(accum_steps=2))
    for step in range(6):
        given.train_step([toy_batch(step, micro) for micro in range(2)])
    single = make_loop(tmp_path / "none", objective=ToySamplewise())
    for batch in single.loader.batches(0, 6):
        single.optimizer.zero_grad()
        loss, _ = single.micro_step(batch, 0)
        single.optimizer_step(loss, batch.sample_ids)
    samplewise = make_loop(tmp_path / "none", objective=ToySamplewise())
    assert len(list(samplewise.steps(0, 6))) == samplewise.step == single.step == 6
    assert_same(weights(single.model), weights(samplewise.model))
    for loop in (ranged, given):
        assert loop.step == 6
        assert_same(weights(loop.model), weights(whole.model))
    assert not (tmp_path / "none").exists()  # nothing is saved or logged outside of `run`


def test_micro_batches_are_taken_when_they_are_needed(tmp_path):
    loop = make_loop(tmp_path, objective=ToySamplewise(), loader=ToyLoader(accum_steps=3))
    forwards = []

    def batches():
        for micro in range(3):
            forwards.append(loop.model.forwards)
            yield toy_batch(0, micro)

    loop.train_step(batches())
    assert forwards == [0, 1, 2]


def test_wrong_numbers_of_batches_and_steps_are_errors(tmp_path):
    loop = make_loop(tmp_path, loader=ToyLoader(accum_steps=2))
    before = weights(loop.model)
    for count in (0, 1, 3):
        with pytest.raises(ValueError, match=f"a step has 2 micro-batches, not {count}"):
            loop.train_step([toy_batch(0, micro) for micro in range(count)])
    with pytest.raises(ValueError, match="at step 0 and cannot begin with step 2"):
        next(loop.steps(2, 3))
    assert loop.step == 0
    assert_same(weights(loop.model), before)


def test_after_step_sees_every_update(tmp_path):
    train_loop = make_loop(tmp_path)

    def clamp() -> None:
        with torch.no_grad():
            train_loop.model.logit_scale.clamp_(max=1.5)

    train_loop.after_step = clamp
    train_loop.run()
    assert train_loop.model.logit_scale.item() <= 1.5


def test_clipping_bounds_the_gradient_and_reports_the_norm_before(tmp_path):
    settings = make_settings(tmp_path)
    plain = make_loop(tmp_path, settings=settings)
    grads = gradients_after_one_step(plain)
    norm = float(torch.cat([g.flatten() for g in grads.values()]).norm())
    clipped = make_loop(
        tmp_path, settings=replace(settings, optim=replace(settings.optim, clip_grad_norm=0.01))
    )
    (numbers,) = clipped.steps(0, 1)
    assert float(numbers["grad_norm"]) == pytest.approx(norm, rel=1e-5) and norm > 0.01
    total = torch.cat([p.grad.flatten() for p in clipped.model.parameters()]).norm()
    assert float(total) == pytest.approx(0.01, rel=1e-3)


def scripted(scores: list[float]):
    remaining = list(scores)
    return lambda: {"score": remaining.pop(0), "other": 0.0}


def test_best_checkpoint_survives_worse_evaluations_also_across_resume(tmp_path):
    settings = make_settings(tmp_path)
    settings = replace(settings, optim=replace(settings.optim, epochs=4))
    first = make_loop(
        tmp_path,
        settings=replace(settings, run=replace(settings.run, max_steps=6)),
        evaluate=scripted([0.5, 0.4]),
    )
    assert first.run().best_metric == 0.5
    assert load_checkpoint(tmp_path / BEST_NAME).step == 3
    second = make_loop(tmp_path, settings=settings, evaluate=scripted([0.45, 0.6]))
    second.restore(tmp_path / LATEST_NAME)
    summary = second.run()
    assert summary.best_metric == 0.6 and summary.metrics["score"] == 0.6
    best = load_checkpoint(tmp_path / BEST_NAME)
    assert (best.step, best.best_metric, best.pending_evaluation) == (12, 0.6, False)
    rows = [row for row in read_rows(tmp_path / LOG_NAME) if row["kind"] == "evaluation"]
    assert [(row["step"], row["score"]) for row in rows] == [(3, 0.5), (6, 0.4), (9, 0.45), (12, 0.6)]


def test_nan_is_never_best_and_unknown_metric_is_named(tmp_path):
    train_loop = make_loop(tmp_path, evaluate=scripted([float("nan"), 0.1]))
    assert train_loop.run().best_metric == 0.1
    other = make_loop(tmp_path / "b", evaluate=lambda: {"accuracy": 1.0})
    with pytest.raises(UserError, match="does not report the best metric 'score'; choose one of accuracy"):
        other.run()


def test_evaluation_is_in_eval_mode_every_n_epochs_and_at_the_end(tmp_path):
    settings = make_settings(tmp_path, eval_every=2)
    settings = replace(settings, optim=replace(settings.optim, epochs=5))
    seen = []
    train_loop = make_loop(tmp_path, settings=settings)

    def evaluate() -> dict[str, float]:
        seen.append((train_loop.step, train_loop.model.training, torch.is_grad_enabled()))
        return {"score": 0.0}

    train_loop.checkpointer.evaluate = evaluate
    train_loop.run()
    assert seen == [(6, False, False), (12, False, False), (15, False, False)]
    assert train_loop.model.training


def test_failed_evaluation_costs_no_training_and_is_done_after_resume(tmp_path):
    def fail() -> dict[str, float]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        make_loop(tmp_path, evaluate=fail).run()
    again = make_loop(tmp_path, evaluate=scripted([0.3, 0.2]))
    again.restore(tmp_path / LATEST_NAME)
    assert again.step == 3 and again.state.pending_evaluation
    again.run()
    rows = [row for row in read_rows(tmp_path / LOG_NAME) if row["kind"] == "evaluation"]
    assert [(row["step"], row["score"]) for row in rows] == [(3, 0.3), (6, 0.2)]
    assert again.loader.asked == [3, 4, 5]


def test_interrupt_closes_everything_and_leaves_whole_files(tmp_path):
    loader = ToyLoader()
    settings = make_settings(tmp_path, save_every=1)
    train_loop = make_loop(tmp_path, loader=loader, settings=settings)

    def interrupt() -> None:
        if train_loop.step == 4:
            raise KeyboardInterrupt

    train_loop.after_step = interrupt
    with pytest.raises(KeyboardInterrupt):
        train_loop.run()
    assert loader.closed == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [LATEST_NAME, LOG_NAME]
    assert load_checkpoint(tmp_path / LATEST_NAME).step == 4


def test_finished_run_resumes_to_nothing(tmp_path):
    make_loop(tmp_path, evaluate=scripted([0.1, 0.2])).run()
    again = make_loop(tmp_path, evaluate=scripted([]))
    again.restore(tmp_path / LATEST_NAME)
    summary = again.run()
    assert summary.step == 6 and again.loader.asked == [] and summary.best_metric == 0.2


def test_bf16_autocast_trains_close_to_fp32(tmp_path):
    settings = make_settings(tmp_path, precision="bf16")
    loader = ToyLoader(accum_steps=2)
    grads = gradients_after_one_step(make_loop(tmp_path, loader=loader, settings=settings))
    exact = reference_gradients(ToyContrastive(), micro_batches=2)
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        assert float((grad - exact[name]).norm()) < 0.1 * float(exact[name].norm()) + 1e-3, name


def test_too_small_a_manifest_and_a_short_loader_are_errors(tmp_path):
    with pytest.raises(UserError, match="fewer clips than one global batch"):
        make_loop(tmp_path, loader=ToyLoader(steps_per_epoch=0))
    short = ToyLoader()
    short.batches = lambda first_step, last_step: iter([toy_batch(0, 0)])
    with pytest.raises(RuntimeError, match="the loader ended within step 1 of 6"):
        make_loop(tmp_path, loader=short).run()
    assert short.closed == 1


def test_settings_come_from_the_training_configuration():
    config = TrainConfig(output_dir="runs/x", decoder="cpu-fused")
    settings = LoopSettings.from_config(config, best_metric="map")
    assert settings.output_dir == Path("runs/x") and settings.config["optim"]["epochs"] == 5
    assert (settings.decoder, settings.best_metric) == ("cpu-fused", "map")
    assert settings.facts()["best_metric"] == "map"  # the report finds it in the header of the log
    assert LoopSettings.from_config(config, decoder="dali").decoder == "dali"


def test_the_average_of_the_weights_is_evaluated_saved_and_continued(tmp_path):
    settings = make_settings(tmp_path)
    settings = replace(settings, optim=replace(settings.optim, ema_decay=0.9))
    seen: list[dict[str, torch.Tensor]] = []

    def trained(folder: Path, **run: object) -> TrainLoop:
        own = replace(settings, output_dir=folder, run=replace(settings.run, **run))
        loop = make_loop(
            folder, settings=own, evaluate=lambda: seen.append(weights(loop.model)) or {"score": 1.0}
        )
        path = find_checkpoint(folder, "auto")
        if path:
            loop.restore(path)
        loop.run()
        return loop

    straight = trained(tmp_path / "a")
    expected = weights(make_loop(tmp_path / "none").model)
    history: list[dict[str, torch.Tensor]] = []
    plain = make_loop(tmp_path / "plain", after_step=lambda: history.append(weights(plain.model)))
    plain.run()
    for step in history:
        expected = {name: 0.9 * expected[name] + 0.1 * step[name] for name in step}
    assert_same(seen[1], expected, atol=1e-6)  # the second evaluation is that of the last step
    assert_same(weights(straight.model), history[-1])  # and the weights are back
    average = load_checkpoint(tmp_path / "a" / BEST_NAME).average
    assert_same(average, seen[0])
    straight.export(tmp_path / "w.safetensors")
    assert_same(read_safetensors(tmp_path / "w.safetensors")[0], seen[1])
    trained(tmp_path / "b", max_steps=2)
    trained(tmp_path / "b")
    assert_same(seen[-1], seen[1])


def test_header_says_how_the_batch_and_the_rates_come_about(tmp_path, capsys):
    settings = make_settings(tmp_path)
    settings = replace(settings, optim=replace(settings.optim, global_batch=12, rate_batch=6))
    make_loop(tmp_path, settings=settings, loader=ToyLoader(accum_steps=3)).run()
    printed = capsys.readouterr().out
    assert "batch: 12 clips per step = 1 ranks x 4 clips x 3 micro-batches" in printed
    assert "learning rate 0.02 = 0.01 x 12 / 6" in printed


def test_time_and_energy_of_a_killed_start_are_kept(tmp_path):
    first = make_loop(tmp_path, settings=make_settings(tmp_path, save_every=2))
    first.after_step = lambda: (_ for _ in ()).throw(KeyboardInterrupt) if first.step == 5 else None
    with pytest.raises(KeyboardInterrupt):
        first.run()
    used = read_rows(tmp_path / LOG_NAME)[-1]["elapsed_s"]
    again = make_loop(tmp_path)
    again.restore(tmp_path / LATEST_NAME)
    again.run()
    rows = read_rows(tmp_path / LOG_NAME)
    kinds = [(row["kind"], row["step"]) for row in rows]
    assert kinds[5:8] == [("end", 4), ("header", 4), ("train", 5)] and kinds[-1] == ("end", 6)
    assert rows[5]["elapsed_s"] == used


def test_only_rank_zero_writes(tmp_path):
    # A second rank without a process group: what it does alone must leave no file.
    train_loop = make_loop(tmp_path)
    train_loop.distributed = train_loop.checkpointer.distributed = Distributed(rank=1, world_size=2)
    train_loop.run()
    assert list(tmp_path.iterdir()) == []
