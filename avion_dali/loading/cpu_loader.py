"""CpuLoader: plans clips, has the pool decode them ahead, and yields `ClipBatch`es in order."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from avion_dali.contracts import ClipBatch, ClipError, ClipRequest
from avion_dali.data.order import BatchSchedule
from avion_dali.data.planner import Planner
from avion_dali.data.text import pad_tokens
from avion_dali.loading.faults import MAX_ATTEMPTS, FaultPolicy, LoaderStats
from avion_dali.loading.pool import DecodePool, PoolBrokenError, Ticket, failure_of
from avion_dali.loading.ring import SharedRing
from avion_dali.loading.transfer import DeviceCopier


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
class _Pending:
    """A micro-batch being decoded into one slot of the ring."""

    epoch: int
    slot: int
    requests: list[ClipRequest]
    tickets: list[Ticket]
    valid: np.ndarray
    errors: list[ClipError] = field(default_factory=list)


class CpuLoader:
    """Micro-batches of one rank, decoded on CPU cores.

    Args:
        planner: turns sample ids into requests.
        schedule: which samples form which micro-batch.
        pool: decode processes, possibly shared with other loaders.
        settings: device, prefetching, fault limits.
    """

    def __init__(
        self, planner: Planner, schedule: BatchSchedule, pool: DecodePool, settings: LoaderSettings
    ) -> None:
        self.schedule, self.settings = schedule, settings
        self.stats = LoaderStats()
        self._planner, self._pool, self._abandoned = planner, pool, False
        self._faults = FaultPolicy(
            schedule.num_samples,
            max_bad_fraction=settings.max_bad_fraction,
            seed=schedule.seed,
            quarantine=settings.quarantine,
        )
        # One slot is being copied while the others are being filled.
        self._ring = SharedRing(
            settings.prefetch_batches + 1, (schedule.micro_batch, *planner.rules.clip_shape)
        )
        self._copier = DeviceCopier(self._ring, settings.device)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
        return self.schedule.steps_per_epoch

    @property
    def accum_steps(self) -> int:
        """Micro-batches per optimizer step."""
        return self.schedule.accum_steps

    def batches(self, first_step: int, last_step: int) -> Iterator[ClipBatch]:
        """Yield the micro-batches of steps [first_step, last_step), `accum_steps` for each.

        Args:
            first_step: optimizer step counted over all epochs; where a resumed run goes on.
            last_step: one past the last step.

        Raises:
            UserError: when too many clips cannot be read.
        """
        passes = ((s, m) for s in range(first_step, last_step) for m in range(self.accum_steps))
        if self._abandoned:
            raise RuntimeError("an iteration was left early; make a new loader for another one")
        pending: deque[_Pending] = deque()
        slot = 0
        try:
            for step, micro in passes:
                pending.append(self._start(step, micro, slot))
                slot = (slot + 1) % self._ring.slots
                if len(pending) > self.settings.prefetch_batches:
                    yield self._finish(pending.popleft())
            while pending:
                yield self._finish(pending.popleft())
        finally:
            # The caller stopped early: workers may still be writing, so these slots are not used again.
            self._abandoned = bool(pending)
            for left in pending:
                for ticket in left.tickets:
                    ticket.future.cancel()

    def close(self) -> None:
        """Release the shared memory; the pool belongs to the caller."""
        self._copier.close()
        self._ring.close()

    def _start(self, step: int, micro: int, slot: int) -> _Pending:
        epoch, sample_ids = self.schedule.micro_batch_ids(step, micro)
        self._copier.wait_until_free(slot)
        requests = [self._planner.plan(int(i), epoch) for i in sample_ids]
        tickets = [
            self._pool.submit(r, self._ring, self._ring.offset(slot, row)) for row, r in enumerate(requests)
        ]
        return _Pending(epoch, slot, requests, tickets, np.ones(len(requests), dtype=bool))

    def _finish(self, pending: _Pending) -> ClipBatch:
        for row in range(len(pending.requests)):
            self._settle(pending, row)
        rows = len(pending.requests)
        frames = self._copier.copy(pending.slot, rows)
        self.stats.delivered += rows
        return ClipBatch(
            frames_BTHWC=frames,
            tokens_BL=self._tokens(pending.requests),
            labels_B=None,
            sample_ids=np.array([r.sample_id for r in pending.requests], dtype=np.int64),
            view_ids=np.tile(np.arange(self._planner.rules.clip_shape[0]), rows),
            valid=pending.valid,
            epoch=pending.epoch,
            errors=tuple(pending.errors),
        )

    def _settle(self, pending: _Pending, row: int) -> None:
        """Wait for one clip; on failure put a substitute in its place, or mark the row invalid."""
        planned, attempts = pending.requests[row], 0
        while (failure := self._await(pending, row)) is not None:
            self.stats.failures[failure.kind] += 1
            if not self.schedule.training:
                self._invalidate(pending, row, failure)
                return
            if attempts == MAX_ATTEMPTS:
                raise self._faults.exhausted(failure)
            substitute = self._faults.substitute(planned.sample_id, pending.epoch, attempts)
            self._record(pending, dataclasses.replace(failure, substitute_id=substitute))
            request = self._planner.plan(substitute, pending.epoch)
            self._submit_again(pending, row, request)
            attempts += 1
        self.stats.replaced += attempts > 0

    def _submit_again(self, pending: _Pending, row: int, request: ClipRequest) -> None:
        pending.requests[row] = request
        pending.tickets[row] = self._pool.submit(request, self._ring, self._ring.offset(pending.slot, row))

    def _await(self, pending: _Pending, row: int) -> ClipError | None:
        request = pending.requests[row]
        while True:
            try:
                self.stats.decode_s += self._pool.wait(pending.tickets[row])
                return None
            except PoolBrokenError:
                self._submit_again(pending, row, request)
            except Exception as error:  # the process boundary; `failure_of` raises what is not a clip's failure
                kind, cause, path, frame_ids = failure_of(error, request)
                return ClipError(request.sample_id, pending.epoch, kind, path, frame_ids, cause)

    def _invalidate(self, pending: _Pending, row: int, failure: ClipError) -> None:
        pending.valid[row] = False
        self._ring.frames(pending.slot)[row] = 0
        self.stats.invalid += 1
        self._record(pending, failure)

    def _record(self, pending: _Pending, failure: ClipError) -> None:
        pending.errors.append(failure)
        self._faults.record(failure)

    def _tokens(self, requests: list[ClipRequest]) -> torch.Tensor | None:
        if not self.settings.context_length:
            return None
        padded = pad_tokens([r.tokens for r in requests], self.settings.context_length)
        return torch.from_numpy(padded).to(self.settings.device, non_blocking=True)
