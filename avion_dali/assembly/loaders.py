"""Builds the loaders of a rank. The only place that reads `--decoder`."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import torch

from avion_dali.assembly.decoder_choice import INSTEAD
from avion_dali.assembly.resolve import ResolvedRun
from avion_dali.contracts import UserError
from avion_dali.data.manifest import Manifest
from avion_dali.data.order import BatchSchedule
from avion_dali.data.planner import ClipRules, Planner
from avion_dali.decode.table import CPU_DECODERS
from avion_dali.engine.loop import ClipLoader
from avion_dali.loading.cpu_loader import CpuLoader
from avion_dali.loading.filling import LoaderSettings
from avion_dali.loading.pool import DecodePool, default_workers
from pipelines.codecs import DECODABLE


def require_decodable_without_gpu(manifest: Manifest) -> None:
    """Check that DALI decodes all chunks of a manifest on the CPU.

    Args:
        manifest: the manifest.

    Raises:
        UserError: when it does not; the message names the ways out.
    """
    decodable = DECODABLE["cpu"]
    others = sorted(chunk_codecs(manifest) - decodable)
    if others:
        raise UserError(
            f"`decoder` dali decodes {', '.join(sorted(decodable))} without a GPU, and {manifest.folder} has "
            f"{' and '.join(others)} chunks; {INSTEAD}, or make chunks for DALI with "
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
        run: the resolved configuration.
    """

    def __init__(self, run: ResolvedRun) -> None:
        config = run.config
        self.run, self.config, self.distributed, self.decoder = run, config, run.distributed, run.decoder
        self._open: list[ClipLoader] = []
        self._ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.pool = DecodePool(
            CPU_DECODERS.get(self.decoder.name, CPU_DECODERS["cpu-fused"]),
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

    def __enter__(self) -> Loaders:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the decode processes and give back the loaders' memory."""
        self.pool.close()
        for loader in self._open:
            loader.close()

    def _build(self, manifest: Manifest, *, training: bool, global_batch: int) -> ClipLoader:
        config, distributed = self.config, self.distributed
        planner = Planner(
            manifest, ClipRules.from_options(config.data, training=training), seed=config.run.seed
        )
        schedule = BatchSchedule(
            num_samples=planner.num_rows,
            global_batch=global_batch,
            micro_batch=config.optim.micro_batch,
            rank=distributed.rank,
            world_size=distributed.world_size,
            seed=config.run.seed,
            training=training,
        )
        settings = LoaderSettings(
            device=torch.device(distributed.device),
            context_length=config.model.context_length if self.run.task.reads_texts else 0,
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
        from pipelines.graph import default_threads
        from pipelines.loader import DaliLoader

        threads = default_threads("mixed" if settings.device.type == "cuda" else "cpu", self._ranks_here)
        return DaliLoader(planner, schedule, self.pool, settings, num_threads=threads)
