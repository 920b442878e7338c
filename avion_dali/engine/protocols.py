"""What the training loop requires of the parts that it is given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import nn

from avion_dali.contracts import ClipBatch
from avion_dali.device_ops.step_key import StepKey
from avion_dali.engine.accumulate import Report


class LoaderCounts(Protocol):
    """Counts of a loader since it was made, on this rank."""

    @property
    def delivered(self) -> int:
        """Clips handed out."""

    @property
    def replaced(self) -> int:
        """Delivered clips that replace one that could not be read."""

    @property
    def decoded_on_cpu(self) -> int:
        """Delivered clips that the decoder in use left to `cpu-fused`."""


class BatchSource(Protocol):
    """Delivers this rank's micro-batches in an order that depends on seed, epoch and step alone."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch."""

    @property
    def accum_steps(self) -> int:
        """Micro-batches per optimizer step and rank."""

    @property
    def stats(self) -> LoaderCounts:
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

    def outputs(self, model: nn.Module, batch: ClipBatch, key: StepKey) -> tuple[torch.Tensor, ...]:
        """Run the model on one micro-batch; the first dimension of every tensor is the samples or rows.

        All random draws here are functions of the key and the samples, or come from torch's generators, which
        are seeded before every call: a second call with the same arguments repeats them.
        """

    def loss(self, outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, Report]:
        """Return the mean loss () over the samples and numbers to log; it may gather over ranks."""
