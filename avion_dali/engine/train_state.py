"""The state that a training changes, saved in checkpoints and restored from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from avion_dali.engine.checkpoint import Checkpoint, check_order, restore_model, restore_optimizer
from avion_dali.engine.ema import WeightAverage
from avion_dali.engine.loss_guard import SpikeWatch
from avion_dali.engine.sharding import gathered


@dataclass(frozen=True)
class TrainSummary:
    """How a call of `TrainLoop.run` ended.

    Args:
        step: optimizer steps done.
        loss: loss of the last log row; NaN if no step was left.
        metrics: metrics of the last evaluation; empty if there was none.
        best_metric: best value of the best metric over all evaluations; None if there was none.
        stopped_by: name of the signal that stopped the run early, see `signals.exit_status`; else empty.
    """

    step: int
    loss: float
    metrics: dict[str, float]
    best_metric: float | None
    stopped_by: str = ""


@dataclass
class TrainState:
    """The state that a run needs to continue as if it had never stopped.

    Args:
        model: the bare model, sharded or not.
        optimizer: optimizer of its parameters.
        scaler: scaler of fp16 gradients.
        order: facts that determine the samples of each step.
        average: running average of the weights; None if the run has none.
        spikes: watches the loss for spikes; None if the run does not.
        step: optimizer steps done.
        best_metric: best evaluation so far.
        pending_evaluation: whether the evaluation due at this step has not been done yet.
        classes: names of the head's classes in label order; empty if the model has none.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    order: dict[str, Any] = field(default_factory=dict)
    average: WeightAverage | None = None
    spikes: SpikeWatch | None = None
    step: int = 0
    best_metric: float | None = None
    pending_evaluation: bool = False
    classes: tuple[str, ...] = ()

    def capture(self, *, config: dict[str, Any], world_size: int, keep: bool) -> Checkpoint:
        """Gather a checkpoint; every rank must call it if the model is sharded.

        Args:
            config: the run's configuration.
            world_size: number of processes of the run.
            keep: whether to keep whole tensors; False on ranks that only take part in the collectives and whose
                result is not used.
        """
        return Checkpoint(
            model=gathered(self.model.state_dict(), keep=keep),
            optimizer=gathered(self.optimizer.state_dict(), keep=keep),
            scaler=self.scaler.state_dict(),
            step=self.step,
            order=self.order,
            best_metric=self.best_metric,
            pending_evaluation=self.pending_evaluation,
            config=config,
            world_size=world_size,
            average=self.average.state_dict(keep=keep) if self.average else {},
            spikes=self.spikes.state_dict() if self.spikes else {},
            classes=self.classes,
        )

    def restore(self, checkpoint: Checkpoint, *, source: str) -> None:
        """Continue from a checkpoint of any number of ranks, sharded or not.

        Args:
            checkpoint: the state.
            source: file of the checkpoint, for messages.

        Raises:
            UserError: the checkpoint has another model, optimizer or order of samples.
        """
        check_order(checkpoint.order, self.order, source=source)
        restore_model(self.model, checkpoint.model, source=source)
        restore_optimizer(self.optimizer, checkpoint.optimizer, source=source)
        if checkpoint.scaler and self.scaler.is_enabled():
            self.scaler.load_state_dict(checkpoint.scaler)
        if self.average is not None:
            # If the interrupted run had no average, a new one starts from the weights of the checkpoint.
            own = {name: checkpoint.model[name] for name, _ in self.model.named_parameters()}
            self.average.load_state_dict(checkpoint.average or own)
        if self.spikes is not None:
            self.spikes.load_state_dict(checkpoint.spikes)
        self.step, self.best_metric = checkpoint.step, checkpoint.best_metric
        self.pending_evaluation = checkpoint.pending_evaluation
