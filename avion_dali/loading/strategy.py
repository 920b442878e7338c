"""The interface between a clip loader and a strategy: tasks of workers, and frames from their results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch

from avion_dali.contracts import ClipError, ClipRequest
from avion_dali.loading.faults import LoaderStats
from avion_dali.loading.pool import Ticket
from avion_dali.loading.ring import Place, SharedRing

Result = TypeVar("Result")


@dataclass(slots=True)
class PendingBatch(Generic[Result]):
    """A micro-batch whose clips are being decoded.

    Args:
        number: number of the micro-batch on this rank, counted over all epochs.
        epoch: its epoch.
        slot: number of its slot in the ring.
        requests: one clip request per row; for a replaced clip, the request of the substitute.
        valid: bool (B,), False for a row that could not be read and is not replaced.
        tickets: one ticket per row.
        results: results of the rows' tasks; None before the task ends, and for invalid rows.
        planned_ids: the planned sample ids, one per row.
        attempts: number of substitutes tried per row.
        errors: clip errors so far.
    """

    number: int
    epoch: int
    slot: int
    requests: list[ClipRequest]
    valid: np.ndarray
    tickets: list[Ticket[Result]] = field(init=False, default_factory=list)
    results: list[Result | None] = field(init=False)
    planned_ids: list[int] = field(init=False)
    attempts: list[int] = field(init=False)
    errors: list[ClipError] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.results = [None] * len(self.requests)
        self.planned_ids = [request.sample_id for request in self.requests]
        self.attempts = [0] * len(self.requests)


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
        """The function that a worker calls per clip; it may write to the clip's place in the ring."""

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
