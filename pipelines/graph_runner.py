"""The graph behind DALI's iterator: batches are put in and taken out in order, also when one fails."""

from __future__ import annotations

import contextlib
from collections import deque

import torch
from nvidia.dali.plugin.pytorch import DALIGenericIterator

from .graph import OUTPUTS, GraphInputs, GraphSettings, build_graph


class BatchQueue:
    """The graph's source: gives the batches that were put into it, and pauses when it has none.

    DALI calls it from within its iterator, where waiting for workers would hold up a finished batch, and where
    an error would lose it. So it hands over what is there and does nothing else.
    """

    def __init__(self) -> None:
        self.is_open = True
        self.under_way = 0  # batches that the graph has asked for and not returned yet
        self.ready: deque[GraphInputs] = deque()

    def __call__(self) -> GraphInputs:
        """Return the next batch.

        Raises:
            StopIteration: when it has none, or is closed.
        """
        if not self.is_open or not self.ready:
            raise StopIteration
        self.under_way += 1
        return self.ready.popleft()


class GraphRunner:
    """Runs the graph on batches, in the order in which they are put in.

    Args:
        settings: of the graph.
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
            RuntimeError: when DALI cannot decode one of its clips. The batch is gone, the others go on.
        """
        try:
            (outputs,) = next(self._iterator)
        except StopIteration:
            # Nothing is under way: this is the first batch after a pause, or after a failure.
            self._restart()
            return self.take()
        except RuntimeError:
            # DALI begins no other batch in place of one that failed: it is restarted when the others are done.
            self._queue.is_open = False
            self._queue.under_way -= 1
            raise
        self._queue.under_way -= 1
        return outputs["frames"], outputs["sample_ids"]

    def clear(self) -> None:
        """Forget the batches that are queued."""
        self._queue.ready.clear()

    def discard(self) -> None:
        """Forget the batches that are queued, and wait for those under way without returning them."""
        self.clear()
        while self._queue.under_way:
            # What a batch that nobody wants failed on does not matter.
            with contextlib.suppress(RuntimeError):
                self.take()

    def _restart(self) -> None:
        """Let DALI fill up with batches again.

        It does so only after the source has ended; a reset before that begins a single batch.
        """
        self._queue.under_way = 0
        if not self._queue.ready:
            raise RuntimeError("no batch was put in")
        self._queue.is_open = False
        self._iterator.reset()
        self._queue.is_open = True
        self._iterator.reset()
