"""Runs the graph with DALI's iterator: batches are queued and returned in order, even if some fail."""

from __future__ import annotations

import contextlib
from collections import deque

import torch
from nvidia.dali.plugin.pytorch import DALIGenericIterator

from .device_errors import DALI_ERRORS
from .graph import OUTPUTS, GraphInputs, GraphSettings, build_graph


class BatchQueue:
    """The source of the graph: returns the queued batches, and pauses when there is none.

    DALI calls it inside its iterator, where waiting for workers would delay a finished batch and an error would
    lose it. Therefore it only returns batches that are already queued.
    """

    def __init__(self) -> None:
        self.is_open = True
        self.under_way = 0  # batches that the graph has requested and not yet returned
        self.ready: deque[GraphInputs] = deque()

    def __call__(self) -> GraphInputs:
        """Return the next batch.

        Raises:
            StopIteration: when the queue is empty or closed.
        """
        if not self.is_open or not self.ready:
            raise StopIteration
        self.under_way += 1
        return self.ready.popleft()


class GraphRunner:
    """Runs the graph on batches, in the order of `put`.

    Args:
        settings: settings of the graph.
    """

    def __init__(self, settings: GraphSettings) -> None:
        self._queue = BatchQueue()
        self._iterator = DALIGenericIterator(
            build_graph(self._queue, settings), list(OUTPUTS), prepare_first_batch=False
        )

    def put(self, inputs: GraphInputs) -> None:
        """Queue a batch; with more than `prefetch_depth` batches queued, the graph never waits.

        Args:
            inputs: from `graph_inputs`, at least one clip.
        """
        self._queue.ready.append(inputs)

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the outputs of the longest queued batch.

        Returns:
            Frames uint8 (B, V, T, H, W, C) on the graph's device, and sample ids int64 (B,).

        Raises:
            RuntimeError: when DALI cannot decode one of its clips. This batch is lost; the others continue.
            MemoryError: when memory is short; see `device_errors`.
        """
        try:
            (outputs,) = next(self._iterator)
        except StopIteration:
            # No batch is under way: this is the first batch after a pause or a failure.
            self._restart()
            return self.take()
        except DALI_ERRORS:
            # DALI starts no other batch in place of a failed one; it is restarted when the others are finished.
            self._queue.is_open = False
            self._queue.under_way -= 1
            raise
        self._queue.under_way -= 1
        return outputs["frames"], outputs["sample_ids"]

    def clear(self) -> None:
        """Discard the queued batches."""
        self._queue.ready.clear()

    def discard(self) -> None:
        """Discard the queued batches, and wait for those under way without returning them."""
        self.clear()
        while self._queue.under_way:
            # Errors of discarded batches are ignored.
            with contextlib.suppress(*DALI_ERRORS):
                self.take()

    def _restart(self) -> None:
        """Let DALI prefetch batches again.

        DALI does so only after the source has ended; an earlier reset starts a single batch.
        """
        self._queue.under_way = 0
        if not self._queue.ready:
            raise RuntimeError("no batch is queued; call put before take")
        self._queue.is_open = False
        self._iterator.reset()
        self._queue.is_open = True
        self._iterator.reset()
