"""What a clip loader leaves to its decoder: what a worker does for a clip, and how results become frames."""

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
    """A micro-batch whose clips are being worked on.

    Args:
        number: which micro-batch of this rank, counted over all epochs.
        epoch: the epoch it belongs to.
        slot: which slot of the ring it uses.
        requests: one per row; that of a substitute where one was needed.
        valid: bool (B,), False for a row that could not be read and is not replaced.
        tickets: what to wait for, one per row.
        results: what the rows' tasks returned; None until then, and for invalid rows.
        planned_ids: the samples of the schedule, one per row.
        attempts: substitutes tried for each row.
        errors: failures met so far.
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
    """Rows of a batch turned out to be undecodable after their tasks had succeeded.

    Args:
        failures: what happened, by row.
    """

    def __init__(self, failures: Mapping[int, ClipError]) -> None:
        super().__init__(failures)
        self.failures = failures


class LoaderStrategy(Protocol[Result]):
    """Turns the clips of a `ClipLoader` into frames on the device."""

    @property
    def depth(self) -> int:
        """Batches that are kept between `start` and `frames` so that decoding overlaps with training."""

    @property
    def task(self) -> Callable[[ClipRequest, Place], Result]:
        """What a worker does for one clip; it may write to the clip's place in the ring."""

    def open(self, ring: SharedRing, device: torch.device, stats: LoaderStats) -> None:
        """Get ready for batches.

        Args:
            ring: where tasks write.
            device: where frames are delivered.
            stats: where the time and the kind of decoding are counted.
        """

    def wait_until_free(self, slot: int) -> None:
        """Return when a slot is no longer read and its tasks may write to it.

        Args:
            slot: which slot of the ring.
        """

    def start(self, batch: PendingBatch[Result]) -> None:
        """Begin to decode a batch whose tasks have all ended; called only where `depth` is not 0.

        Args:
            batch: the batch.
        """

    def frames(self, batch: PendingBatch[Result]) -> torch.Tensor:
        """Return the frames of the batch that was started first.

        Args:
            batch: the batch.

        Returns:
            uint8 (B*V, T, H, W, C) on the device; zeros for invalid rows.

        Raises:
            RefusedRowsError: when some rows cannot be decoded. Replace them or make them invalid, and call
                again.
        """

    def discard(self) -> None:
        """Forget all batches that were started."""

    def close(self) -> None:
        """Release what `open` took; may be called twice."""
