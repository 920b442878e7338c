"""CpuLoader: has the pool decode clips ahead into shared memory, and yields `ClipBatch`es in order."""

from __future__ import annotations

from collections.abc import Iterator

from avion_dali.contracts import ClipBatch, ClipRequest
from avion_dali.data.order import BatchSchedule
from avion_dali.data.planner import Planner
from avion_dali.loading.faults import LoaderStats
from avion_dali.loading.filling import BatchFiller, LoaderSettings, PendingBatch
from avion_dali.loading.pool import DecodePool, Ticket
from avion_dali.loading.ring import SharedRing
from avion_dali.loading.transfer import DeviceCopier


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
        self.schedule, self._pool = schedule, pool
        self._filler = BatchFiller(planner, schedule, pool, settings, submit=self._submit)
        # One slot is being copied while the others are being filled.
        self._ring = SharedRing(
            settings.prefetch_batches + 1, (schedule.micro_batch, *planner.rules.clip_shape)
        )
        self._copier = DeviceCopier(self._ring, settings.device)

    @property
    def stats(self) -> LoaderStats:
        """What the loader has done so far."""
        return self._filler.stats

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
        free = self._copier.wait_until_free
        for pending in self._filler.pending(first_step, last_step, slots=self._ring.slots, free=free):
            yield self._finish(pending)

    def close(self) -> None:
        """Release the shared memory; the pool belongs to the caller."""
        self._copier.close()
        self._ring.close()

    def _submit(self, request: ClipRequest, slot: int, row: int) -> Ticket:
        return self._pool.submit(request, self._ring, self._ring.offset(slot, row))

    def _finish(self, pending: PendingBatch) -> ClipBatch:
        self._filler.settle(pending)
        self.stats.decode_s += sum(seconds for seconds in pending.results if seconds)
        self._ring.frames(pending.slot)[: len(pending.valid)][~pending.valid] = 0
        return self._filler.batch(pending, self._copier.copy(pending.slot, len(pending.requests)))
