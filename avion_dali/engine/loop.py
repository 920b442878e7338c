"""The one training loop. What differs between tasks is the objective and the configuration.

A step is: `next_batch` -> `micro_step` (forward and backward, once per micro-batch) -> `optimizer_step`;
`run` repeats it, logs, and lets `RunKeeper` save and evaluate in between. Steps are counted over all epochs
from 0.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from avion_dali.contracts import ClipBatch, UserError
from avion_dali.device_ops.randomness import StepKey
from avion_dali.engine.accumulate import (
    Report,
    averages_gradients,
    coupled_backward,
    mean_over_micro_batches,
    micro_seed,
)
from avion_dali.engine.checkpoint import export_safetensors, load_checkpoint
from avion_dali.engine.distributed import Distributed, barrier, data_parallel
from avion_dali.engine.ema import WeightAverage
from avion_dali.engine.energy import UNREADABLE, EnergyMeter
from avion_dali.engine.keeping import RunKeeper
from avion_dali.engine.optim import describe_rates, learning_rate_schedule, set_learning_rate
from avion_dali.engine.precision import (
    FiniteGuard,
    OverflowCount,
    autocast,
    gradient_scaler,
    resolve_precision,
)
from avion_dali.engine.protocols import ClipLoader, LoaderStats, Objective
from avion_dali.engine.run_log import RunLog, row_over_ranks, sum_over_ranks
from avion_dali.engine.run_report import report_run
from avion_dali.engine.settings import LoopSettings
from avion_dali.engine.sharding import average_whole_gradients, gradient_norm, is_sharded
from avion_dali.engine.signals import RankVotes, StopSignals
from avion_dali.engine.spikes import SpikeWatch
from avion_dali.engine.state import TrainState
from avion_dali.engine.timing import StepTimer

__all__ = ["ClipLoader", "LoaderStats", "LoopSettings", "Objective", "TrainLoop", "TrainSummary"]


@dataclass(frozen=True)
class TrainSummary:
    """How a run ended.

    Args:
        step: optimizer steps done.
        loss: loss of the last log row; NaN when nothing was left to do.
        metrics: the last evaluation; empty without one.
        best_metric: best value of the metric to maximise, over all evaluations; None without one.
        stopped_by: name of the signal that ended the run early, see `signals.exit_status`; empty at its end.
    """

    step: int
    loss: float
    metrics: dict[str, float]
    best_metric: float | None
    stopped_by: str = ""


class TrainLoop:
    """Trains a model; see the module's docstring.

    Args:
        model: the bare model, on the device of this rank, sharded where it shall be (`shard_model`); else
            wrapped for several ranks here.
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
        self.settings, self.after_step = settings, after_step
        self.distributed = distributed or Distributed()
        if loader.steps_per_epoch < 1:
            raise UserError(
                f"an epoch holds fewer clips than one global batch ({settings.optim.global_batch}); "
                "lower optim.global_batch or use a larger train_manifest"
            )
        device, run = self.distributed.device, settings.run
        self.precision = resolve_precision(run.precision, device)
        self.scaler = gradient_scaler(self.precision, device)
        self.overflows = OverflowCount()
        self.parallel = data_parallel(model, self.distributed)
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.learning_rates = learning_rate_schedule(settings.optim, loader.steps_per_epoch)
        self.last_step = min(len(self.learning_rates), run.max_steps or len(self.learning_rates))
        self.state = TrainState(
            model=model,
            optimizer=optimizer,
            scaler=self.scaler,
            # What decides which samples a step sees.
            order=settings.order_facts() | {"steps_per_epoch": loader.steps_per_epoch},
            average=WeightAverage(model, settings.optim.ema_decay) if settings.optim.ema_decay else None,
            spikes=SpikeWatch(run.spike_factor, device) if run.spike_factor else None,
            classes=settings.classes,
        )
        self.guard = FiniteGuard(
            settings.output_dir, rank=self.distributed.rank, stops_at_spikes=run.on_spike == "stop"
        )
        self.timer = StepTimer(device)
        self.energy = EnergyMeter(device, counts_processors=self.distributed.local_rank == 0)
        self.keeper = RunKeeper(
            self.state,
            settings=settings,
            distributed=self.distributed,
            guard=self.guard,
            timer=self.timer,
            evaluate=evaluate,
        )
        self._loss = float("nan")
        self._start = time.monotonic()
        self._batches: Iterator[ClipBatch] = iter(())

    @property
    def step(self) -> int:
        """Optimizer steps done, over all epochs."""
        return self.state.step

    @property
    def order(self) -> dict[str, int | float | str]:
        """What decides which samples a step sees; ranks must agree on it."""
        return self.state.order

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
        self.state.step += 1
        self.timer.step_done(sum(map(len, sample_ids)))
        return {"loss": loss, **report, "grad_norm": grad_norm}

    def run(self) -> TrainSummary:
        """Train from the current step to the last one, or until a signal asks for an end.

        Returns:
            How it ended.

        Raises:
            NonFiniteLossError: the loss or gradient broke; see `FiniteGuard`.
            LossSpikeError: the loss jumped and `run.on_spike` is `stop`.
            UserError: a checkpoint could not be written, or the evaluation lacks the metric to maximise.
        """
        with ExitStack() as stack:
            stack.callback(self.loader.close)
            signals = stack.enter_context(StopSignals())
            log = stack.enter_context(self._open_log())
            votes = RankVotes(2)
            self._batches = self.loader.batches(self.step, self.last_step)
            self.model.train()
            self.keeper.evaluate_if_due(log)
            self.timer.restart()
            stop = 0
            while self.step < self.last_step and not stop:
                numbers = self.optimizer_step()
                log.advance()
                if self.step % self.settings.run.log_every == 0 or self.step == self.last_step:
                    self._log(log, numbers)
                stop, save = votes.exchange([signals.received, int(self.keeper.is_late())])
                self._save_and_evaluate(log, save=bool(save), stop=bool(stop))
            votes.close()
            is_complete = self.step == self.last_step and not self.state.pending_evaluation
            stopped_by = signal.Signals(stop).name if stop and not is_complete else ""
            self._log_end(log, stopped_by)
        if self.distributed.is_main:
            report_run(self.settings.output_dir)
        barrier()
        return TrainSummary(self.step, self._loss, self.keeper.metrics, self.state.best_metric, stopped_by)

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint: the next `run` gives what the interrupted one would have given.

        This run's configuration wins where both may differ (weight decay, epochs, world size, sharding).

        Args:
            path: the checkpoint.

        Raises:
            UserError: the file cannot be used, or its model, optimizer or order of samples is another one.
        """
        self.state.restore(load_checkpoint(path), source=str(path))
        self.state.pending_evaluation &= self.keeper.evaluate is not None

    def export(self, path: Path) -> None:
        """Write the weights, averaged where the run averages them, as safetensors; every rank must call it.

        Args:
            path: the file to write.

        Raises:
            UserError: the file could not be written.
        """
        with ExitStack() as stack:
            if self.state.average is not None:
                stack.enter_context(self.state.average.applied())
            header = {"config": self.settings.config, "classes": self.settings.classes}
            export_safetensors(self.model, path, header)

    def _forward(self, batch: ClipBatch, micro: int) -> tuple[torch.Tensor, ...]:
        """The objective's outputs, with random draws that depend on (seed, step, rank, micro) alone."""
        seed = self.settings.run.seed
        torch.manual_seed(micro_seed(seed, self.step, rank=self.distributed.rank, micro=micro))
        with autocast(self.precision, self.distributed.device):
            return self.objective.outputs(self.parallel, batch, StepKey(seed, self.step))

    def _loss_of(self, outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, Report]:
        with autocast(self.precision, self.distributed.device):
            return self.objective.loss(outputs)

    def _context(self, micro: int) -> AbstractContextManager[None]:
        return averages_gradients(self.parallel, last=micro == self.loader.accum_steps - 1)

    def _update(self, loss: torch.Tensor, sample_ids: np.ndarray) -> torch.Tensor:
        """Unscale, check and clip the gradient and change the weights; () gradient norm before clipping."""
        self.scaler.unscale_(self.optimizer)
        if is_sharded(self.model):
            average_whole_gradients(self.parameters)
        grad_norm = gradient_norm(self.parameters)
        # Under fp16 an overflow is expected now and then: the scaler skips that step and scales less.
        watched = self.overflows.watched_norm(grad_norm) if self.scaler.is_enabled() else grad_norm
        excess = self.state.spikes.excess(loss) if self.state.spikes else None
        self.guard.watch(self.step, loss=loss, grad_norm=watched, sample_ids=sample_ids, excess=excess)
        # Only this choice must be known on the host at once: it waits for the device in every step.
        if excess is None or self.settings.run.on_spike != "skip" or not excess > 1:
            self._change_weights(grad_norm)
        self.scaler.update()
        return grad_norm

    def _change_weights(self, grad_norm: torch.Tensor) -> None:
        if self.settings.optim.clip_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(self.parameters, self.settings.optim.clip_grad_norm, grad_norm)
        self.scaler.step(self.optimizer)
        if self.after_step is not None:
            self.after_step()
        if self.state.average is not None:
            self.state.average.update()

    def _open_log(self) -> RunLog:
        log = RunLog(
            self.settings.output_dir,
            total_steps=self.last_step,
            resume_step=self.step,
            evaluation_pending=self.state.pending_evaluation,
            enabled=self.distributed.is_main,
            tensorboard=self.settings.tensorboard,
        )
        world, optim = self.distributed.world_size, self.settings.optim
        facts = {
            "device": str(self.distributed.device),
            "precision": self.precision,
            "world_size": world,
            "sharding": "shard" if is_sharded(self.model) else "replicate",
            "accum_steps": self.loader.accum_steps,
            "steps_per_epoch": self.loader.steps_per_epoch,
            "batch": f"{optim.global_batch} clips a step = {world} ranks x {optim.micro_batch} clips x "
            f"{self.loader.accum_steps} micro-batches",
            "rates": describe_rates(optim),
            "energy_source": self.energy.source,
        }
        log.header(self.step, {**self.settings.facts(), **facts})
        return log

    def _log(self, log: RunLog, numbers: dict[str, torch.Tensor]) -> None:
        """One row, after everything outstanding was checked; every rank takes part."""
        self.guard.check()
        stats = self.loader.stats
        counts = {name: getattr(stats, name) for name in ("delivered", "replaced", "decoded_on_cpu")}
        counts["energy_j"] = round(self.energy.joules())
        row = {
            "epoch": (self.step - 1) // self.loader.steps_per_epoch,
            **row_over_ranks(numbers, self.timer.window(), counts),
            "elapsed_s": time.monotonic() - self._start,
            "learning_rate": float(self.learning_rates[self.step - 1]),
            "decoder": self.settings.decoder,
        }
        if self.energy.source == UNREADABLE:
            del row["energy_j"]
        if self.scaler.is_enabled():
            row["loss_scale"] = self.scaler.get_scale()
        self._loss = row["loss"]
        log.train(self.step, row)
        log.spikes(self.guard.spikes, skipped=self.settings.run.on_spike == "skip")
        self.guard.spikes.clear()

    def _log_end(self, log: RunLog, stopped_by: str) -> None:
        used = sum_over_ranks(round(self.energy.joules()), self.distributed.device)
        log.end(
            self.step,
            {"elapsed_s": time.monotonic() - self._start, "energy_j": used, "stopped_by": stopped_by},
        )

    def _save_and_evaluate(self, log: RunLog, *, save: bool, stop: bool) -> None:
        """Save and evaluate at epoch ends and at the end; save in between when it is time or the run stops."""
        run = self.settings.run
        epoch, rest = divmod(self.step, self.loader.steps_per_epoch)
        at_end = self.step == self.last_step
        if at_end or not rest:
            self.keeper.at_epoch_end(log, evaluates=at_end or epoch % run.eval_every == 0, stops=stop)
            return
        # Among several ranks a vote on saving arrives a step late, and once more before the save is known.
        late = save and self.step - self.keeper.saved_step > 1
        if late or stop or (run.save_every and self.step % run.save_every == 0):
            self.keeper.save_latest()
