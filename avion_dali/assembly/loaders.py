"""Builds the loaders of a rank. The only place that reads `--decoder`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import torch

from avion_dali.assembly.dali_room import pipelines_module
from avion_dali.config import Decoder, TrainConfig
from avion_dali.contracts import UserError
from avion_dali.data.manifest import Manifest
from avion_dali.data.order import BatchSchedule
from avion_dali.data.planner import ClipRules, Planner
from avion_dali.decode import cpu_fused, paper_fused, reference
from avion_dali.engine.distributed import Distributed
from avion_dali.engine.loop import ClipLoader
from avion_dali.loading.cpu_loader import CpuLoader
from avion_dali.loading.filling import LoaderSettings
from avion_dali.loading.pool import DecodePool, default_workers
from avion_dali.loading.worker import DecodeClip

if TYPE_CHECKING:
    from pipelines import codecs, support
else:
    codecs, support = pipelines_module("codecs"), pipelines_module("support")

_DECODE_CLIP: dict[str, DecodeClip] = {
    "cpu-fused": cpu_fused.decode_clip,
    "paper-fused": paper_fused.decode_clip,
    "reference": reference.decode_clip,
}
_INSTEAD = "--decoder cpu-fused delivers the same clips on CPU cores"


@dataclass(frozen=True)
class DecoderChoice:
    """What decodes in this run.

    Args:
        name: a decoder's name, never `auto`.
        reason: why this one.
    """

    name: str
    reason: str


def choose_decoder(decoder: Decoder, device: torch.device) -> DecoderChoice:
    """Decide what decodes; `auto` takes DALI where NVDEC works, else `cpu-fused`.

    Args:
        decoder: what was asked for.
        device: where the model runs.

    Raises:
        UserError: when it cannot run here.
    """
    if decoder == "auto":
        return DecoderChoice(*support.auto_decoder(_nvdec_problem(device)))
    if decoder == "dali":
        problem = _nvdec_problem(device) if device.type == "cuda" else _import_problem()
        if problem:
            raise UserError(f"--decoder dali does not work here: {problem}; {_INSTEAD}")
    return DecoderChoice(decoder, "asked for")


def _nvdec_problem(device: torch.device) -> str | None:
    if device.type == "cuda":
        return support.nvdec_problem(torch.cuda.current_device() if device.index is None else device.index)
    return support.cuda_problem(0) or "the model runs on the CPU"


def _import_problem() -> str | None:
    """Import what `--decoder dali` needs; returns why that failed."""
    try:
        pipelines_module("loader")
    except (ImportError, OSError) as error:
        return support.dali_problem() or str(error)
    return None


def require_decodable_without_gpu(manifest: Manifest) -> None:
    """Check that DALI decodes all chunks of a manifest on the CPU.

    Args:
        manifest: the manifest.

    Raises:
        UserError: when it does not; the message names the ways out.
    """
    decodable = codecs.DECODABLE["cpu"]
    others = sorted(chunk_codecs(manifest) - decodable)
    if others:
        raise UserError(
            f"--decoder dali decodes {', '.join(sorted(decodable))} without a GPU, and {manifest.folder} has "
            f"{' and '.join(others)} chunks; {_INSTEAD}, or make chunks for DALI with "
            "`avion-dali chunk --profile vp9`"
        )


def chunk_codecs(manifest: Manifest) -> set[str]:
    """Return the codecs that occur among a manifest's chunks.

    Args:
        manifest: the manifest.
    """
    with pa.memory_map(str(manifest.folder / "chunks.arrow")) as file:
        reader = pa.ipc.open_file(file)
        columns = (reader.get_batch(i).column("codec") for i in range(reader.num_record_batches))
        return {codec for column in columns for codec in column.unique().to_pylist()}


class Loaders:
    """The loaders of one rank: training and evaluation share one pool of decode processes.

    Args:
        config: the run's configuration.
        distributed: this rank among all.
    """

    def __init__(self, config: TrainConfig, distributed: Distributed) -> None:
        self.config, self.distributed = config, distributed
        self._open: list[ClipLoader] = []
        self._ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.decoder = choose_decoder(config.decoder, distributed.device)
        self.pool = DecodePool(
            _DECODE_CLIP.get(self.decoder.name, cpu_fused.decode_clip),
            workers=config.data.workers or default_workers(self._ranks_here),
            clip_timeout_s=config.data.clip_timeout_s,
        )

    def training(self, manifest: Manifest) -> ClipLoader:
        """Return the loader of the training clips, shuffled anew each epoch.

        Args:
            manifest: the training manifest.
        """
        optim = self.config.optim
        return self._build(manifest, training=True, global_batch=optim.global_batch)

    def evaluation(self, manifest: Manifest) -> ClipLoader:
        """Return the loader of the evaluation clips: in order, centre squares, nothing dropped.

        Args:
            manifest: the evaluation manifest.
        """
        batch = self.config.optim.micro_batch * self.distributed.world_size
        return self._build(manifest, training=False, global_batch=batch)

    def close(self) -> None:
        """End the decode processes and give back the loaders' memory."""
        self.pool.close()
        for loader in self._open:
            loader.close()

    def _build(self, manifest: Manifest, *, training: bool, global_batch: int) -> ClipLoader:
        config, distributed = self.config, self.distributed
        planner = Planner(manifest, ClipRules.from_config(config.data, training=training), seed=config.run.seed)
        schedule = BatchSchedule(
            num_samples=planner.num_rows,
            global_batch=global_batch,
            micro_batch=config.optim.micro_batch,
            rank=distributed.rank,
            world_size=distributed.world_size,
            seed=config.run.seed,
            training=training,
        )
        has_texts = config.objective.name in ("contrastive", "max-margin")
        settings = LoaderSettings(
            device=torch.device(distributed.device),
            context_length=config.model.context_length if has_texts else 0,
            prefetch_batches=config.data.prefetch_batches,
            max_bad_fraction=config.data.max_bad_fraction,
            quarantine=Path(config.output_dir) / "quarantine.jsonl",
        )
        loader = self._loader(planner, schedule, settings)
        self._open.append(loader)
        return loader

    def _loader(self, planner: Planner, schedule: BatchSchedule, settings: LoaderSettings) -> ClipLoader:
        if self.decoder.name != "dali":
            return CpuLoader(planner, schedule, self.pool, settings)
        if settings.device.type != "cuda":
            require_decodable_without_gpu(planner.manifest)
        # DALI takes a second to import, and exists for Linux only.
        graph, loader = pipelines_module("graph"), pipelines_module("loader")
        threads = graph.default_threads("mixed" if settings.device.type == "cuda" else "cpu", self._ranks_here)
        return loader.DaliLoader(planner, schedule, self.pool, settings, num_threads=threads)
