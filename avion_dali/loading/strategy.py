"""The interface between a clip loader and a strategy: tasks of workers, and frames from their results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent import futures
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch

from avion_dali.contracts import ClipError, ClipRequest
from avion_dali.loading.clip_group import GroupResult, RowFacts
from avion_dali.loading.faults import LoaderStats
from avion_dali.loading.pool import WorkerDiedError
from avion_dali.loading.ring import Place, SharedRing

Result = TypeVar("Result")

LOST = (futures.TimeoutError, WorkerDiedError)
"""Errors of a whole task, which do not tell the clip that caused them."""


class GroupTask(NamedTuple):
    """The task of some neighboring rows.

    Args:
        rows: the rows.
        future: what `work_on` returns, or its error.
    """

    rows: range
    future: Future[GroupResult]


@dataclass(slots=True)
class PendingBatch(Generic[Result]):
    """A micro-batch whose clips are being decoded.

    Args:
        number: number of the micro-batch on this rank, counted over all epochs.
        epoch: its epoch.
        slot: number of its slot in the ring.
        clips: index of each row's clip, see `Planner.plan`; for a replaced clip, that of the substitute.
        facts: sample id, label, caption id and tokens of each row; valid when the row's task has ended.
        valid: bool (B,), False for a row that could not be read and is not replaced.
        tasks: the latest task of each row.
        results: results of the rows' tasks; None before the task ends, for clips that failed, and for invalid
            rows.
        failed: why clips failed that are not replaced yet, by row.
        planned_clips: the planned clips, one per row.
        attempts: number of substitutes tried per row.
        errors: clip errors so far.
    """

    number: int
    epoch: int
    slot: int
    clips: list[int]
    facts: RowFacts
    valid: np.ndarray = field(init=False)
    tasks: list[GroupTask] = field(init=False, default_factory=list)
    results: list[Result | None] = field(init=False)
    failed: dict[int, Exception] = field(init=False, default_factory=dict)
    planned_clips: list[int] = field(init=False)
    attempts: list[int] = field(init=False)
    errors: list[ClipError] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        rows = len(self.clips)
        self.valid, self.results = np.ones(rows, dtype=bool), [None] * rows
        self.planned_clips, self.attempts = self.clips.copy(), [0] * rows

    def collect(self, row: int) -> range:
        """Wait for the task of a row, and take over the results and failures of its clips.

        Args:
            row: the row.

        Returns:
            The rows of the task, if it was lost with several clips: one of them may have caused this, so they
            must be scheduled again one by one. Otherwise no rows.

        Raises:
            Exception: the error of the task, if no clip caused it.
        """
        rows, future = self.tasks[row]
        try:
            done = future.result()
        except LOST as error:
            if len(rows) > 1:
                return rows
            self.failed[row] = error
            return range(0)
        first, stop = rows.start, rows.stop
        self.facts.values_RF[first:stop] = done.facts_RF
        self.results[first:stop] = done.results
        self.failed |= {first + number: failure for number, failure in done.failures.items()}
        return range(0)


class RefusedRowsError(Exception):
    """Some rows of a batch cannot be decoded although their tasks succeeded.

    Args:
        failures: clip errors by row.
    """

    def __init__(self, failures: Mapping[int, ClipError]) -> None:
        super().__init__(failures)
        self.failures = failures


class LoaderStrategy(Protocol[Result]):
    """Turns the clips of a `ClipLoader` into frames on the device."""

    @property
    def depth(self) -> int:
        """Number of batches between `start` and `frames`, so that decoding overlaps with training."""

    @property
    def task(self) -> Callable[[ClipRequest, Place], Result]:
        """The function that a worker calls per clip; it may write to the clip's place in the ring.

        Its result must not be None. A `DecodeError` fails the clip, and any other error stops the loader.
        """

    def open(self, ring: SharedRing, device: torch.device, stats: LoaderStats) -> None:
        """Prepare for batches.

        Args:
            ring: shared memory to which tasks write.
            device: device to which frames are delivered.
            stats: counts to which decoding is added.
        """

    def wait_until_free(self, slot: int) -> None:
        """Wait until a slot is no longer read, so that tasks may write to it.

        Args:
            slot: number of the slot.
        """

    def start(self, batch: PendingBatch[Result]) -> None:
        """Start decoding a batch whose tasks have all ended; called only if `depth` is not 0.

        Args:
            batch: the batch.
        """

    def frames(self, batch: PendingBatch[Result]) -> torch.Tensor:
        """Return the frames of a batch; batches are passed in the order of `start`.

        Args:
            batch: the batch.

        Returns:
            uint8 (B*V, T, H, W, C) on the device; zeros for invalid rows.

        Raises:
            RefusedRowsError: when some rows cannot be decoded. The caller must replace them or make them
                invalid, and call this method again.
        """

    def discard(self) -> None:
        """Discard all batches that were started."""

    def close(self) -> None:
        """Release the resources of `open`; may be called twice."""
