"""Decoding with DALI: workers collect the packets of clips, and DALI graphs decode batches of them in turn."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cached_property, partial
from itertools import cycle
from typing import NamedTuple

import torch

from avion_dali.contracts import ClipError, ClipRequest
from avion_dali.loading.faults import LoaderStats
from avion_dali.loading.ring import SharedRing
from avion_dali.loading.strategy import PendingBatch, RefusedRowsError

from .codecs import Device
from .color import correct_colors, need_correction
from .device_errors import DALI_ERRORS, require_fault_of_a_clip
from .graph import GraphSettings, failure_cause, graph_inputs
from .graph_runner import GraphRunner
from .mini_clip import MiniClip
from .mini_clip_worker import CollectedClip, collect_into

_log = logging.getLogger(__name__)

_BATCHES_UNDER_WAY = 2  # the host works on one while the device works on the other
# Clips of so many files do not all fail in the same batch, unless the cause lies elsewhere. In the order of a
# manifest, all clips of a batch can come from a single damaged file.
_FILES_NOT_ALL_BAD = 4


class _Sent(NamedTuple):
    """The part of a batch that a graph decodes: rows, their samples and the color spaces of their streams."""

    graph: GraphRunner | None  # None if there is nothing to decode
    rows: list[int]
    sample_ids: list[int]
    colorspaces: list[int]


_NOTHING = _Sent(None, [], [], [])


class DaliStrategy:
    """A `LoaderStrategy` that decodes on NVDEC if batches are delivered to a GPU, and otherwise on the CPU.

    Clips that DALI cannot decode correctly are decoded by `cpu-fused` in the workers, and counted. Batches go
    to the graphs in turn, and are delivered in their own order.

    Args:
        num_graphs: number of graphs; see `default_graphs`. A single one has two batches under way, several
            have one each.
        num_threads: number of clips that each graph decodes in parallel.
    """

    def __init__(self, *, num_graphs: int = 1, num_threads: int) -> None:
        self.depth = max(_BATCHES_UNDER_WAY, num_graphs)
        self._num_graphs, self._num_threads = num_graphs, num_threads
        self._sent: dict[int, _Sent] = {}  # by slot
        self._reasons: set[str] = set()

    def open(self, ring: SharedRing, device: torch.device, stats: LoaderStats) -> None:
        """Build the graphs.

        Args:
            ring: shared memory to which tasks write; a batch on which a graph fails is read again from it.
            device: device to which frames are delivered.
            stats: counts to which decoding time and clips decoded by `cpu-fused` are added.
        """
        self._device, self._stats = device, stats
        self._slots = [ring.frames(slot) for slot in range(ring.slots)]
        on_gpu = device.type == "cuda"
        backend: Device = "mixed" if on_gpu else "cpu"
        rows, views, _, frame_size, *_ = ring.slot_shape
        self.task = partial(collect_into, device=backend)
        self._settings = GraphSettings(
            device=backend,
            device_id=_device_index(device) if on_gpu else 0,
            batch_size=rows,
            num_views=views,
            frame_size=frame_size,
            num_threads=self._num_threads,
            prefetch_depth=self.depth // self._num_graphs,
        )
        self._graphs = [GraphRunner(self._settings) for _ in range(self._num_graphs)]
        self._turns = cycle(self._graphs)

    def wait_until_free(self, slot: int) -> None:
        """Do nothing, since a slot's delivered or discarded batch is no longer read.

        Args:
            slot: number of the slot.
        """

    def start(self, batch: PendingBatch[CollectedClip]) -> None:
        """Queue the batch's mini clips in the graph whose turn it is.

        Args:
            batch: the batch.
        """
        rows = _rows_for_graph(batch)
        clips = [(batch.requests[row], self._mini_clip(batch, row)) for row in rows]
        sample_ids, colorspaces = [r.sample_id for r, _ in clips], [mini.colorspace for _, mini in clips]
        graph = next(self._turns) if rows else None
        self._sent[batch.slot] = _Sent(graph, rows, sample_ids, colorspaces)
        if graph:
            graph.put(graph_inputs(clips))

    def frames(self, batch: PendingBatch[CollectedClip]) -> torch.Tensor:
        """Return the frames of a batch, from its graph and from workers.

        Args:
            batch: the batch.

        Returns:
            uint8 (B*V, T, H, W, C) on the device; zeros for invalid rows.

        Raises:
            RefusedRowsError: when DALI cannot decode some rows.
            RuntimeError: when DALI delivers other clips than the queued ones, or when not a clip failed but
                the device.
            UserError: when memory is short.
        """
        sent = self._sent.pop(batch.slot, _NOTHING)  # empty in a second call, after the graph failed
        rows, frames = sent.rows, None
        if sent.graph:
            try:
                frames, sample_ids = sent.graph.take()
            except DALI_ERRORS as error:
                require_fault_of_a_clip(error)  # the clip is found below
        if frames is None:
            rows = []
            self._decode_one_by_one(batch)
        else:
            if sample_ids.tolist() != sent.sample_ids:
                raise RuntimeError(
                    f"DALI delivered samples {sample_ids.tolist()} in place of {sent.sample_ids}"
                )
            if need_correction(sent.colorspaces):
                correct_colors(frames, sent.colorspaces)
        clips = [clip for clip in batch.results if clip is not None]
        self._stats.decode_s += sum(clip.seconds for clip in clips)
        self._count_unfit([clip.unfit for clip in clips if clip.unfit])
        if frames is None or len(rows) < len(batch.requests):
            frames = self._with_rows_in_place(batch, rows, frames=frames)
        return frames.flatten(0, 1)

    def discard(self) -> None:
        """Discard the batches that were started, and wait for those that the graphs are decoding."""
        self._sent.clear()
        for graph in self._graphs:
            graph.discard()

    def close(self) -> None:
        """Discard the batches that were started."""
        for graph in self._graphs:
            graph.clear()
        self._slots = []

    @cached_property
    def _one_clip_graph(self) -> GraphRunner:
        """A further graph, created when a batch first fails, which finds the clips that cannot be decoded."""
        return GraphRunner(replace(self._settings, batch_size=1, num_threads=1, prefetch_depth=1))

    def _decode_one_by_one(self, batch: PendingBatch[CollectedClip]) -> None:
        """Decode a batch's mini clips one at a time into the ring, and report those that fail."""
        refused: dict[int, ClipError] = {}
        rows = _rows_for_graph(batch)
        for row in rows:
            mini_clip, request = self._mini_clip(batch, row), batch.requests[row]
            self._one_clip_graph.put(graph_inputs([(request, mini_clip)]))
            try:
                frames, _ = self._one_clip_graph.take()
            except DALI_ERRORS as error:
                require_fault_of_a_clip(error)
                refused[row] = _refusal(request, error)
                continue
            correct_colors(frames, [mini_clip.colorspace])
            torch.from_numpy(self._slots[batch.slot][row]).copy_(frames[0])
            clip = batch.results[row]
            assert clip is not None
            batch.results[row] = replace(clip, mini_clip=None)
        if refused:
            if len(refused) == len(rows):
                _require_few_files(list(refused.values()))
            raise RefusedRowsError(refused)

    def _with_rows_in_place(
        self, batch: PendingBatch[CollectedClip], rows: list[int], *, frames: torch.Tensor | None
    ) -> torch.Tensor:
        """Return all rows: those from the graph, those with frames in the ring, and zeros for invalid rows."""
        shape = (len(batch.requests), *self._slots[batch.slot].shape[1:])
        everything = torch.zeros(shape, dtype=torch.uint8, device=self._device)
        if frames is not None:
            everything[rows] = frames
        in_place = self._slots[batch.slot]
        for row, clip in enumerate(batch.results):
            if clip is not None and clip.mini_clip is None:
                everything[row] = torch.from_numpy(in_place[row]).to(self._device)
        return everything

    def _mini_clip(self, batch: PendingBatch[CollectedClip], row: int) -> MiniClip:
        """Return a row's mini clip, whose data may be in the ring."""
        clip = batch.results[row]
        assert clip is not None and clip.mini_clip is not None
        if not clip.num_bytes:
            return clip.mini_clip
        return replace(clip.mini_clip, data=self._slots[batch.slot][row].reshape(-1)[: clip.num_bytes])

    def _count_unfit(self, reasons: list[str]) -> None:
        self._stats.decoded_on_cpu += len(reasons)
        for reason in reasons:
            if reason not in self._reasons:
                _log.warning("some clips are decoded by cpu-fused, on the CPU: %s", reason)
            self._reasons.add(reason)


def _rows_for_graph(batch: PendingBatch[CollectedClip]) -> list[int]:
    return [row for row, clip in enumerate(batch.results) if clip is not None and clip.mini_clip is not None]


def _device_index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _require_few_files(refused: list[ClipError]) -> None:
    """Raise an error if all clips of a batch fail and come from more files than can be damaged by chance."""
    files = {failure.path for failure in refused}
    if len(files) >= _FILES_NOT_ALL_BAD:
        raise RuntimeError(
            f"DALI refuses every clip of a batch, from {len(files)} files, so the clips are not the cause; the "
            f"last is {refused[-1].path}: {refused[-1].cause}. `avion-dali env` tests this machine's decoders"
        )


def _refusal(request: ClipRequest, error: BaseException) -> ClipError:
    part = request.parts[0]
    cause = f"DALI cannot decode it: {failure_cause(error)}"
    return ClipError(request.sample_id, request.epoch, "corrupt", part.chunk.path, part.frame_ids, cause)
