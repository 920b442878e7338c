"""Resolves the automatic settings of a configuration once, before anything is built."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from avion_dali.assembly.dali_loading import dali_bytes_per_clip
from avion_dali.assembly.decoder_choice import DecoderChoice, choose_decoder
from avion_dali.assembly.memory import MemoryPlan, count_parameters, free_bytes, plan_memory
from avion_dali.config import TrainConfig
from avion_dali.contracts import UserError
from avion_dali.engine.distributed import Distributed
from avion_dali.engine.precision import AUTOCAST_DTYPES, Precision, resolve_precision
from avion_dali.models.attention import describe_kernel, resolve_attention
from avion_dali.models.float8 import require_fp8
from avion_dali.models.presets import PRESETS
from avion_dali.models.starting_weights import StartWeights
from avion_dali.models.towers import resolve_model
from avion_dali.tasks.table import find_task
from avion_dali.tasks.task import Task


@dataclass(frozen=True)
class ResolvedRun:
    """A configuration without automatic settings, for one machine and one set of ranks.

    Args:
        config: the configuration; the activation, epsilon and norms of the model are those of its initial
            weights, its attention kernel runs here, and its micro-batch fits.
        task: the task of `objective.name`.
        decoder: the decoder.
        precision: precision of the forward passes.
        micro_batch: clips per forward pass on one rank.
        accum_steps: micro-batches per optimizer step and rank.
        memory: how micro-batch and recomputation were chosen; None if both were given.
        distributed: this process among all processes of the run.
    """

    config: TrainConfig
    task: Task
    decoder: DecoderChoice
    precision: Precision
    micro_batch: int
    accum_steps: int
    memory: MemoryPlan | None
    distributed: Distributed

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.distributed.device

    def lines(self) -> list[str]:
        """Return lines for the console that describe the resolved settings of decoder, model and pixels."""
        model = self.config.model
        return [
            f"decoder: {self.decoder.name} ({self.decoder.reason})",
            f"model: {model.encoder} {model.size}, {model.activation}, norm eps {model.norm_eps:g}, "
            f"attention {self._attention()}, {self.precision} on {self.device}",
            f"pixels: normalization {self.config.data.normalization}",
        ]

    def _attention(self) -> str:
        preset, kernel = PRESETS[self.config.model.size], self.config.model.attention
        width = preset.video_width // preset.video_heads
        assert kernel != "auto"
        return describe_kernel(kernel, self.device, dtype=AUTOCAST_DTYPES[self.precision], width=width)

    def batch_lines(self) -> list[str]:
        """Return lines for the console that say how an optimizer step's batch is split, and why."""
        batch, ranks = self.config.optim.global_batch, self.distributed.world_size
        split = f"{ranks} ranks x {self.micro_batch} clips x {self.accum_steps} micro-batches"
        return [f"batch: {batch} clips = {split}", *([self.memory.line] if self.memory else [])]


def require_trainable(run: ResolvedRun) -> None:
    """Reject settings with which a model can be evaluated but not trained.

    Args:
        run: the resolved configuration of a training.

    Raises:
        UserError: names the settings that do not go together.
    """
    model, sharding = run.config.model, run.config.run.sharding
    if model.residual_dtype == "bf16" and run.precision != "bf16":
        raise UserError(
            f"model.residual_dtype = bf16 needs run.precision = bf16, but the run computes in {run.precision}; "
            "set model.residual_dtype = fp32"
        )
    is_sharded = sharding == "shard" and run.distributed.world_size > 1
    if is_sharded and model.compile and model.checkpoint_every:
        # Recomputed blocks that are both sharded and compiled save other tensors than in the forward pass.
        raise UserError(
            "run.sharding = shard, model.compile and model.checkpoint_every do not go together: PyTorch ends "
            "such trainings with a CheckpointError; set model.checkpoint_every = 0 or model.compile = false"
        )
    if model.mlp_dtype == "fp8":
        _require_fp8(run, is_sharded=is_sharded)


def _require_fp8(run: ResolvedRun, *, is_sharded: bool) -> None:
    """Reject MLPs in fp8 where they cannot be trained."""
    if is_sharded:
        raise UserError(
            "model.mlp_dtype = fp8 and run.sharding = shard do not go together yet: their sharded weights are "
            "untested; set one of them to its default"
        )
    if run.precision != "bf16":
        raise UserError(
            f"model.mlp_dtype = fp8 needs run.precision = bf16, but the run computes in {run.precision}; "
            "set model.mlp_dtype = default"
        )
    require_fp8(run.device, width=PRESETS[run.config.model.size].video_width)


def resolve(config: TrainConfig, distributed: Distributed, start: StartWeights | None = None) -> ResolvedRun:
    """Resolve the automatic settings of a configuration.

    Args:
        config: the configuration.
        distributed: this process among all processes of the run.
        start: initial weights of the model, or those of the checkpoint; None for random weights.

    Raises:
        UserError: when the configuration, the weights and this machine are incompatible.
    """
    task = find_task(config.objective.name)
    device = distributed.device
    precision = resolve_precision(config.run.precision, device)
    model = resolve_model(config.model, start.facts if start else None)
    attention = resolve_attention(model.attention, device, dtype=AUTOCAST_DTYPES[precision])
    config = replace(config, model=replace(model, attention=attention))
    decoder = choose_decoder(config.decoder, device)
    micro_batch, memory = config.optim.micro_batch, None
    if micro_batch == "auto" or model.checkpoint_every == "auto":
        memory = plan_memory(
            config,
            precision=precision,
            ranks=distributed.world_size,
            free=free_bytes(distributed),
            parameters=count_parameters(config, task),
            decoding=dali_bytes_per_clip(config) if decoder.name == "dali" and device.type == "cuda" else 0,
        )
        micro_batch = memory.micro_batch
        config = replace(
            config,
            model=replace(config.model, checkpoint_every=memory.checkpoint_every),
            optim=replace(config.optim, micro_batch=micro_batch),
        )
    return ResolvedRun(
        config=config,
        task=task,
        decoder=decoder,
        precision=precision,
        micro_batch=micro_batch,
        accum_steps=max(1, config.optim.global_batch // (micro_batch * distributed.world_size)),
        memory=memory,
        distributed=distributed,
    )
