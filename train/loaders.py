"""Builds the loaders of a rank. The only place that reads `--decoder`."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from avion_dali.config import Decoder, TrainConfig
from avion_dali.contracts import UserError
from avion_dali.data.manifest import Manifest
from avion_dali.data.order import BatchSchedule
from avion_dali.data.planner import ClipRules, Planner
from avion_dali.decode import cpu_fused, paper_fused, reference
from avion_dali.engine.distributed import Distributed
from avion_dali.loading.cpu_loader import CpuLoader
from avion_dali.loading.filling import LoaderSettings
from avion_dali.loading.pool import DecodePool, default_workers
from avion_dali.loading.worker import DecodeClip


def choose_decoder(decoder: Decoder) -> tuple[str, DecodeClip]:
    """Return a decoder's name and function.

    Args:
        decoder: what was asked for; `auto` takes the best one that works here.

    Raises:
        UserError: when it cannot run here.
    """
    if decoder in ("cpu-fused", "auto"):
        return "cpu-fused", cpu_fused.decode_clip
    if decoder == "paper-fused":
        return decoder, paper_fused.decode_clip
    if decoder == "reference":
        return decoder, reference.decode_clip
    raise UserError(
        f"--decoder {decoder} is not in this version yet; "
        "use --decoder cpu-fused, which delivers the same clips"
    )


class Loaders:
    """The loaders of one rank: training and evaluation share one pool of decode processes.

    Args:
        config: the run's configuration.
        distributed: this rank among all.
    """

    def __init__(self, config: TrainConfig, distributed: Distributed) -> None:
        self.config, self.distributed = config, distributed
        self._open: list[CpuLoader] = []
        self.decoder, decode_clip = choose_decoder(config.decoder)
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.pool = DecodePool(
            decode_clip,
            workers=config.data.workers or default_workers(ranks_here),
            clip_timeout_s=config.data.clip_timeout_s,
        )

    def training(self, manifest: Manifest) -> CpuLoader:
        """Return the loader of the training clips, shuffled anew each epoch.

        Args:
            manifest: the training manifest.
        """
        optim = self.config.optim
        return self._build(manifest, training=True, global_batch=optim.global_batch)

    def evaluation(self, manifest: Manifest) -> CpuLoader:
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

    def _build(self, manifest: Manifest, *, training: bool, global_batch: int) -> CpuLoader:
        config, distributed = self.config, self.distributed
        rules = ClipRules(
            num_frames=config.data.num_frames,
            frame_size=config.data.frame_size,
            training=training,
            crop_scale=config.data.crop_scale,
            crop_ratio=config.data.crop_ratio,
            flip_probability=config.data.flip_probability,
        )
        schedule = BatchSchedule(
            num_samples=manifest.num_samples,
            global_batch=global_batch,
            micro_batch=config.optim.micro_batch,
            rank=distributed.rank,
            world_size=distributed.world_size,
            seed=config.run.seed,
            training=training,
        )
        settings = LoaderSettings(
            device=torch.device(distributed.device),
            context_length=config.model.context_length,
            prefetch_batches=config.data.prefetch_batches,
            max_bad_fraction=config.data.max_bad_fraction,
            quarantine=Path(config.output_dir) / "quarantine.jsonl",
        )
        planner = Planner(manifest, rules, seed=config.run.seed)
        self._open.append(CpuLoader(planner, schedule, self.pool, settings))
        return self._open[-1]
