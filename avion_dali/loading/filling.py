"""Micro-batches on their way: clips are planned, handed to the pool ahead, awaited, replaced when they fail.

All loaders do this alike; they differ in what a clip's task brings back.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from avion_dali.contracts import ClipBatch, ClipError, ClipRequest
from avion_dali.data.order import BatchSchedule
from avion_dali.data.planner import Planner
from avion_dali.data.text import pad_tokens
from avion_dali.loading.faults import MAX_ATTEMPTS, FaultPolicy, LoaderStats
from avion_dali.loading.pool import DecodePool, PoolBrokenError, Ticket, failure_of


@dataclass(frozen=True)
class LoaderSettings:
    """How a loader runs.

    Args:
        device: where batches are delivered.
        context_length: text tokens per row; 0 for none.
        prefetch_batches: micro-batches decoded ahead.
        max_bad_fraction: see `FaultPolicy`.
        quarantine: see `FaultPolicy`.
    """

    device: torch.device
    context_length: int
    prefetch_batches: int = 3
    max_bad_fraction: float = 0.01
    quarantine: Path | None = None


@dataclass(slots=True)
class PendingBatch:
    """A micro-batch whose clips are being worked on.

    Args:
        epoch: the epoch it belongs to.
        slot: which of the loader's places it uses.
        requests: one a row; a substitute's where one was needed.
        planned_ids: the samples of the batch's plan, one a row.
        tickets: what to wait for, one a row.
        results: what the rows' tasks brought back, once settled.
        valid: bool (B,), False for a row that could not be read and is not replaced.
        errors: failures met so far.
        attempts: substitutes tried for each row.
    """

    epoch: int
    slot: int
    requests: list[ClipRequest]
    planned_ids: list[int]
    tickets: list[Ticket]
    results: list[Any]
    valid: np.ndarray
    attempts: list[int]
    errors: list[ClipError] = field(default_factory=list)


class BatchFiller:
    """Fills the micro-batches of one rank.

    Args:
        planner: turns the schedule's rows into requests.
        schedule: which samples form which micro-batch.
        pool: decode processes, possibly shared with other loaders.
        settings: prefetching, fault limits.
        submit: hands the clip of a slot's row to the pool.
    """

    def __init__(
        self,
        planner: Planner,
        schedule: BatchSchedule,
        pool: DecodePool,
        settings: LoaderSettings,
        *,
        submit: Callable[[ClipRequest, int, int], Ticket],
    ) -> None:
        self.schedule, self.settings, self.stats = schedule, settings, LoaderStats()
        self._planner, self._pool, self._submit = planner, pool, submit
        self._faults = FaultPolicy(
            schedule.num_samples,
            max_bad_fraction=settings.max_bad_fraction,
            seed=schedule.seed,
            quarantine=settings.quarantine,
        )
        self._abandoned = False

    def pending(
        self, first_step: int, last_step: int, *, slots: int, free: Callable[[int], None]
    ) -> Iterator[PendingBatch]:
        """Yield the micro-batches of steps [first_step, last_step) in order, `prefetch_batches` begun ahead.

        Args:
            first_step: optimizer step counted over all epochs.
            last_step: one past the last step.
            slots: places that batches take in turn.
            free: returns when a slot may be written again.

        Raises:
            RuntimeError: when an earlier iteration was left before its end.
        """
        if self._abandoned:
            raise RuntimeError("an iteration was left early; make a new loader for another one")
        passes = ((s, m) for s in range(first_step, last_step) for m in range(self.schedule.accum_steps))
        begun: deque[PendingBatch] = deque()
        try:
            for number, (step, micro) in enumerate(passes):
                free(number % slots)
                begun.append(self._begin(step, micro, number % slots))
                if len(begun) > self.settings.prefetch_batches:
                    yield begun.popleft()
            while begun:
                yield begun.popleft()
        finally:
            # The caller stopped early: workers may still be writing, so these slots are not used again.
            self._abandoned = bool(begun)
            for left in begun:
                for ticket in left.tickets:
                    ticket.future.cancel()

    def settle(self, pending: PendingBatch) -> None:
        """Wait for all clips of a batch; failed ones are replaced, or their rows marked invalid.

        Args:
            pending: the batch.

        Raises:
            UserError: when too many clips cannot be read.
        """
        for row in range(len(pending.requests)):
            self.settle_row(pending, row)

    def settle_row(self, pending: PendingBatch, row: int) -> None:
        """Wait for one row's clip, or for the substitute that takes its place.

        Args:
            pending: the batch.
            row: which clip of it.

        Raises:
            UserError: when too many clips cannot be read.
        """
        while pending.valid[row] and (failure := self._await(pending, row)) is not None:
            self.replace(pending, row, failure)

    def replace(self, pending: PendingBatch, row: int, failure: ClipError) -> None:
        """Take another sample in a failed clip's place, to be settled; in evaluation mark the row invalid.

        Args:
            pending: the batch.
            row: which clip of it.
            failure: what happened.

        Raises:
            UserError: when too many clips cannot be read.
        """
        self.stats.failures[failure.kind] += 1
        if not self.schedule.training:
            pending.valid[row] = False
            pending.results[row] = None
            self.stats.invalid += 1
            self._record(pending, failure)
            return
        attempt = pending.attempts[row]
        if attempt == MAX_ATTEMPTS:
            raise self._faults.exhausted(failure)
        substitute = self._faults.substitute(pending.planned_ids[row], pending.epoch, attempt)
        self._record(pending, dataclasses.replace(failure, substitute_id=substitute))
        pending.requests[row] = self._planner.plan(substitute, pending.epoch)
        self._submit_again(pending, row)
        self.stats.replaced += attempt == 0
        pending.attempts[row] += 1

    def batch(self, pending: PendingBatch, frames_BTHWC: torch.Tensor) -> ClipBatch:
        """Put a settled batch together.

        Args:
            pending: the batch.
            frames_BTHWC: uint8 (B*V, T, H, W, C), its pictures on the target device.
        """
        rows = len(pending.requests)
        self.stats.delivered += rows
        return ClipBatch(
            frames_BTHWC=frames_BTHWC,
            tokens_BL=self._tokens(pending.requests),
            labels_B=self._labels(pending.requests),
            sample_ids=np.array([r.sample_id for r in pending.requests], dtype=np.int64),
            view_ids=np.tile(np.arange(self._planner.rules.clip_shape[0]), rows),
            valid=pending.valid,
            epoch=pending.epoch,
            errors=tuple(pending.errors),
            caption_ids=_ids_or_none([r.caption_id for r in pending.requests]),
        )

    def _begin(self, step: int, micro: int, slot: int) -> PendingBatch:
        epoch, sample_ids = self.schedule.micro_batch_ids(step, micro)
        requests = [self._planner.plan(int(i), epoch) for i in sample_ids]
        tickets = [self._submit(request, slot, row) for row, request in enumerate(requests)]
        rows = len(requests)
        valid = np.ones(rows, dtype=bool)
        planned_ids = [request.sample_id for request in requests]
        return PendingBatch(epoch, slot, requests, planned_ids, tickets, [None] * rows, valid, [0] * rows)

    def _submit_again(self, pending: PendingBatch, row: int) -> None:
        pending.tickets[row] = self._submit(pending.requests[row], pending.slot, row)

    def _await(self, pending: PendingBatch, row: int) -> ClipError | None:
        request = pending.requests[row]
        while True:
            try:
                pending.results[row] = self._pool.wait(pending.tickets[row])
                return None
            except PoolBrokenError:
                self._submit_again(pending, row)
            except Exception as error:  # the process boundary; `failure_of` raises what is not a clip's failure
                kind, cause, path, frame_ids = failure_of(error, request)
                return ClipError(request.sample_id, pending.epoch, kind, path, frame_ids, cause)

    def _record(self, pending: PendingBatch, failure: ClipError) -> None:
        pending.errors.append(failure)
        self._faults.record(failure)

    def _tokens(self, requests: list[ClipRequest]) -> torch.Tensor | None:
        if not self.settings.context_length:
            return None
        padded = pad_tokens([r.tokens for r in requests], self.settings.context_length)
        return self._sent(padded)

    def _labels(self, requests: list[ClipRequest]) -> torch.Tensor | None:
        labels = _ids_or_none([r.label for r in requests])
        if labels is None:
            return None
        return self._sent(labels)

    def _sent(self, values: np.ndarray) -> torch.Tensor:
        """The numbers on the device; from pinned memory, so that a GPU's stream is not waited for."""
        values_X = torch.from_numpy(values)
        if self.settings.device.type == "cuda":
            values_X = values_X.pin_memory()
        return values_X.to(self.settings.device, non_blocking=True)


def _ids_or_none(ids: list[int]) -> np.ndarray | None:
    """Return ids as an int64 array; None when no row has one."""
    return np.array(ids, dtype=np.int64) if any(number >= 0 for number in ids) else None
