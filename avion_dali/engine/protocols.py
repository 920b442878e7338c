"""The interfaces that the training loop requires of its loader and its objective."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import nn

from avion_dali.contracts import ClipBatch
from avion_dali.device_ops.step_key import StepKey
from avion_dali.engine.accumulate import Report


class LoaderCounts(Protocol):
    """Counts of a loader on this rank since its creation."""

    @property
    def delivered(self) -> int:
        """Number of delivered clips."""

    @property
    def replaced(self) -> int:
        """Number of delivered clips that are substitutes for unreadable ones."""

    @property
    def decoded_on_cpu(self) -> int:
        """Number of delivered clips that the decoder of the run could not decode and `cpu-fused` decoded."""


class BatchSource(Protocol):
    """Delivers this rank's micro-batches in an order that depends only on seed, epoch and step."""

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
        """Yield the micro-batches of steps `first_step` up to but not including `last_step`, in order.

        Later batches do not overwrite a delivered batch.
        """

    def close(self) -> None:
        """Stop the workers; it may be called more than once."""


class Objective(Protocol):
    """Maps micro-batches to a loss."""

    @property
    def couples_samples(self) -> bool:
        """Whether a sample's loss depends on the other samples of the batch, as in contrastive losses."""

    def outputs(self, model: nn.Module, batch: ClipBatch, key: StepKey) -> tuple[torch.Tensor, ...]:
        """Run the model on one micro-batch; the first dimension of each output is that of samples or views.

        Random draws must depend only on the key and the samples, or use torch's generators, which are seeded
        before every call, so that a second call with the same arguments repeats them.
        """

    def loss(self, outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, Report]:
        """Return the mean loss () over the samples, and numbers to log; it may gather over ranks."""
