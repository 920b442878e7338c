"""Opens the loader of a resolved training or evaluation."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from avion_dali.assembly.open_clips import open_clips
from avion_dali.assembly.resolve import ResolvedRun
from avion_dali.config import LoaderOptions
from avion_dali.data.manifest import Manifest
from avion_dali.loading.clip_loader import ClipLoader
from avion_dali.loading.pool import WorkerPool


def open_run_clips(
    run: ResolvedRun, manifest: Manifest, *, training: bool, pool: WorkerPool
) -> ClipLoader[Any]:
    """Open the loader of a run's clips on this rank.

    Args:
        run: the resolved configuration.
        manifest: the training or evaluation manifest.
        training: True draws clips for training; False loads an evaluation, without gradient accumulation.
        pool: processes that the loaders of the run share.

    Raises:
        UserError: when the decoder cannot read the manifest's chunks here.
    """
    config, distributed = run.config, run.distributed
    options = {field.name: getattr(config.data, field.name) for field in fields(LoaderOptions)}
    return open_clips(
        manifest,
        batch_size=run.micro_batch,
        accum_steps=run.accum_steps if training else 1,
        decoder=run.decoder.name,
        dali=config.dali,
        seed=config.run.seed,
        training=training,
        device=run.device,
        rank=distributed.rank,
        world_size=distributed.world_size,
        context_length=config.model.context_length if run.task.reads_texts else 0,
        cut_texts=True,
        quarantine=Path(config.output_dir) / "quarantine.jsonl",
        pool=pool,
        **options,
    )
