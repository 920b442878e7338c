"""Configurations of the training and evaluation commands."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from avion_dali.config.checks import require
from avion_dali.config.dali import DaliConfig
from avion_dali.config.data import AugmentConfig, DataConfig
from avion_dali.config.model import ModelConfig
from avion_dali.config.objective import ObjectiveConfig
from avion_dali.config.optim import OptimConfig, RunConfig
from avion_dali.contracts import UserError


@dataclass(frozen=True)
class TrainConfig:
    """Configuration of a training.

    Args:
        output_dir: folder of this run for checkpoints, logs and the report.
        decoder: how clips are decoded: `dali`, `cpu-fused`, `paper-fused`, `reference`, or `auto`, which
            selects `dali` if NVDEC works and `cpu-fused` otherwise.
        resume: `auto` continues from the checkpoint in `output_dir` if there is one, `never` rejects such a
            folder.
        data: manifests, and how clips are drawn and loaded.
        dali: graphs, threads and waiting of `decoder` dali.
        augment: augmentation of clips on the device.
        model: the model.
        objective: the objective and its settings.
        optim: batch sizes and optimizer.
        run: seed, precision and intervals.
    """

    output_dir: str = "runs/pretrain"
    decoder: str = "auto"
    resume: Literal["auto", "never"] = "auto"
    data: DataConfig = field(default_factory=DataConfig)
    dali: DaliConfig = field(default_factory=DaliConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> TrainConfig:
        """Rebuild a configuration from the plain values in a checkpoint.

        Args:
            values: output of `dataclasses.asdict` for a configuration.

        Raises:
            UserError: when this version does not have one of the keys.
        """
        try:
            built: TrainConfig = _from_plain(cls, values)
        except TypeError as error:
            raise UserError(
                f"the checkpoint's configuration belongs to another version of avion_dali: {error}"
            ) from error
        return built


@dataclass(frozen=True)
class EvaluateConfig:
    """Configuration of an evaluation.

    Args:
        checkpoint: a checkpoint of a training, or its exported safetensors file.
        manifest: manifest to evaluate on; by default the evaluation manifest of the training.
        decoder: how clips are decoded, see `TrainConfig`.
        dali: graphs, threads and waiting of `decoder` dali.
        workers: decode processes per rank; 0 uses the machine's cores divided by the ranks on it.
        micro_batch: clips per forward pass.
        num_frames: frames per clip; 0 uses the value of the training. Position tables are interpolated.
        eval_clips: clips per row; 0 uses the value of the training.
        eval_crops: crop windows per clip, 1 or 3; 0 uses the value of the training.
        frozen_frames: control experiment that repeats each clip's first frame.
        output: file for the metrics as JSON; empty for none.
        output_dir: folder for `quarantine.jsonl`; by default the training's.
    """

    checkpoint: str
    manifest: str = ""
    decoder: str = "auto"
    dali: DaliConfig = field(default_factory=DaliConfig)
    workers: int = 0
    micro_batch: int = 64
    num_frames: int = 0
    eval_clips: int = 0
    eval_crops: Literal[0, 1, 3] = 0
    frozen_frames: bool = False
    output: str = ""
    output_dir: str = ""

    def __post_init__(self) -> None:
        require(self.workers >= 0, "workers", value=self.workers, allowed=">= 0 (0: one per core)")
        require(self.micro_batch >= 1, "micro_batch", value=self.micro_batch, allowed=">= 1")
        require(self.num_frames >= 0, "num_frames", value=self.num_frames, allowed=">= 0 (0: as trained)")
        require(self.eval_clips >= 0, "eval_clips", value=self.eval_clips, allowed=">= 0 (0: as trained)")


def _from_plain(kind: Any, values: dict[str, Any]) -> Any:
    """Build a dataclass from plain values; sections become dataclasses, and lists become tuples."""
    types = typing.get_type_hints(kind)

    def built(name: str, value: Any) -> Any:
        if dataclasses.is_dataclass(types.get(name)):
            return _from_plain(types[name], value)
        return tuple(value) if isinstance(value, list) else value

    return kind(**{name: built(name, value) for name, value in values.items()})
