"""DaliLoader: workers collect the packets of clips, one DALI graph decodes them, and `ClipBatch`es come out."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from avion_dali.contracts import ClipBatch, ClipError, ClipRequest
from avion_dali.data.order import BatchSchedule
from avion_dali.data.planner import Planner
from avion_dali.loading.faults import LoaderStats
from avion_dali.loading.filling import BatchFiller, LoaderSettings, PendingBatch
from avion_dali.loading.pool import DecodePool, Ticket
from avion_dali.loading.ring import SharedRing
from pipelines.codecs import Device
from pipelines.colour import correct_colours
from pipelines.graph import GraphSettings, failure_cause, graph_inputs
from pipelines.mini_clip import MiniClip
from pipelines.source import GraphRunner
from pipelines.worker import CollectedClip, Place, collect_into

# Batches under way in the graph.
_DEPTH = 2
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _HandedOver:
    """A batch whose clips are collected.

    Args:
        pending: the batch; its results are `CollectedClip`s, or None for invalid rows.
        rows: those that the graph decodes.
    """

    pending: PendingBatch
    rows: list[int]


class DaliLoader:
    """Micro-batches of one rank, decoded by DALI: on NVDEC when they go to a GPU, else on the CPU.

    Clips that DALI cannot decode right are decoded by `cpu-fused` in the workers, and counted.

    Args:
        planner: turns sample ids into requests.
        schedule: which samples form which micro-batch.
        pool: processes that collect clips, possibly shared with other loaders.
        settings: device, prefetching, fault limits.
        num_threads: clips that DALI decodes at the same time.
    """

    def __init__(
        self,
        planner: Planner,
        schedule: BatchSchedule,
        pool: DecodePool,
        settings: LoaderSettings,
        *,
        num_threads: int,
    ) -> None:
        self.schedule, self.device, self._pool = schedule, settings.device, pool
        self._clip_shape = planner.rules.clip_shape
        self._filler = BatchFiller(planner, schedule, pool, settings, submit=self._submit)
        # A batch keeps its slot until it is delivered: for rows that DALI does not decode, and for a failed
        # batch, which is decoded again.
        self._ring = SharedRing(
            settings.prefetch_batches + _DEPTH + 1, (schedule.micro_batch, *self._clip_shape)
        )
        on_gpu = settings.device.type == "cuda"
        self._backend: Device = "mixed" if on_gpu else "cpu"
        self._settings = GraphSettings(
            device=self._backend,
            device_id=_device_index(settings.device) if on_gpu else 0,
            batch_size=schedule.micro_batch,
            num_views=self._clip_shape[0],
            frame_size=planner.rules.frame_size,
            num_threads=num_threads,
            prefetch_depth=_DEPTH,
        )
        self._graph = GraphRunner(self._settings)
        self._waiting: deque[_HandedOver] = deque()
        self._reasons: set[str] = set()

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
            RuntimeError: when an earlier iteration was left before its end.
            UserError: when too many clips cannot be read.
        """
        if self._waiting:
            raise RuntimeError("an iteration was left early; make a new loader for another one")
        # When a slot's turn comes again, its batch was delivered: of those collected, only the last `_DEPTH`
        # were not.
        collecting = self._filler.pending(first_step, last_step, slots=self._ring.slots, free=lambda slot: None)
        while True:
            while len(self._waiting) <= _DEPTH and (pending := next(collecting, None)) is not None:
                self._waiting.append(self._hand_over(pending))
            if not self._waiting:
                return
            batch = self._deliver(self._waiting[0])
            self._waiting.popleft()
            yield batch

    def close(self) -> None:
        """Release the shared memory; the pool belongs to the caller. May be called twice."""
        self._graph.clear()
        self._ring.close()

    @cached_property
    def _one_clip_graph(self) -> GraphRunner:
        """The graph again, for finding the clip that a batch failed of; made when that first happens."""
        return GraphRunner(replace(self._settings, batch_size=1, num_threads=1, prefetch_depth=1))

    def _submit(self, request: ClipRequest, slot: int, row: int) -> Ticket:
        place = Place(self._ring.name, self._ring.offset(slot, row), self._ring.clip_bytes)
        return self._pool.schedule(collect_into, request, place, self._backend)

    def _hand_over(self, pending: PendingBatch) -> _HandedOver:
        self._filler.settle(pending)
        rows = [row for row, clip in enumerate(pending.results) if clip and clip.mini_clip]
        if rows:
            self._graph.put(graph_inputs([self._input(pending, row) for row in rows]))
        return _HandedOver(pending, rows)

    def _input(self, pending: PendingBatch, row: int) -> tuple[ClipRequest, MiniClip]:
        clip: CollectedClip = pending.results[row]
        assert clip.mini_clip is not None
        if not clip.num_bytes:
            return pending.requests[row], clip.mini_clip
        start = self._ring.offset(pending.slot, row)
        data = self._ring.everything()[start : start + clip.num_bytes]
        return pending.requests[row], replace(clip.mini_clip, data=data)

    def _deliver(self, batch: _HandedOver) -> ClipBatch:
        pending, frames = batch.pending, self._decoded(batch)
        clips: list[CollectedClip] = [clip for clip in pending.results if clip]
        correct_colours(frames, [pending.results[row].mini_clip.colorspace for row in batch.rows])
        if len(batch.rows) < len(pending.requests):
            frames = self._with_other_rows(batch, frames)
        self.stats.decode_s += sum(clip.seconds for clip in clips)
        self._count_unfit([clip.unfit for clip in clips if clip.unfit])
        return self._filler.batch(pending, frames.flatten(0, 1))

    def _decoded(self, batch: _HandedOver) -> torch.Tensor:
        """Return uint8 (rows, V, T, H, W, C), what the graph makes of its rows of a batch.

        A row whose clip it cannot decode gets a substitute, or drops out of the batch's rows.
        """
        expected = [batch.pending.requests[row].sample_id for row in batch.rows]
        if not expected:
            return self._empty(0)
        try:
            frames, sample_ids = self._graph.take()
        except RuntimeError:
            found = {row: frames for row in batch.rows for frames in self._decoded_alone(batch.pending, row)}
            batch.rows = list(found)
            return torch.cat([self._empty(0), *found.values()])
        if sample_ids.tolist() != expected:
            raise RuntimeError(f"DALI delivered samples {sample_ids.tolist()} in place of {expected}")
        return frames

    def _decoded_alone(self, pending: PendingBatch, row: int) -> list[torch.Tensor]:
        """Decode one row, or substitutes for it, until one succeeds; empty when none is left to decode."""
        while pending.results[row] and pending.results[row].mini_clip:
            self._one_clip_graph.put(graph_inputs([self._input(pending, row)]))
            try:
                return [self._one_clip_graph.take()[0]]
            except RuntimeError as error:
                self._filler.replace(pending, row, _refused(pending.requests[row], error))
                self._filler.settle_row(pending, row)
        return []

    def _with_other_rows(self, batch: _HandedOver, frames: torch.Tensor) -> torch.Tensor:
        """Return all rows: those of the graph, those decoded by workers, and zeros for invalid ones."""
        pending = batch.pending
        everything = self._empty(len(pending.requests)).zero_()
        everything[batch.rows] = frames
        in_place = self._ring.frames(pending.slot)
        for row, clip in enumerate(pending.results):
            if clip and not clip.mini_clip:
                everything[row] = torch.from_numpy(in_place[row]).to(self.device)
        return everything

    def _empty(self, rows: int) -> torch.Tensor:
        return torch.empty((rows, *self._clip_shape), dtype=torch.uint8, device=self.device)

    def _count_unfit(self, reasons: list[str]) -> None:
        self.stats.decoded_on_cpu += len(reasons)
        for reason in reasons:
            if reason not in self._reasons:
                _log.warning("some clips are decoded by cpu-fused, on the CPU: %s", reason)
            self._reasons.add(reason)


def _device_index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _refused(request: ClipRequest, error: RuntimeError) -> ClipError:
    part = request.parts[0]
    cause = f"DALI cannot decode it: {failure_cause(error)}"
    return ClipError(request.sample_id, request.epoch, "corrupt", part.chunk.path, part.frame_ids, cause)
