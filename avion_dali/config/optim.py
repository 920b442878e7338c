"""Settings of batches, the optimizer, and the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from avion_dali.config.checks import require


@dataclass(frozen=True)
class OptimConfig:
    """Batch sizes, the optimizer and the learning-rate schedule.

    Args:
        optimizer: `adamw`, `lion` (Chen et al. 2023, arXiv 2302.06675) or `sgd` with momentum `beta1`.
        global_batch: clips per optimizer step over all ranks.
        micro_batch: clips per forward pass on one rank; the number of accumulated micro-batches follows. `auto`
            takes the most that fit into the GPU's memory; the CPU counts as a GPU of 24 GB.
        epochs: passes over the training manifest.
        learning_rate: peak learning rate.
        rate_batch: batch size for which all learning rates are given; they are multiplied by `global_batch` /
            `rate_batch`. 0 uses them unchanged.
        schedule: `cosine` or `constant`, after warm-up.
        warmup_epochs: epochs of linear warm-up from `warmup_learning_rate`; may be fractional.
        warmup_learning_rate: learning rate of the first step.
        final_learning_rate: learning rate at the end of the cosine.
        layer_decay: factor between the learning rates of a block and the next block; 1 for equal rates.
        weight_decay: weight decay of matrices; norms, biases and position tables are exempt.
        beta1: first-moment decay; momentum of SGD.
        beta2: second-moment decay.
        eps: AdamW epsilon.
        clip_grad_norm: largest gradient norm; 0 for no limit.
        ema_decay: decay per step of a running average of the weights, which is then evaluated; 0 for no
            average.
    """

    optimizer: Literal["adamw", "lion", "sgd"] = "adamw"
    global_batch: int = 256
    micro_batch: int | Literal["auto"] = 256
    epochs: int = 5
    learning_rate: float = 3e-5
    rate_batch: int = 0
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_epochs: float = 0.0
    warmup_learning_rate: float = 1e-6
    final_learning_rate: float = 1e-5
    layer_decay: float = 1.0
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_grad_norm: float = 0.0
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        micro = self.micro_batch
        require(micro == "auto" or micro >= 1, "optim.micro_batch", value=micro, allowed=">= 1, or auto")
        require(self.global_batch >= 1, "optim.global_batch", value=self.global_batch, allowed=">= 1")
        require(self.epochs >= 1, "optim.epochs", value=self.epochs, allowed=">= 1")
        require(self.learning_rate > 0, "optim.learning_rate", value=self.learning_rate, allowed="> 0")
        require(
            self.rate_batch >= 0,
            "optim.rate_batch",
            value=self.rate_batch,
            allowed=">= 0 (0: rates as they stand)",
        )
        fits = 0 <= self.warmup_epochs <= self.epochs
        allowed = f"in [0, optim.epochs], and optim.epochs is {self.epochs}"
        require(fits, "optim.warmup_epochs", value=self.warmup_epochs, allowed=allowed)
        for name in ("warmup_learning_rate", "final_learning_rate", "eps"):
            require(getattr(self, name) >= 0, f"optim.{name}", value=getattr(self, name), allowed=">= 0")
        require(
            0 < self.layer_decay <= 1,
            "optim.layer_decay",
            value=self.layer_decay,
            allowed="in (0, 1] (1: none)",
        )
        require(self.weight_decay >= 0, "optim.weight_decay", value=self.weight_decay, allowed=">= 0")
        for name in ("beta1", "beta2", "ema_decay"):
            require(
                0 <= getattr(self, name) < 1, f"optim.{name}", value=getattr(self, name), allowed="in [0, 1)"
            )
        require(
            self.clip_grad_norm >= 0,
            "optim.clip_grad_norm",
            value=self.clip_grad_norm,
            allowed=">= 0 (0: none)",
        )

    @property
    def rate_factor(self) -> float:
        """Factor of all learning rates."""
        return self.global_batch / self.rate_batch if self.rate_batch else 1.0


@dataclass(frozen=True)
class RunConfig:
    """Seed, precision, and intervals of logs, checkpoints and evaluations.

    Args:
        seed: determines every random choice of data, initialization and regularization.
        precision: `auto` uses bf16 on GPUs that support it, fp16 with a gradient scaler on older GPUs, and fp32
            on the CPU.
        sharding: how several ranks hold the model: `replicate` (DDP), or `shard` (FSDP2, which splits
            parameters, gradients and optimizer state into equal parts).
        sharding_dtype: dtype in which `shard` sends the parameters of blocks. `bf16` halves the traffic; the
            blocks then also pass on their tokens in bf16. It needs `precision` bf16. Gradients are added over
            ranks in fp32.
        log_every: optimizer steps between log rows.
        eval_every: epochs between evaluations.
        save_every: optimizer steps between checkpoints within an epoch; 0 saves only at the ends of epochs.
        save_minutes: minutes between checkpoints within an epoch; 0 saves only at the ends of epochs.
        keep_last: number of numbered checkpoints kept in addition to the latest and the best.
        spike_factor: a step whose loss exceeds this multiple of the recent median is a spike; 0 turns the
            check off.
        on_spike: `log` the spike, `skip` the update of that step, or `stop` the run.
        max_steps: stop after this many optimizer steps; 0 trains all epochs.
    """

    seed: int = 0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    sharding: Literal["replicate", "shard"] = "replicate"
    sharding_dtype: Literal["fp32", "bf16"] = "fp32"
    log_every: int = 10
    eval_every: int = 1
    save_every: int = 0
    save_minutes: float = 0.0
    keep_last: int = 0
    spike_factor: float = 0.0
    on_spike: Literal["log", "skip", "stop"] = "log"
    max_steps: int = 0

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, "run.seed", value=self.seed, allowed="in [0, 2^63)")
        require(self.log_every >= 1, "run.log_every", value=self.log_every, allowed=">= 1")
        require(self.eval_every >= 1, "run.eval_every", value=self.eval_every, allowed=">= 1")
        require(
            self.save_every >= 0,
            "run.save_every",
            value=self.save_every,
            allowed=">= 0 (0: at epoch ends only)",
        )
        require(
            self.save_minutes >= 0,
            "run.save_minutes",
            value=self.save_minutes,
            allowed=">= 0 (0: at epoch ends only)",
        )
        require(self.keep_last >= 0, "run.keep_last", value=self.keep_last, allowed=">= 0 (0: none)")
        factor = self.spike_factor
        require(
            factor == 0 or factor > 1, "run.spike_factor", value=factor, allowed="> 1, or 0 to look for none"
        )
        require(self.max_steps >= 0, "run.max_steps", value=self.max_steps, allowed=">= 0 (0: all epochs)")
