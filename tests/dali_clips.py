"""Chunks that DALI decodes without a GPU, requests over them, and both kinds of loaders. Imports no DALI."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import make_videos
import numpy as np
import torch

from avion_dali.contracts import ChunkRef, ClipBatch, ClipPart, ClipRequest, CropWindow
from avion_dali.data.manifest import Chunk, IndexWriter, Manifest, Sample, write_manifest
from avion_dali.data.order import BatchSchedule
from avion_dali.data.planner import ClipRules, Planner
from avion_dali.data.probe import probe_chunk
from avion_dali.decode import cpu_fused
from avion_dali.loading.clip_loader import ClipLoader, LoaderSettings
from avion_dali.loading.frames_strategy import FramesStrategy
from avion_dali.loading.pool import WorkerPool

VP9 = {"codec": "libvpx-vp9", "options": make_videos.VP9_FAST, "color_range": 1, "colorspace": 6}
MJPEG = {"codec": "mjpeg", "options": {"q": "3"}, "pix_fmt": "yuvj420p", "color_range": 2, "colorspace": 6}


def draw_soft(number: int, size: tuple[int, int]) -> np.ndarray:
    """The frame number in black and white, and colours without edges below it."""
    frame = make_videos.draw_frame(number, size)
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    waves = [np.sin(x / 23 + number / 5), np.sin(y / 19 + number / 7), np.sin((x + y) / 31)]
    top = size[1] // 3 + 1
    frame[top:] = (127 + 100 * np.stack(waves, axis=-1))[top:]
    return frame


def draw_noisy(number: int, size: tuple[int, int]) -> np.ndarray:
    """The frame number, and below it noise of brightness over soft colours.

    Pale ones: where colours are cut off at the range's ends, before scaling or after makes a difference.
    """
    frame = draw_soft(number, size)
    top = size[1] // 3 + 1
    noise = np.random.default_rng(number).normal(0, 15, (size[1] - top, size[0], 1))
    frame[top:] = (127 + 0.6 * (frame[top:].astype(np.float64) - 127) + noise).clip(0, 255)
    return frame


@dataclass(frozen=True)
class FixedPlanner:
    """Gives requests made beforehand; their sample ids are their places."""

    requests: Sequence[ClipRequest]

    @property
    def rules(self) -> Any:
        first = self.requests[0]
        return SimpleNamespace(clip_shape=first.frames_shape, frame_size=first.frame_size)

    def plan(self, sample_id: int, epoch: int) -> ClipRequest:
        return self.requests[sample_id]


def clip_request(
    sample_id: int,
    parts: Sequence[tuple[ChunkRef, Sequence[int]]],
    windows: Sequence[tuple[int, int, int, int]] = (),
    *,
    gather: Sequence[int] = (),
    flips: Sequence[bool] = (),
    size: int = 112,
) -> ClipRequest:
    """A request with defaults: whole picture, no flip, each frame once; its text is its sample id."""
    windows = windows or [(0, 0, parts[0][0].width // 2 * 2, parts[0][0].height // 2 * 2)]
    return ClipRequest(
        sample_id=sample_id,
        epoch=0,
        parts=tuple(ClipPart(chunk, tuple(ids)) for chunk, ids in parts),
        gather=tuple(gather) or tuple(range(sum(len(ids) for _, ids in parts))),
        windows=tuple(CropWindow(*window) for window in windows),
        flips=tuple(flips) or (False,) * len(windows),
        frame_size=size,
        tokens=(1, 2 + sample_id),
    )


def chunk_manifest(folder: Path, clips: Mapping[Path, Sequence[float]]) -> Manifest:
    """A manifest with packet indexes: of each chunk file a clip of 0.9 s from each of some seconds on."""
    chunks, samples = [], []
    with IndexWriter(folder) as index:
        for row, (path, seconds) in enumerate(clips.items()):
            facts = probe_chunk(path, index=True)
            place = index.add(facts.packet_index)
            ref = ChunkRef(str(path), facts.size_bytes, facts.num_frames, facts.width, facts.height, place)
            chunks.append(Chunk(ref, path.stem, 0.0, Fraction(facts.fps), facts.codec))
            for start in seconds:
                text = f"{path.stem} {start}"
                samples.append(Sample(row, 1, start, start + 0.9, (text,), ((1, 2 + len(samples)),)))
        index.finish()
    write_manifest(folder, chunk_root=folder, chunks=chunks, samples=samples)
    return Manifest(folder)


def planner_of(manifest: Manifest, *, training: bool = True, size: int = 48, frames: int = 2) -> Planner:
    rules = ClipRules(frames, size, training=training, flip_probability=0.5)
    return Planner(manifest, rules, seed=3)


def strategy_of(decoder: str, graphs: int = 1) -> Any:
    if decoder == "cpu-fused":
        return FramesStrategy(cpu_fused.decode_clip)
    from pipelines.dali_strategy import DaliStrategy

    return DaliStrategy(num_graphs=graphs, num_threads=2)


@contextmanager
def loader_of(
    planner: Any,
    pool: WorkerPool,
    *,
    decoder: str = "dali",
    graphs: int = 1,
    bad: float = 1.0,
    collect: Callable[..., Any] | None = None,
    **schedule: Any,
) -> Iterator[Any]:
    """A loader of any planner's clips; by default all at once, in order, as an evaluation.

    With `collect`, workers do that for each clip instead of what DALI's strategy has them do.
    """
    count = len(planner.requests) if isinstance(planner, FixedPlanner) else planner.manifest.num_samples
    sizes = {"global_batch": 12, "micro_batch": 12, "training": False, "seed": 5} | schedule
    settings = LoaderSettings(torch.device("cpu"), context_length=4, max_bad_fraction=bad)
    strategy, plan = strategy_of(decoder, graphs), BatchSchedule(count, **sizes)
    with ClipLoader(planner, plan, pool=pool, strategy=strategy, settings=settings) as loader:
        if collect is not None:
            strategy.task = partial(collect, device="cpu")
        yield loader


def epoch(loader: Any, first: int = 0, last: int | None = None) -> list[ClipBatch]:
    return list(loader.batches(first, loader.steps_per_epoch if last is None else last))


def decoded(request: ClipRequest) -> np.ndarray:
    """The clip as `cpu-fused` delivers it, (V, T, H, W, C)."""
    frames = np.empty(request.frames_shape, dtype=np.uint8)
    cpu_fused.decode_clip(request, frames)
    return frames
