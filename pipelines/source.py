"""Batches in, batches out: the graph behind DALI's iterator, kept going when a batch fails."""

from __future__ import annotations

from collections import deque

import torch
from nvidia.dali.plugin.pytorch import DALIGenericIterator

from pipelines.graph import OUTPUTS, GraphInputs, GraphSettings, build_graph


class BatchQueue:
    """The graph's source: gives the batches that were put into it, and ends for now when it has none.

    DALI asks from within its iterator, where waiting for workers would hold up a finished batch, and where an
    error would lose it. So nothing is done here but handing over.
    """

    def __init__(self) -> None:
        self.is_open = True
        self.ready: deque[GraphInputs] = deque()

    def __call__(self) -> GraphInputs:
        """Return the next batch.

        Raises:
            StopIteration: when it has none, or is closed.
        """
        if not self.is_open or not self.ready:
            raise StopIteration
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
            # In place of a batch that failed, DALI begins no other one: once all others are done, start anew.
            self._queue.is_open = False
            raise
        return outputs["frames"], outputs["sample_ids"]

    def clear(self) -> None:
        """Forget the batches that are queued."""
        self._queue.ready.clear()

    def _restart(self) -> None:
        """Let DALI fill up with batches again.

        It does so only after it was told of an end; a reset without one begins a single batch.
        """
        if not self._queue.ready:
            raise RuntimeError("no batch was put in")
        self._queue.is_open = False
        self._iterator.reset()
        self._queue.is_open = True
        self._iterator.reset()
