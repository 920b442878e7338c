"""The training loop of all tasks, which differ in objective and configuration.

`run` repeats three methods until the last step: `next_batch` takes a micro-batch from the loader, `micro_step`
runs its forward and backward pass, `optimizer_step` updates the weights. `train_step` and `steps` combine them
for other callers. The `Checkpointer` saves and evaluates between steps, which are counted from 0.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn

from avion_dali.contracts import ClipBatch, UserError
from avion_dali.device_ops.step_key import StepKey
from avion_dali.engine.accumulate import (
    Report,
    averages_gradients,
    coupled_backward,
    mean_over_micro_batches,
    micro_seed,
)
from avion_dali.engine.checkpoint import export_safetensors, load_checkpoint
from avion_dali.engine.checkpointer import Checkpointer
from avion_dali.engine.distributed import Distributed, barrier, data_parallel
from avion_dali.engine.ema import WeightAverage
from avion_dali.engine.energy import NOT_READABLE, EnergyMeter
from avion_dali.engine.loop_settings import LoopSettings
from avion_dali.engine.loss_guard import FiniteGuard, SpikeWatch
from avion_dali.engine.optimizers import describe_rates, learning_rate_schedule, set_learning_rate
from avion_dali.engine.precision import OverflowCount, autocast, gradient_scaler, resolve_precision
from avion_dali.engine.protocols import BatchSource, Objective
from avion_dali.engine.run_log import RunLog, sum_over_ranks
from avion_dali.engine.sharding import average_whole_gradients, clip_gradients, gradient_norm, is_sharded
from avion_dali.engine.signals import RankVotes, StopSignals
from avion_dali.engine.timing import StepTimer
from avion_dali.engine.train_row import TrainRow
from avion_dali.engine.train_state import TrainState, TrainSummary


class TrainLoop:
    """Trains a model; see the module's docstring.

    Args:
        model: the bare model, on the device of this rank. It is wrapped for data parallelism here, unless
            `shard_model` has sharded it before.
        optimizer: optimizer of the model's parameters; its learning rate is set in every step.
        objective: maps batches to the loss.
        loader: source of batches; closed when `run` ends for any reason.
        settings: see `LoopSettings`.
        distributed: this process among all processes of the run.
        evaluate: called on every rank at the ends of epochs, with the model in evaluation mode; returns
            metrics.
        after_step: called after every change of the weights, for constraints such as a clamped logit scale.

    Raises:
        UserError: an epoch of the loader has no step, or the device does not support the precision.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        objective: Objective,
        loader: BatchSource,
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
                f"an epoch has fewer clips than one global batch ({settings.optim.global_batch}); "
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
            # The facts that determine the samples of each step.
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
        self.checkpointer = Checkpointer(
            self.state,
            settings=settings,
            distributed=self.distributed,
            guard=self.guard,
            timer=self.timer,
            evaluate=evaluate,
            last_step=self.last_step,
        )
        self._start = time.monotonic()
        self._batches: Iterator[ClipBatch] = iter(())

    @property
    def step(self) -> int:
        """Optimizer steps done, over all epochs."""
        return self.state.step

    @property
    def order(self) -> dict[str, int | float | str]:
        """Facts that determine the samples of each step; they must be equal on all ranks."""
        return self.state.order

    def next_batch(self) -> ClipBatch:
        """Take the next micro-batch of `steps` from the loader; the time blocked here is the data wait.

        Raises:
            RuntimeError: the loader delivered fewer batches than `steps` requested.
        """
        with self.timer.waiting():
            batch = next(self._batches, None)
        if batch is None:
            raise RuntimeError(f"the loader ended within step {self.step} of {self.last_step}")
        return batch

    def micro_step(self, batch: ClipBatch, micro: int) -> tuple[torch.Tensor, Report]:
        """Run the forward and backward pass of one micro-batch whose loss does not depend on the others.

        Args:
            batch: the micro-batch.
            micro: index of the micro-batch within the step, counted from 0.

        Returns:
            The loss, a detached () tensor, and the numbers that the objective reports.
        """
        with averages_gradients(self.parallel, last=micro == self.loader.accum_steps - 1):
            with self._computing(micro):
                outputs = self.objective.outputs(self.parallel, batch, self._key)
                loss, report = self.objective.loss(outputs)
            # Micro-batches have equal sizes, so the mean of their losses is the loss of one large batch.
            self.scaler.scale(loss / self.loader.accum_steps).backward()
        return loss.detach(), report

    def optimizer_step(self, loss: torch.Tensor, sample_ids: np.ndarray) -> torch.Tensor:
        """Check and clip the gradients of the step, and update the weights.

        Args:
            loss: loss of the step, a () tensor.
            sample_ids: int64 (N,), manifest rows of the step on this rank, for messages.

        Returns:
            The gradient norm before clipping, a () tensor on the device.

        Raises:
            NonFiniteLossError: see `FiniteGuard`.
            LossSpikeError: the loss jumped and `run.on_spike` is `stop`.
        """
        set_learning_rate(self.optimizer, float(self.learning_rates[self.step]))
        self.scaler.unscale_(self.optimizer)
        if is_sharded(self.model):
            average_whole_gradients(self.parameters)
        grad_norm = gradient_norm(self.parameters)
        # In fp16 occasional overflows are expected: the scaler skips that step and lowers its scale.
        watched = self.overflows.watched_norm(grad_norm) if self.scaler.is_enabled() else grad_norm
        excess = self.state.spikes.excess(loss) if self.state.spikes else None
        self.guard.watch(self.step, loss=loss, grad_norm=watched, sample_ids=sample_ids, excess=excess)
        # Only `skip` needs the number on the host at once, which makes every step wait for the device.
        if excess is None or self.settings.run.on_spike != "skip" or not excess > 1:
            self._change_weights(grad_norm)
        self.scaler.update()
        self.state.step += 1
        return grad_norm

    def train_step(self, batches: Iterable[ClipBatch]) -> dict[str, torch.Tensor]:
        """Train one step: the forward and backward passes of its micro-batches, and the update.

        Args:
            batches: the `loader.accum_steps` micro-batches of the step. Each is taken when it is needed, so a
                generator holds only one at a time, unless the objective couples their samples.

        Returns:
            The loss, the report of the objective, and the gradient norm before clipping; () tensors on the
            device.

        Raises:
            ValueError: there are fewer or more than `loader.accum_steps` batches.
            NonFiniteLossError: see `FiniteGuard`.
            LossSpikeError: the loss jumped and `run.on_spike` is `stop`.
        """
        self.optimizer.zero_grad(set_to_none=True)
        accum_steps = self.loader.accum_steps
        results: list[tuple[torch.Tensor, Report]] = []
        sample_ids: list[np.ndarray] = []
        remaining = iter(batches)
        if accum_steps > 1 and self.objective.couples_samples:
            held = list(islice(remaining, accum_steps))
            sample_ids += [batch.sample_ids for batch in held]
            if len(held) == accum_steps:
                results.append(self._coupled_step(held))
        else:
            for micro, batch in enumerate(islice(remaining, accum_steps)):
                results.append(self.micro_step(batch, micro))
                sample_ids.append(batch.sample_ids)
        if (given := len(sample_ids) + (next(remaining, None) is not None)) != accum_steps:
            raise ValueError(f"a step has {accum_steps} micro-batches, not {given}")
        loss, report = mean_over_micro_batches(results)
        grad_norm = self.optimizer_step(loss, np.concatenate(sample_ids))
        self.timer.step_done(sum(map(len, sample_ids)))
        return {"loss": loss, **report, "grad_norm": grad_norm}

    def steps(self, first: int, last: int) -> Iterator[dict[str, torch.Tensor]]:
        """Train steps [first, last) with batches from the loader, without logging, saving or evaluating.

        Args:
            first: the first step; must equal `step`, the number of steps done.
            last: one past the last step.

        Yields:
            The numbers of each step, see `train_step`.

        Raises:
            ValueError: `first` is not the current step, on which learning rates and random draws depend.
            RuntimeError: the loader ended early.
        """
        if first != self.step:
            raise ValueError(f"the loop is at step {self.step} and cannot begin with step {first}")
        self._batches = self.loader.batches(first, last)
        self.model.train()
        self.timer.restart()
        for _ in range(first, last):
            yield self.train_step(self.next_batch() for _ in range(self.loader.accum_steps))

    def run(self) -> TrainSummary:
        """Train from the current step to the last one, or until a signal requests a stop.

        Returns:
            A summary of how the run ended.

        Raises:
            NonFiniteLossError: the loss or gradient is not finite; see `FiniteGuard`.
            LossSpikeError: the loss jumped and `run.on_spike` is `stop`.
            UserError: a checkpoint could not be written, or the evaluation does not report the best metric.
        """
        with ExitStack() as stack:
            stack.callback(self.loader.close)
            signals = stack.enter_context(StopSignals())
            log = stack.enter_context(self._open_log())
            votes = RankVotes(2)
            self.checkpointer.evaluate_if_due(log)
            stop = 0
            for numbers in self.steps(self.step, self.last_step):
                log.advance()
                if self.step % self.settings.run.log_every == 0 or self.step == self.last_step:
                    self._log(log, numbers)
                self._log_spikes(log)
                stop, save = votes.exchange([signals.received, int(self.checkpointer.is_late())])
                self.checkpointer.after_step(log, saves=bool(save), stops=bool(stop))
                if stop:
                    break
            votes.close()
            is_complete = self.step == self.last_step and not self.state.pending_evaluation
            stopped_by = signal.Signals(stop).name if stop and not is_complete else ""
            self._log_end(log, stopped_by)
        barrier()
        return TrainSummary(self.step, log.loss, self.checkpointer.metrics, self.state.best_metric, stopped_by)

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint, so that the next `run` gives the results of an uninterrupted run.

        Settings that may differ (weight decay, epochs, world size, sharding) are those of this run.

        Args:
            path: the checkpoint.

        Raises:
            UserError: the file cannot be used, or it has another model, optimizer or order of samples.
        """
        self.state.restore(load_checkpoint(path), source=str(path))
        self.state.pending_evaluation &= self.checkpointer.evaluate is not None

    def export(self, path: Path) -> None:
        """Write the weights (their average if the run has one) as safetensors; every rank must call it.

        Args:
            path: the file to write.

        Raises:
            UserError: the file could not be written.
        """
        average = self.state.average
        with average.applied() if average else nullcontext():
            header = {"config": self.settings.config, "classes": self.settings.classes}
            export_safetensors(self.model, path, header=header)

    @property
    def _key(self) -> StepKey:
        return StepKey(self.settings.run.seed, self.step)

    def _computing(self, micro: int) -> AbstractContextManager[None]:
        """The context of a forward pass: draws that depend on (seed, step, rank, micro) alone, and autocast."""
        torch.manual_seed(micro_seed(*self._key, rank=self.distributed.rank, micro=micro))
        return autocast(self.precision, self.distributed.device)

    def _coupled_step(self, batches: list[ClipBatch]) -> tuple[torch.Tensor, Report]:
        """`micro_step` for micro-batches whose samples share one loss."""

        def forward(micro: int) -> tuple[torch.Tensor, ...]:
            with self._computing(micro):
                return self.objective.outputs(self.parallel, batches[micro], self._key)

        def loss_of(outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, Report]:
            with autocast(self.precision, self.distributed.device):
                return self.objective.loss(outputs)

        return coupled_backward(
            forward,
            micro_batches=len(batches),
            loss_of=loss_of,
            backward=lambda loss: self.scaler.scale(loss).backward(),
            context=lambda micro: averages_gradients(self.parallel, last=micro == len(batches) - 1),
        )

    def _change_weights(self, grad_norm: torch.Tensor) -> None:
        if self.settings.optim.clip_grad_norm > 0:
            clip_gradients(self.parameters, self.settings.optim.clip_grad_norm, norm=grad_norm)
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
            "batch": f"{optim.global_batch} clips per step = {world} ranks x {optim.micro_batch} clips x "
            f"{self.loader.accum_steps} micro-batches",
            "rates": describe_rates(optim),
            "energy_source": self.energy.source,
        }
        log.header(self.step, {**self.settings.facts(), **facts})
        return log

    def _log(self, log: RunLog, numbers: dict[str, torch.Tensor]) -> None:
        """Queue one row; every rank must call it."""
        counts = {n: getattr(self.loader.stats, n) for n in ("delivered", "replaced", "decoded_on_cpu")}
        counts["energy_j"] = round(self.energy.joules())
        if self.scaler.is_enabled():
            # The scale itself can only be read by waiting for the device.
            numbers = {**numbers, "loss_scale": self.scaler.scale(torch.ones_like(numbers["loss"]))}
        facts = {
            "epoch": (self.step - 1) // self.loader.steps_per_epoch,
            "elapsed_s": time.monotonic() - self._start,
            "learning_rate": float(self.learning_rates[self.step - 1]),
            "decoder": self.settings.decoder,
            **({"energy_j": None} if self.energy.source == NOT_READABLE else {}),
        }
        log.queue(self.step, TrainRow(numbers, self.timer.window(), counts=counts, facts=facts))

    def _log_spikes(self, log: RunLog) -> None:
        log.spikes(self.guard.take_spikes(), skipped=self.settings.run.on_spike == "skip")

    def _log_end(self, log: RunLog, stopped_by: str) -> None:
        self._log_spikes(log)  # those of the last steps, which were checked when they were saved
        used = sum_over_ranks(round(self.energy.joules()), self.distributed.device)
        ended = {"elapsed_s": time.monotonic() - self._start, "energy_j": used, "stopped_by": stopped_by}
        log.end(self.step, ended)
