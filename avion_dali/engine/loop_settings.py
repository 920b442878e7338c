"""The settings of the training loop, which do not change during a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from avion_dali.config import OptimConfig, RunConfig, TrainConfig


@dataclass(frozen=True)
class LoopSettings:
    """Settings of a training loop.

    Args:
        output_dir: folder of the run.
        optim: epochs, learning rates, clipping, batch sizes.
        run: seed, precision and intervals.
        config: the whole configuration as plain values, stored in checkpoints and the log.
        decoder: name of the decoder, for the log.
        decoder_reason: why this decoder was chosen, for the header of the log.
        best_metric: evaluation metric that selects `checkpoint_best.pt`; larger is better. Empty for none.
        data: further facts that must be the same when the run is resumed, such as the fingerprint of the
            manifest.
        tensorboard: whether to write TensorBoard curves.
        classes: names of the model's classes in label order, stored with its weights.
    """

    output_dir: Path
    optim: OptimConfig
    run: RunConfig
    config: dict[str, Any] = field(default_factory=dict)
    decoder: str = ""
    decoder_reason: str = ""
    best_metric: str = ""
    data: dict[str, int | float | str] = field(default_factory=dict)
    tensorboard: bool = True
    classes: tuple[str, ...] = ()

    @classmethod
    def from_config(
        cls,
        config: TrainConfig,
        *,
        best_metric: str = "",
        decoder: str = "",
        decoder_reason: str = "",
        data: dict[str, int | float | str] | None = None,
        classes: tuple[str, ...] = (),
    ) -> LoopSettings:
        """Take the parts of a training's configuration that the loop needs.

        Args:
            config: the training's configuration.
            best_metric: see the class.
            decoder: the decoder in use; by default the configured name.
            decoder_reason: see the class.
            data: see the class.
            classes: see the class.

        Returns:
            The settings.
        """
        return cls(
            output_dir=Path(config.output_dir),
            optim=config.optim,
            run=config.run,
            config=asdict(config),
            decoder=decoder or config.decoder,
            decoder_reason=decoder_reason,
            best_metric=best_metric,
            data=data or {},
            classes=classes,
        )

    def order_facts(self) -> dict[str, int | float | str]:
        """Return the facts of these settings that must be the same when the run is resumed."""
        return {**self.data, "seed": self.run.seed, "global_batch": self.optim.global_batch}

    def facts(self) -> dict[str, Any]:
        """Return the facts of these settings that the header of the log contains."""
        return {
            "config": self.config,
            "decoder": self.decoder,
            "decoder_reason": self.decoder_reason,
            "best_metric": self.best_metric,
            "global_batch": self.optim.global_batch,
            "micro_batch": self.optim.micro_batch,
            "learning_rate": self.optim.learning_rate,
        }
