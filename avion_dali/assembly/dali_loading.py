"""Opens the loading strategy of `decoder` dali: how many graphs and threads, and the GPU memory for them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc
import torch

from avion_dali.assembly.dali_room import pipelines_module
from avion_dali.config import DaliConfig, TrainConfig
from avion_dali.data.manifest import CHUNKS_FILE, Manifest
from avion_dali.data.order import BatchSchedule
from avion_dali.data.planner import ClipRules
from avion_dali.loading.strategy import LoaderStrategy

if TYPE_CHECKING:
    from pipelines.codecs import Device

_log = logging.getLogger(__name__)


def open_dali_strategy(
    dali: DaliConfig,
    manifest: Manifest,
    *,
    schedule: BatchSchedule,
    clip_shape: tuple[int, ...],
    device: torch.device,
    ranks_on_machine: int,
) -> LoaderStrategy[Any]:
    """Create the strategy; on a GPU, reserve the memory of DALI, before the model's steps fill the rest.

    When a training opens its loaders, only the weights of the model are on the GPU. DALI also decodes its first
    batches before the model's first step.

    Args:
        dali: the settings.
        manifest: the manifest, whose chunks determine the size of pictures.
        schedule: assigns clips to batches.
        clip_shape: shape (V, T, H, W, C) of a delivered clip.
        device: device to which batches are delivered.
        ranks_on_machine: training processes on this machine.
    """
    # Imported only when needed: importing DALI takes a second, and it exists only for Linux.
    graph, module = pipelines_module("graph"), pipelines_module("dali_strategy")
    backend: Device = "mixed" if device.type == "cuda" else "cpu"
    graphs = dali.graphs or graph.default_graphs(backend)
    threads = dali.threads or graph.default_threads(backend, ranks_on_machine, graphs=graphs)
    strategy: LoaderStrategy[Any] = module.DaliStrategy(num_graphs=graphs, num_threads=threads)
    if backend == "mixed":
        memory, pixels = pipelines_module("device_memory"), mean_picture_pixels(manifest)
        pool = memory.pool_bytes((schedule.micro_batch, *clip_shape), pixels, under_way=strategy.depth)
        if schedule.rank == 0:
            gib = (pool + memory.session_bytes(pixels, sessions=graphs * threads)) / 2**30
            _log.info("DALI: %d graphs x %d threads, about %.1f GiB of GPU memory", graphs, threads, gib)
        memory.reserve(pool, device)
    return strategy


def dali_bytes_per_clip(config: TrainConfig) -> int:
    """Estimate the GPU memory that DALI takes for each clip of a training's batches.

    Args:
        config: the training's configuration.

    Raises:
        UserError: when the training manifest cannot be opened.
    """
    graphs = config.dali.graphs or pipelines_module("graph").default_graphs("mixed")
    depth = pipelines_module("dali_strategy").DaliStrategy(num_graphs=graphs, num_threads=1).depth
    clip_shape = ClipRules.from_options(config.data, training=True).clip_shape
    pixels = mean_picture_pixels(Manifest(config.data.train_manifest))
    return int(pipelines_module("device_memory").pool_bytes((1, *clip_shape), pixels, under_way=depth))


def mean_picture_pixels(manifest: Manifest) -> int:
    """Return the mean number of pixels of the chunks' pictures.

    The mean and not the maximum, since a single large chunk among many small ones is rarely in a batch.

    Args:
        manifest: the manifest.
    """
    batches = list(manifest.table(CHUNKS_FILE).batches())
    pixels = sum(pc.sum(pc.multiply(pc.cast(b["width"], "int64"), b["height"])).as_py() for b in batches)
    return round(pixels / sum(batch.num_rows for batch in batches))
