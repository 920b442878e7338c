"""Typed configuration: YAML files and the command line fill these dataclasses.

Every field is checked here, once; a message names the key and what is allowed. No defaults are hidden
elsewhere, and a recipe in `configs/` writes only the fields that differ from these.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from avion_dali.contracts import UserError

Decoder = Literal["dali", "cpu-fused", "paper-fused", "reference", "auto"]
CPU_DECODERS: tuple[str, ...] = ("cpu-fused", "paper-fused", "reference")
ModelSize = Literal["tiny", "vit_b16", "vit_l14", "vit_l14_336"]
Normalization = Literal["openai", "openai-avion", "imagenet"]


def _require(condition: bool, key: str, value: object, allowed: str) -> None:
    """Raise `UserError` naming the key, its value and what is allowed, unless the condition holds."""
    if not condition:
        raise UserError(f"config: {key} = {value!r} is not allowed; it must be {allowed}")


@dataclass(frozen=True)
class DataConfig:
    """Where clips come from and how they are drawn.

    Args:
        train_manifest: folder made by `avion-dali manifest`; empty for evaluation only.
        eval_manifest: folder of the held-out manifest; empty to train without evaluation.
        num_frames: frames of a clip (T).
        frame_size: side of a frame in pixels after cropping.
        crop_scale: random-resized-crop area range, as shares of the frame.
        crop_ratio: random-resized-crop aspect range (width / height), drawn log-uniformly.
        flip_probability: chance that a training clip is mirrored left to right.
        normalization: pixel mean and deviation; see `avion_dali/device_ops/normalize.py`.
        workers: decode processes per rank; 0 takes the machine's cores divided by the ranks on it.
        prefetch_batches: micro-batches decoded ahead of the model.
        clip_timeout_s: seconds after which a clip's worker is killed and the clip replaced.
        max_bad_fraction: share of clips that may fail before the run stops.
    """

    train_manifest: str = ""
    eval_manifest: str = ""
    num_frames: int = 4
    frame_size: int = 224
    crop_scale: tuple[float, float] = (0.5, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    flip_probability: float = 0.0
    normalization: Normalization = "openai"
    workers: int = 0
    prefetch_batches: int = 3
    clip_timeout_s: float = 30.0
    max_bad_fraction: float = 0.01

    def __post_init__(self) -> None:
        _require(self.num_frames >= 1, "data.num_frames", self.num_frames, ">= 1")
        _require(self.frame_size >= 16, "data.frame_size", self.frame_size, ">= 16 pixels")
        low, high = self.crop_scale
        _require(0 < low <= high <= 1, "data.crop_scale", self.crop_scale, "two shares 0 < low <= high <= 1")
        low, high = self.crop_ratio
        _require(0 < low <= high, "data.crop_ratio", self.crop_ratio, "two ratios 0 < low <= high")
        _require(0 <= self.flip_probability <= 1, "data.flip_probability", self.flip_probability, "in [0, 1]")
        _require(self.workers >= 0, "data.workers", self.workers, ">= 0 (0: one per core)")
        _require(self.prefetch_batches >= 1, "data.prefetch_batches", self.prefetch_batches, ">= 1")
        _require(self.clip_timeout_s > 0, "data.clip_timeout_s", self.clip_timeout_s, "> 0 seconds")
        _require(0 <= self.max_bad_fraction <= 1, "data.max_bad_fraction", self.max_bad_fraction, "in [0, 1]")


@dataclass(frozen=True)
class ModelConfig:
    """The dual encoder.

    Args:
        size: a row of `avion_dali/models/presets.py`.
        embed_dim: width of the shared video-text space.
        activation: `gelu` (exact) or `quick_gelu` (OpenAI weights).
        norm_eps: LayerNorm epsilon of the video tower.
        context_length: text tokens the text tower sees.
        drop_path: stochastic depth rate, the same in every video block.
        patch_dropout: share of patch tokens dropped in training.
        checkpointing: recompute block activations in the backward pass: `none` or `full`.
        train_logit_scale: learn the temperature (the published recipe freezes it at 1/0.07).
    """

    size: ModelSize = "vit_b16"
    embed_dim: int = 256
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    norm_eps: float = 1e-6
    context_length: int = 77
    drop_path: float = 0.0
    patch_dropout: float = 0.0
    checkpointing: Literal["none", "full"] = "none"
    train_logit_scale: bool = False

    def __post_init__(self) -> None:
        _require(self.embed_dim >= 1, "model.embed_dim", self.embed_dim, ">= 1")
        _require(self.norm_eps > 0, "model.norm_eps", self.norm_eps, "> 0")
        _require(2 <= self.context_length <= 77, "model.context_length", self.context_length, "in [2, 77]")
        _require(0 <= self.drop_path < 1, "model.drop_path", self.drop_path, "in [0, 1)")
        _require(0 <= self.patch_dropout < 1, "model.patch_dropout", self.patch_dropout, "in [0, 1)")


@dataclass(frozen=True)
class OptimConfig:
    """Batch sizes, AdamW and the learning-rate schedule.

    Args:
        global_batch: clips per optimizer step over all ranks.
        micro_batch: clips per forward pass on one rank; accumulation follows from both.
        epochs: passes over the training manifest.
        learning_rate: peak rate.
        schedule: `cosine` (after warm-up) or `constant`.
        warmup_epochs: epochs of linear warm-up from `warmup_learning_rate`; may be fractional.
        warmup_learning_rate: rate of the first step.
        final_learning_rate: what the cosine falls to.
        weight_decay: AdamW decay of matrices (norms, biases and position tables are exempt).
        beta1: AdamW first-moment decay.
        beta2: AdamW second-moment decay.
        eps: AdamW epsilon.
        clip_grad_norm: largest gradient norm; 0 for none.
    """

    global_batch: int = 256
    micro_batch: int = 256
    epochs: int = 5
    learning_rate: float = 3e-5
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_epochs: float = 0.0
    warmup_learning_rate: float = 1e-6
    final_learning_rate: float = 1e-5
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_grad_norm: float = 0.0

    def __post_init__(self) -> None:
        _require(self.micro_batch >= 1, "optim.micro_batch", self.micro_batch, ">= 1")
        _require(self.global_batch >= 1, "optim.global_batch", self.global_batch, ">= 1")
        _require(self.epochs >= 1, "optim.epochs", self.epochs, ">= 1")
        _require(self.learning_rate > 0, "optim.learning_rate", self.learning_rate, "> 0")
        _require(
            0 <= self.warmup_epochs <= self.epochs, "optim.warmup_epochs", self.warmup_epochs, "in [0, epochs]"
        )
        for name in ("warmup_learning_rate", "final_learning_rate", "eps"):
            _require(getattr(self, name) >= 0, f"optim.{name}", getattr(self, name), ">= 0")
        _require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, ">= 0")
        _require(0 <= self.beta1 < 1, "optim.beta1", self.beta1, "in [0, 1)")
        _require(0 <= self.beta2 < 1, "optim.beta2", self.beta2, "in [0, 1)")
        _require(self.clip_grad_norm >= 0, "optim.clip_grad_norm", self.clip_grad_norm, ">= 0 (0: none)")


@dataclass(frozen=True)
class RunConfig:
    """Seed, precision and how often things happen.

    Args:
        seed: decides every random choice of data, initialisation and regularisation.
        precision: `auto` takes bf16 on GPUs that have it, fp16 with a scaler on older ones, fp32 on CPU.
        log_every: optimizer steps between log rows.
        eval_every: epochs between evaluations.
        save_every: optimizer steps between checkpoints within an epoch; 0 saves at epoch ends only.
        max_steps: stop after this many optimizer steps; 0 runs all epochs.
    """

    seed: int = 0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    log_every: int = 10
    eval_every: int = 1
    save_every: int = 0
    max_steps: int = 0

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**63, "run.seed", self.seed, "in [0, 2^63)")
        _require(self.log_every >= 1, "run.log_every", self.log_every, ">= 1")
        _require(self.eval_every >= 1, "run.eval_every", self.eval_every, ">= 1")
        _require(self.save_every >= 0, "run.save_every", self.save_every, ">= 0 (0: at epoch ends only)")
        _require(self.max_steps >= 0, "run.max_steps", self.max_steps, ">= 0 (0: all epochs)")


@dataclass(frozen=True)
class TrainConfig:
    """Everything a training needs.

    Args:
        output_dir: folder of this run: checkpoints, logs, report.
        decoder: how clips are decoded, see the README.
        resume: `auto` continues from `output_dir` when it holds a checkpoint, `never` refuses such a folder.
        data: where clips come from.
        model: the model.
        optim: batches and optimizer.
        run: seed, precision, intervals.
    """

    output_dir: str = "runs/pretrain"
    decoder: Decoder = "auto"
    resume: Literal["auto", "never"] = "auto"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> TrainConfig:
        """Rebuild a configuration from the plain values kept in a checkpoint.

        Args:
            values: what `dataclasses.asdict` made of a configuration.

        Raises:
            UserError: when a key is not one of this version's.
        """
        sections = {"data": DataConfig, "model": ModelConfig, "optim": OptimConfig, "run": RunConfig}
        try:
            built = {name: kind(**_with_tuples(values.get(name, {}))) for name, kind in sections.items()}
            top = {name: value for name, value in values.items() if name not in sections}
            return cls(**top, **built)
        except TypeError as error:
            raise UserError(f"the checkpoint's configuration is of another version: {error}") from error


@dataclass(frozen=True)
class EvaluateConfig:
    """What to evaluate, and how.

    Args:
        checkpoint: a checkpoint of `train.pretrain`, or its exported safetensors.
        manifest: manifest to evaluate on; by default the evaluation manifest of the training.
        decoder: how clips are decoded.
        workers: decode processes per rank; 0 takes the machine's cores divided by the ranks on it.
        micro_batch: clips per forward pass.
        frozen_frames: control: feed each clip's first frame repeated.
        output: file for the metrics as JSON; empty for none.
        output_dir: folder for `quarantine.jsonl`; by default the training's.
    """

    checkpoint: str
    manifest: str = ""
    decoder: Decoder = "auto"
    workers: int = 0
    micro_batch: int = 64
    frozen_frames: bool = False
    output: str = ""
    output_dir: str = ""

    def __post_init__(self) -> None:
        _require(self.workers >= 0, "workers", self.workers, ">= 0 (0: one per core)")
        _require(self.micro_batch >= 1, "micro_batch", self.micro_batch, ">= 1")


def _with_tuples(section: dict[str, Any]) -> dict[str, Any]:
    """Turn lists, which files hold, into the tuples that fields declare."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in section.items()}
