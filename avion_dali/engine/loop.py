"""The one training loop. What differs between tasks is the objective and the configuration.

A step is: `next_batch` -> `micro_step` (forward and backward, once per micro-batch) -> `optimizer_step`;
`run` repeats it and logs, evaluates and saves in between. Steps are counted over all epochs from 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn

from avion_dali.contracts import ClipBatch, UserError
from avion_dali.engine.accumulate import (
    Report,
    averages_gradients,
    coupled_backward,
    mean_over_micro_batches,
    micro_seed,
)
from avion_dali.engine.checkpoint import (
    BEST_NAME,
    LATEST_NAME,
    Checkpoint,
    check_order,
    load_checkpoint,
    restore_model,
    restore_optimizer,
    save_checkpoint,
)
from avion_dali.engine.distributed import Distributed, barrier, data_parallel
from avion_dali.engine.optim import learning_rate_schedule, set_learning_rate
from avion_dali.engine.precision import FiniteGuard, autocast, gradient_scaler, resolve_precision
from avion_dali.engine.run_log import RunLog, row_over_ranks
from avion_dali.engine.settings import LoopSettings
from avion_dali.engine.timing import StepTimer


class LoaderStats(Protocol):
    """What a loader counts since it was made, on this rank."""

    @property
    def delivered(self) -> int:
        """Clips handed out."""

    @property
    def replaced(self) -> int:
        """Clips of these that stand in for one that could not be read."""

    @property
    def decoded_on_cpu(self) -> int:
        """Clips of these that the decoder in use left to `cpu-fused`."""


class ClipLoader(Protocol):
    """Delivers this rank's micro-batches in an order that depends on seed, epoch and step alone."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch."""

    @property
    def accum_steps(self) -> int:
        """Micro-batches per optimizer step and rank."""

    @property
    def stats(self) -> LoaderStats:
        """Counts so far."""

    def batches(self, first_step: int, last_step: int) -> Iterator[ClipBatch]:
        """Micro-batches of steps `first_step` up to but not including `last_step`, in order.

        A delivered batch belongs to the receiver: later batches do not overwrite it.
        """

    def close(self) -> None:
        """End the workers; may be called twice."""


class Objective(Protocol):
    """Maps micro-batches to a loss."""

    @property
    def couples_samples(self) -> bool:
        """Whether a sample's loss depends on the other samples of the batch, as in contrastive losses."""

    def outputs(self, model: nn.Module, batch: ClipBatch) -> tuple[torch.Tensor, ...]:
        """Run the model on one micro-batch; every tensor has the samples as first dimension."""

    def loss(self, outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, Report]:
        """Mean loss () over the samples, and numbers to log; gathers over ranks where it needs to."""


@dataclass(frozen=True)
class TrainSummary:
    """How a run ended.

    Args:
        step: optimizer steps done.
        loss: loss of the last log row; NaN when nothing was left to do.
        metrics: the last evaluation; empty without one.
        best_metric: best value of the metric to maximise, over all evaluations; None without one.
    """

    step: int
    loss: float
    metrics: dict[str, float]
    best_metric: float | None


class TrainLoop:
    """Trains a model; see the module's docstring.

    Args:
        model: the bare model, on the device of this rank; wrapped for several ranks here.
        optimizer: over the model's parameters; its learning rate is set every step.
        objective: batch to loss.
        loader: source of batches; closed when `run` ends, however it ends.
        settings: see `LoopSettings`.
        distributed: place of this process.
        evaluate: called on every rank, with the model in evaluation mode, at epoch ends; returns metrics.
        after_step: called after every change of the weights, for constraints such as a clamped logit scale.

    Raises:
        UserError: the loader has no step to offer, or the precision does not fit the device.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        objective: Objective,
        loader: ClipLoader,
        settings: LoopSettings,
        distributed: Distributed | None = None,
        evaluate: Callable[[], dict[str, float]] | None = None,
        after_step: Callable[[], None] | None = None,
    ) -> None:
        self.model, self.optimizer, self.objective, self.loader = model, optimizer, objective, loader
        self.settings, self.evaluate, self.after_step = settings, evaluate, after_step
        self.distributed = distributed or Distributed()
        if loader.steps_per_epoch < 1:
            raise UserError(
                f"an epoch holds fewer clips than one global batch ({settings.optim.global_batch}); "
                "lower optim.global_batch or use a larger train_manifest"
            )
        device = self.distributed.device
        self.precision = resolve_precision(settings.run.precision, device)
        self.scaler = gradient_scaler(self.precision, device)
        self.parallel = data_parallel(model, self.distributed)
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.learning_rates = learning_rate_schedule(settings.optim, loader.steps_per_epoch)
        self.last_step = min(len(self.learning_rates), settings.run.max_steps or len(self.learning_rates))
        # What decides which samples a step sees.
        self.order = settings.order_facts() | {"steps_per_epoch": loader.steps_per_epoch}
        self.guard = FiniteGuard(settings.output_dir, rank=self.distributed.rank)
        self.timer = StepTimer(device)
        self.step = 0
        self.best_metric: float | None = None
        self.pending_evaluation = False
        self.metrics: dict[str, float] = {}
        self._loss = float("nan")
        self._batches: Iterator[ClipBatch] = iter(())

    def next_batch(self) -> ClipBatch:
        """The next micro-batch; the time blocked here is the data wait."""
        with self.timer.waiting():
            batch = next(self._batches, None)
        if batch is None:
            raise RuntimeError(f"the loader ended within step {self.step} of {self.last_step}")
        return batch

    def micro_step(self, batch: ClipBatch, micro: int) -> tuple[torch.Tensor, Report]:
        """Forward and backward of one micro-batch whose loss needs no other; (loss, report)."""
        with self._context(micro):
            loss, report = self._loss_of(self._forward(batch, micro))
            # Equal micro-batches: the mean of their losses is the loss of one large batch.
            self.scaler.scale(loss / self.loader.accum_steps).backward()
        return loss.detach(), report

    def coupled_step(self, batches: list[ClipBatch]) -> tuple[torch.Tensor, Report]:
        """Forward and backward of micro-batches whose samples share one loss; (loss, report)."""
        return coupled_backward(
            lambda micro: self._forward(batches[micro], micro),
            micro_batches=len(batches),
            loss_of=self._loss_of,
            backward=lambda loss: self.scaler.scale(loss).backward(),
            context=self._context,
        )

    def optimizer_step(self) -> dict[str, torch.Tensor]:
        """All micro-batches of a step and the update; the step's numbers, () each, on the device."""
        set_learning_rate(self.optimizer, float(self.learning_rates[self.step]))
        self.optimizer.zero_grad(set_to_none=True)
        accum_steps = self.loader.accum_steps
        results: list[tuple[torch.Tensor, Report]] = []
        sample_ids: list[np.ndarray] = []
        if accum_steps > 1 and self.objective.couples_samples:
            batches = [self.next_batch() for _ in range(accum_steps)]
            results.append(self.coupled_step(batches))
            sample_ids.extend(batch.sample_ids for batch in batches)
        else:
            for micro in range(accum_steps):
                batch = self.next_batch()
                results.append(self.micro_step(batch, micro))
                sample_ids.append(batch.sample_ids)
        loss, report = mean_over_micro_batches(results)
        grad_norm = self._update(loss, np.concatenate(sample_ids))
        self.step += 1
        self.timer.step_done(sum(map(len, sample_ids)))
        return {"loss": loss, **report, "grad_norm": grad_norm}

    def run(self) -> TrainSummary:
        """Train from the current step to the last one.

        Returns:
            How it ended.

        Raises:
            NonFiniteLossError: the loss or gradient broke; see `FiniteGuard`.
            UserError: a checkpoint could not be written, or the evaluation lacks the metric to maximise.
        """
        with ExitStack() as stack:
            stack.callback(self.loader.close)
            log = stack.enter_context(self._open_log())
            self._batches = self.loader.batches(self.step, self.last_step)
            self.model.train()
            self._evaluate_if_due(log)
            self.timer.restart()
            while self.step < self.last_step:
                numbers = self.optimizer_step()
                log.advance()
                if self.step % self.settings.run.log_every == 0 or self.step == self.last_step:
                    self._log(log, numbers)
                self._save_and_evaluate(log)
        barrier()
        return TrainSummary(self.step, self._loss, self.metrics, self.best_metric)

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint: the next `run` gives what the interrupted one would have given.

        This run's configuration wins where both may differ (weight decay, epochs, world size).

        Args:
            path: the checkpoint.

        Raises:
            UserError: the file cannot be used, or its model, optimizer or order of samples is another one.
        """
        checkpoint = load_checkpoint(path)
        check_order(checkpoint.order, self.order, source=str(path))
        restore_model(self.model, checkpoint.model, source=str(path))
        restore_optimizer(self.optimizer, checkpoint.optimizer, source=str(path))
        if checkpoint.scaler and self.scaler.is_enabled():
            self.scaler.load_state_dict(checkpoint.scaler)
        self.step, self.best_metric = checkpoint.step, checkpoint.best_metric
        self.pending_evaluation = checkpoint.pending_evaluation and self.evaluate is not None

    def _forward(self, batch: ClipBatch, micro: int) -> tuple[torch.Tensor, ...]:
        """The objective's outputs, with random draws that depend on (seed, step, rank, micro) alone."""
        seed = micro_seed(self.settings.run.seed, self.step, rank=self.distributed.rank, micro=micro)
        torch.manual_seed(seed)
        with autocast(self.precision, self.distributed.device):
            return self.objective.outputs(self.parallel, batch)

    def _loss_of(self, outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, Report]:
        with autocast(self.precision, self.distributed.device):
            return self.objective.loss(outputs)

    def _context(self, micro: int) -> AbstractContextManager[None]:
        return averages_gradients(self.parallel, last=micro == self.loader.accum_steps - 1)

    def _update(self, loss: torch.Tensor, sample_ids: np.ndarray) -> torch.Tensor:
        """Unscale, check and clip the gradient and change the weights; () gradient norm before clipping."""
        self.scaler.unscale_(self.optimizer)
        grad_norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        # Under fp16 an overflow is expected now and then: the scaler skips that step and scales less.
        watched_norm = torch.zeros_like(loss) if self.scaler.is_enabled() else grad_norm
        self.guard.watch(self.step, loss=loss, grad_norm=watched_norm, sample_ids=sample_ids)
        if self.settings.optim.clip_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(self.parameters, self.settings.optim.clip_grad_norm, grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.after_step is not None:
            self.after_step()
        return grad_norm

    def _open_log(self) -> RunLog:
        log = RunLog(
            self.settings.output_dir,
            total_steps=self.last_step,
            resume_step=self.step,
            evaluation_pending=self.pending_evaluation,
            enabled=self.distributed.is_main,
            tensorboard=self.settings.tensorboard,
        )
        facts = {
            "device": str(self.distributed.device),
            "precision": self.precision,
            "world_size": self.distributed.world_size,
            "accum_steps": self.loader.accum_steps,
            "steps_per_epoch": self.loader.steps_per_epoch,
        }
        log.header(self.step, {**self.settings.facts(), **facts})
        return log

    def _log(self, log: RunLog, numbers: dict[str, torch.Tensor]) -> None:
        """One row, after everything outstanding was checked; every rank takes part."""
        self.guard.check()
        stats = self.loader.stats
        counts = {name: getattr(stats, name) for name in ("delivered", "replaced", "decoded_on_cpu")}
        row = {
            "epoch": (self.step - 1) // self.loader.steps_per_epoch,
            **row_over_ranks(numbers, self.timer.window(), counts),
            "learning_rate": float(self.learning_rates[self.step - 1]),
            "decoder": self.settings.decoder,
        }
        if self.scaler.is_enabled():
            row["loss_scale"] = self.scaler.get_scale()
        self._loss = row["loss"]
        log.train(self.step, row)

    def _save_and_evaluate(self, log: RunLog) -> None:
        """Checkpoint at epoch ends and every `save_every` steps; evaluate at epoch ends and at the end."""
        epoch, rest = divmod(self.step, self.loader.steps_per_epoch)
        at_end = self.step == self.last_step
        if rest and not at_end:
            save_every = self.settings.run.save_every
            if save_every and self.step % save_every == 0:
                self.save(LATEST_NAME)
            return
        due = at_end or epoch % self.settings.run.eval_every == 0
        self.pending_evaluation = due and self.evaluate is not None
        # Before the evaluation, so that a failure there costs no training.
        self.save(LATEST_NAME)
        self._evaluate_if_due(log)

    def save(self, name: str) -> None:
        """Write a checkpoint of the current step into the output folder, on rank 0.

        Args:
            name: file name.

        Raises:
            NonFiniteLossError: the weights are poisoned; nothing is written.
            UserError: the file could not be written; an older one is intact.
        """
        self.guard.check()
        if not self.distributed.is_main:
            return
        checkpoint = Checkpoint(
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            step=self.step,
            order=self.order,
            best_metric=self.best_metric,
            pending_evaluation=self.pending_evaluation,
            config=self.settings.config,
            world_size=self.distributed.world_size,
        )
        with self.timer.excluded():
            save_checkpoint(self.settings.output_dir / name, checkpoint)

    def _evaluate_if_due(self, log: RunLog) -> None:
        """Evaluate, keep the best weights, and note in the checkpoint that it is done."""
        if self.evaluate is None or not self.pending_evaluation:
            return
        self.guard.check()
        self.model.eval()
        with self.timer.excluded(), torch.no_grad():
            self.metrics = self.evaluate()
        self.model.train()
        log.evaluation(self.step, self.metrics)
        self.pending_evaluation = False
        # The best file first: a kill in between then repeats the evaluation instead of losing the best.
        if self._is_best():
            self.save(BEST_NAME)
        self.save(LATEST_NAME)

    def _is_best(self) -> bool:
        """Whether the last evaluation beats all before; takes note of it."""
        name = self.settings.best_metric
        if not name:
            return False
        if name not in self.metrics:
            raise UserError(f"best metric {name!r} is not evaluated; choose from {', '.join(self.metrics)}")
        # NaN compares false: it is never the best.
        if not self.metrics[name] > (-math.inf if self.best_metric is None else self.best_metric):
            return False
        self.best_metric = self.metrics[name]
        return True
