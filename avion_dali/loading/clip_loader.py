"""The clip loader lets the pool plan and decode clips ahead, and yields `ClipBatch`es in order."""

from __future__ import annotations

import dataclasses
import pickle
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent import futures
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic

import numpy as np
import torch

from avion_dali.config.checks import require_integer
from avion_dali.contracts import ClipBatch, ClipError
from avion_dali.data.order import BatchSchedule
from avion_dali.data.planner import Planner
from avion_dali.data.tokens import cut_to_longest
from avion_dali.loading.clip_group import ClipGroup, RowFacts, clips_per_group, work_on
from avion_dali.loading.faults import MAX_ATTEMPTS, FaultPolicy, LoaderStats, failure_of
from avion_dali.loading.loader_state import State, position_of, state_at
from avion_dali.loading.pool import WorkerPool
from avion_dali.loading.ring import SharedRing
from avion_dali.loading.strategy import GroupTask, LoaderStrategy, PendingBatch, RefusedRowsError, Result


@dataclass(frozen=True)
class LoaderSettings:
    """Settings of a loader.

    Args:
        device: device to which batches are delivered.
        context_length: text tokens per row; 0 for none.
        cut_texts: whether rows end with the longest text of their batch, see `cut_to_longest`.
        prefetch_batches: number of micro-batches that workers decode ahead.
        max_bad_fraction: see `FaultPolicy`.
        quarantine: see `FaultPolicy`.
    """

    device: torch.device
    context_length: int
    prefetch_batches: int = 3
    max_bad_fraction: float = 0.01
    quarantine: Path | None = None
    cut_texts: bool = False


class ClipLoader(Generic[Result]):
    """Delivers the micro-batches of one rank.

    `for batch in loader` delivers one epoch, and the next such loop delivers the next epoch. A loop may be left
    at any batch: the next loop then starts with the first batch of the same epoch, or of the next epoch if all
    batches were delivered. A new iteration ends all earlier iterations of the same loader. `batches` delivers
    the batches of optimizer steps instead, without a pause between epochs.

    A delivered batch belongs to the receiver; later batches do not overwrite it.

    Args:
        planner: makes clip requests; each worker opens a copy of it.
        schedule: assigns clips to micro-batches.
        pool: worker processes, which other loaders may share.
        strategy: how the loader obtains frames.
        settings: device, prefetching and fault limits.
        owns_pool: whether `close` also ends the processes; otherwise the caller must end them.

    Raises:
        UserError: when the machine's shared memory is too small.
    """

    def __init__(
        self,
        planner: Planner,
        schedule: BatchSchedule,
        *,
        pool: WorkerPool,
        strategy: LoaderStrategy[Result],
        settings: LoaderSettings,
        owns_pool: bool = False,
    ) -> None:
        self._owns_pool = owns_pool
        self.schedule, self.settings, self.stats = schedule, settings, LoaderStats()
        self._planner, self._pool, self._strategy = planner, pool, strategy
        self._faults = FaultPolicy(
            schedule.num_samples,
            max_bad_fraction=settings.max_bad_fraction,
            seed=schedule.seed,
            quarantine=settings.quarantine,
        )
        # A batch keeps its slot until it is delivered; one more slot is read while the others are written.
        slots = settings.prefetch_batches + strategy.depth + 1
        self._ring = SharedRing(slots, (schedule.micro_batch, *planner.rules.clip_shape))
        self._in_slots: list[PendingBatch[Result] | None] = [None] * slots
        strategy.open(self._ring, settings.device, self.stats)
        # A worker opens the manifest itself, and plans the clips of a group.
        self._group = partial(ClipGroup, pickle.dumps(planner), context_length=settings.context_length)
        clips_ahead = settings.prefetch_batches * schedule.micro_batch
        self._clips_per_group = clips_per_group(clips_ahead, pool.workers)
        self._begun = 0  # number of batches begun in all iterations; they use the slots in turn
        self._iteration = 0  # number of the latest iteration; 0 before the first one
        self._is_closed = False
        # Micro-batches counted over all epochs: the first of the next iteration, and the next to be delivered.
        self._start = self._next = 0

    def __enter__(self) -> ClipLoader[Result]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Return the number of micro-batches per epoch, which is the same on every rank."""
        return self.steps_per_epoch * self.accum_steps

    def __iter__(self) -> Iterator[ClipBatch]:
        """Yield the micro-batches of one epoch.

        At the end of an evaluation on several ranks, a rank's last batch may be short or empty.

        Raises:
            RuntimeError: when the loader is closed, or another iteration has started since.
            UserError: when too many samples cannot be read, or worker processes cannot run, or in a fork of the
                process that opened the loader.
        """
        first = self._next = self._start
        self._start = first // len(self) * len(self)
        return self._begin_iteration(first, self._start + len(self))

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
        return self.schedule.steps_per_epoch

    @property
    def accum_steps(self) -> int:
        """Micro-batches per optimizer step."""
        return self.schedule.accum_steps

    def batches(self, first_step: int, last_step: int) -> Iterator[ClipBatch]:
        """Yield the micro-batches of steps [first_step, last_step), `accum_steps` per step.

        Args:
            first_step: optimizer step counted over all epochs, at which a resumed run continues.
            last_step: one past the last step.

        Raises:
            RuntimeError: when the loader is closed, or another iteration has started since.
            UserError: when too many samples cannot be read, or worker processes cannot run, or in a fork of the
                process that opened the loader.
        """
        first = self._next = first_step * self.accum_steps
        self._start = first // len(self) * len(self)
        return self._begin_iteration(first, last_step * self.accum_steps)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; by default, epochs follow one another.

        If a loaded state is of the same epoch, its position within the epoch is kept.

        Args:
            epoch: epoch number, >= 0.

        Raises:
            UserError: when it is no such number.
        """
        require_integer(epoch, "`epoch`", least=0)
        if self._start // len(self) != epoch:
            self._start = self._next = int(epoch) * len(self)

    def state_dict(self) -> State:
        """Return the position after the delivered batches; batches that are decoded ahead do not count.

        Returns:
            Plain numbers, the same on every rank, for `load_state_dict` of a loader that may have another
            decoder and other numbers of workers, ranks and clips per batch. After the last batch of an epoch,
            the position is the beginning of the next epoch.
        """
        return state_at(self._next, self.schedule, fingerprint=self._planner.manifest.fingerprint)

    def load_state_dict(self, state: Mapping[str, int | bool]) -> None:
        """Start the next iteration at the position of a state.

        Args:
            state: from `state_dict`.

        Raises:
            UserError: when it is no state, belongs to other clips, or its position is within a global batch of
                this loader.
        """
        fingerprint = self._planner.manifest.fingerprint
        self._start = self._next = position_of(state, self.schedule, fingerprint=fingerprint)

    def close(self) -> None:
        """Release the shared memory, and end the processes if the loader owns them; may be called twice.

        In a fork of the process that opened the loader it does nothing.
        """
        self._is_closed = True
        if self._pool.is_foreign():
            return
        if self._owns_pool:
            self._pool.close()
        self._strategy.close()
        self._ring.close()

    def _begin_iteration(self, first: int, last: int) -> Iterator[ClipBatch]:
        self._iteration += 1
        return self._deliver(self._iteration, first, last=last)

    def _deliver(self, iteration: int, first: int, *, last: int) -> Iterator[ClipBatch]:
        """Yield micro-batches [first, last), counted over all epochs, while this iteration is the latest."""
        prefetch, depth = self.settings.prefetch_batches, self._strategy.depth
        begun: deque[PendingBatch[Result]] = deque()
        started: deque[PendingBatch[Result]] = deque()
        for number in range(first, last + prefetch + depth):
            self._require_latest(iteration)
            if number == first:
                self._strategy.discard()
            if number < last:
                begun.append(self._begin(number))
            if begun and (len(begun) > prefetch or number >= last):
                started.append(begun.popleft())
                self._settle(started[-1], range(len(started[-1].clips)))
                if depth:
                    self._strategy.start(started[-1])
            if started and (len(started) > depth or (number >= last and not begun)):
                yield self._finish(started.popleft())

    def _require_latest(self, iteration: int) -> None:
        self._pool.require_own_process()
        if self._is_closed:
            raise RuntimeError("the loader is closed; open a new one")
        if iteration != self._iteration:
            raise RuntimeError("another iteration of the same loader has started, which ended this one")

    def _begin(self, number: int) -> PendingBatch[Result]:
        """Schedule the clips of a micro-batch in the pool, in groups."""
        slot = self._begun % self._ring.slots
        self._begun += 1
        if (former := self._in_slots[slot]) is not None:
            # If its iteration was left early, workers may still be writing to the slot.
            futures.wait([task.future for task in former.tasks])
        self._strategy.wait_until_free(slot)
        epoch, clips = self.schedule.micro_batch_ids(*divmod(number, self.accum_steps))
        length = self.settings.context_length
        batch = PendingBatch[Result](number, epoch, slot, clips.tolist(), RowFacts.empty(len(clips), length))
        self._in_slots[slot] = batch
        for first in range(0, len(clips), self._clips_per_group):
            rows = range(first, min(first + self._clips_per_group, len(clips)))
            group = self._group(epoch, batch.clips[first : rows.stop], self._ring.place(slot, first))
            task = GroupTask(rows, self._pool.schedule(work_on, self._strategy.task, group))
            batch.tasks += [task] * len(rows)
        return batch

    def _settle(self, batch: PendingBatch[Result], rows: Iterable[int]) -> None:
        """Wait for the clips of some rows; a clip that fails is replaced, or its row becomes invalid."""
        for row in rows:
            while batch.valid[row] and batch.results[row] is None:
                if row in batch.failed:
                    self._replace(batch, row, failure=self._failure(batch, row))
                elif lost := batch.collect(row):
                    self._schedule_again(batch, lost)

    def _schedule_again(self, batch: PendingBatch[Result], rows: Iterable[int]) -> None:
        """Schedule the clips of some rows one by one."""
        for row in rows:
            group = self._group(batch.epoch, [batch.clips[row]], self._ring.place(batch.slot, row))
            future = self._pool.schedule(work_on, self._strategy.task, group)
            batch.tasks[row] = GroupTask(range(row, row + 1), future)

    def _failure(self, batch: PendingBatch[Result], row: int) -> ClipError:
        """Describe why a clip failed; its process may have died without telling what it had planned."""
        request = self._planner.plan(batch.clips[row], batch.epoch)
        batch.facts.values_RF[row] = RowFacts.of([request], self.settings.context_length).values_RF
        return failure_of(batch.failed.pop(row), request)

    def _replace(self, batch: PendingBatch[Result], row: int, *, failure: ClipError) -> None:
        """Schedule a substitute for a failed clip; in evaluation, make its row invalid instead."""
        self.stats.failures[failure.kind] += 1
        batch.results[row] = None
        if not self.schedule.training:
            batch.valid[row] = False
            self.stats.invalid += 1
        elif batch.attempts[row] == MAX_ATTEMPTS:
            raise self._faults.exhausted(failure)
        else:
            attempt = batch.attempts[row]
            substitute = self._faults.substitute(batch.planned_clips[row], batch.epoch, attempt)
            failure = dataclasses.replace(failure, substitute_id=substitute)
        batch.errors.append(failure)
        self._faults.record(failure)
        if failure.substitute_id is not None:
            self.stats.replaced += batch.attempts[row] == 0
            batch.attempts[row] += 1
            batch.clips[row] = failure.substitute_id
            self._schedule_again(batch, [row])

    def _finish(self, batch: PendingBatch[Result]) -> ClipBatch:
        """Assemble a batch and count it as delivered."""
        while True:
            try:
                frames_BTHWC = self._strategy.frames(batch)
                break
            except RefusedRowsError as refused:
                for row, failure in refused.failures.items():
                    self._replace(batch, row, failure=failure)
                self._settle(batch, refused.failures)
        rows, facts = len(batch.clips), batch.facts
        tokens_BL = facts.tokens
        if tokens_BL is not None and self.settings.cut_texts:
            tokens_BL = cut_to_longest(tokens_BL)
        self.stats.delivered += rows
        self._next = batch.number + 1
        if self._next >= self._start + len(self):
            self._start = self._next // len(self) * len(self)
        return ClipBatch(
            frames_BTHWC=frames_BTHWC,
            tokens_BL=self._on_device(tokens_BL),
            labels_B=self._on_device(facts.labels),
            sample_ids=facts.sample_ids,
            view_ids=np.tile(np.arange(self._ring.slot_shape[1]), rows),
            valid=batch.valid,
            epoch=batch.epoch,
            errors=tuple(batch.errors),
            caption_ids=facts.caption_ids,
        )

    def _on_device(self, values: np.ndarray | None) -> torch.Tensor | None:
        """Copy numbers to the device, through pinned memory so that the host does not wait for a GPU."""
        if values is None:
            return None
        values_X = torch.from_numpy(values)
        if self.settings.device.type == "cuda":
            values_X = values_X.pin_memory()
        return values_X.to(self.settings.device, non_blocking=True)
