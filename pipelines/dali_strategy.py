"""Decoding with DALI: workers collect the packets of clips, and one DALI graph decodes them."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from functools import cached_property, partial
from typing import NamedTuple

import torch

from avion_dali.contracts import ClipError, ClipRequest
from avion_dali.loading.faults import LoaderStats
from avion_dali.loading.ring import SharedRing
from avion_dali.loading.strategy import PendingBatch, RefusedRowsError

from .codecs import Device
from .color import correct_colors, need_correction
from .graph import GraphSettings, failure_cause, graph_inputs
from .graph_runner import GraphRunner
from .mini_clip import MiniClip
from .mini_clip_worker import CollectedClip, collect_into

_log = logging.getLogger(__name__)


class _Sent(NamedTuple):
    """The part of a batch that the graph decodes: rows, their samples and the color spaces of their streams."""

    rows: list[int]
    sample_ids: list[int]
    colorspaces: list[int]


_NOTHING = _Sent([], [], [])


class DaliStrategy:
    """A `LoaderStrategy` that decodes on NVDEC if batches are delivered to a GPU, and otherwise on the CPU.

    Clips that DALI cannot decode correctly are decoded by `cpu-fused` in the workers, and counted.

    Args:
        num_threads: number of clips that DALI decodes in parallel.
    """

    depth = 2  # batches in the graph: the host works on one while the device works on the other

    def __init__(self, *, num_threads: int) -> None:
        self._num_threads = num_threads
        self._sent: dict[int, _Sent] = {}  # by slot
        self._reasons: set[str] = set()

    def open(self, ring: SharedRing, device: torch.device, stats: LoaderStats) -> None:
        """Build the graph.

        Args:
            ring: shared memory to which tasks write; a batch on which the graph fails is read again from it.
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
            prefetch_depth=self.depth,
        )
        self._graph = GraphRunner(self._settings)

    def wait_until_free(self, slot: int) -> None:
        """Do nothing, since a slot's delivered or discarded batch is no longer read.

        Args:
            slot: number of the slot.
        """

    def start(self, batch: PendingBatch[CollectedClip]) -> None:
        """Queue the batch's mini clips in the graph.

        Args:
            batch: the batch.
        """
        rows = _rows_for_graph(batch)
        clips = [self._clip(batch, row) for row in rows]
        sample_ids, colorspaces = [r.sample_id for r, _ in clips], [mini.colorspace for _, mini in clips]
        self._sent[batch.slot] = _Sent(rows, sample_ids, colorspaces)
        if rows:
            self._graph.put(graph_inputs(clips))

    def frames(self, batch: PendingBatch[CollectedClip]) -> torch.Tensor:
        """Return the frames of a batch, from the graph and from workers.

        Args:
            batch: the batch.

        Returns:
            uint8 (B*V, T, H, W, C) on the device; zeros for invalid rows.

        Raises:
            RefusedRowsError: when DALI cannot decode some rows.
            RuntimeError: when DALI delivers other clips than the queued ones.
        """
        sent = self._sent.pop(batch.slot, _NOTHING)  # empty in a second call, after the graph failed
        rows, frames = sent.rows, None
        if rows:
            with contextlib.suppress(RuntimeError):  # it failed on a clip, which is found below
                frames, sample_ids = self._graph.take()
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
        if frames is None or len(rows) < len(batch.clips):
            frames = self._with_rows_in_place(batch, rows, frames=frames)
        return frames.flatten(0, 1)

    def discard(self) -> None:
        """Discard the batches that were started, and wait for those that the graph is decoding."""
        self._sent.clear()
        self._graph.discard()

    def close(self) -> None:
        """Discard the batches that were started."""
        self._graph.clear()
        self._slots = []

    @cached_property
    def _one_clip_graph(self) -> GraphRunner:
        """A second graph, created when a batch first fails, which finds the clips that cannot be decoded."""
        return GraphRunner(replace(self._settings, batch_size=1, num_threads=1, prefetch_depth=1))

    def _decode_one_by_one(self, batch: PendingBatch[CollectedClip]) -> None:
        """Decode a batch's mini clips one at a time into the ring, and report those that fail."""
        refused: dict[int, ClipError] = {}
        for row in _rows_for_graph(batch):
            request, mini_clip = self._clip(batch, row)
            self._one_clip_graph.put(graph_inputs([(request, mini_clip)]))
            try:
                frames, _ = self._one_clip_graph.take()
            except RuntimeError as error:
                refused[row] = _refusal(request, error)
                continue
            correct_colors(frames, [mini_clip.colorspace])
            torch.from_numpy(self._slots[batch.slot][row]).copy_(frames[0])
            clip = batch.results[row]
            assert clip is not None
            batch.results[row] = replace(clip, mini_clip=None)
        if refused:
            raise RefusedRowsError(refused)

    def _with_rows_in_place(
        self, batch: PendingBatch[CollectedClip], rows: list[int], *, frames: torch.Tensor | None
    ) -> torch.Tensor:
        """Return all rows: those from the graph, those with frames in the ring, and zeros for invalid rows."""
        shape = (len(batch.clips), *self._slots[batch.slot].shape[1:])
        everything = torch.zeros(shape, dtype=torch.uint8, device=self._device)
        if frames is not None:
            everything[rows] = frames
        in_place = self._slots[batch.slot]
        for row, clip in enumerate(batch.results):
            if clip is not None and clip.mini_clip is None:
                everything[row] = torch.from_numpy(in_place[row]).to(self._device)
        return everything

    def _clip(self, batch: PendingBatch[CollectedClip], row: int) -> tuple[ClipRequest, MiniClip]:
        """Return a row's request and mini clip, whose data may be in the ring."""
        clip = batch.results[row]
        assert clip is not None and clip.mini_clip is not None
        if not clip.num_bytes:
            return clip.request, clip.mini_clip
        data = self._slots[batch.slot][row].reshape(-1)[: clip.num_bytes]
        return clip.request, replace(clip.mini_clip, data=data)

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


def _refusal(request: ClipRequest, error: RuntimeError) -> ClipError:
    part = request.parts[0]
    cause = f"DALI cannot decode it: {failure_cause(error)}"
    return ClipError(request.sample_id, request.epoch, "corrupt", part.chunk.path, part.frame_ids, cause)
