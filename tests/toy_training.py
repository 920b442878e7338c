"""Toy parts for the engine's tests: a model with dropout, two objectives, and a loader of made-up batches.

A batch is a function of (step, micro-batch, rank), as the real loaders' are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from avion_dali.config import OptimConfig, RunConfig
from avion_dali.contracts import ClipBatch
from avion_dali.device_ops.step_key import StepKey
from avion_dali.engine.accumulate import micro_seed
from avion_dali.engine.loop import TrainLoop
from avion_dali.engine.loop_settings import LoopSettings
from avion_dali.engine.optimizers import build_optimizer, parameter_groups
from avion_dali.objectives.gather import gather_with_grad

ROWS, TOKENS = 4, 5


class ToyModel(nn.Module):
    """Two small towers with dropout and a learned scale."""

    def __init__(self) -> None:
        super().__init__()
        self.video = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Dropout(0.3), nn.Linear(16, 8))
        self.text = nn.Sequential(nn.Embedding(11, 16), nn.Dropout(0.3), nn.Linear(16, 8))
        self.logit_scale = nn.Parameter(torch.tensor(1.5))
        self.forwards = 0

    def forward(
        self, frames_BTHWC: torch.Tensor, tokens_BL: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        self.forwards += 1
        video_BD = functional.normalize(self.video(frames_BTHWC.flatten(1).float() / 128 - 1), dim=-1)
        text_BD = functional.normalize(self.text(tokens_BL).mean(dim=1), dim=-1)
        return video_BD, text_BD, self.logit_scale.exp().float().expand(len(video_BD))


class ToyContrastive:
    """InfoNCE over all samples of a step."""

    couples_samples = True

    def outputs(self, model: nn.Module, batch: ClipBatch, key: StepKey) -> tuple[torch.Tensor, ...]:
        return model(batch.frames_BTHWC, batch.tokens_BL)

    def loss(self, outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        video_BD, text_BD, scale_B = outputs
        video_GD, text_GD = gather_with_grad(torch.cat([video_BD, text_BD], dim=1)).chunk(2, dim=1)
        logits_GG = scale_B.mean() * video_GD @ text_GD.t()
        target_G = torch.arange(len(logits_GG))
        loss = functional.cross_entropy(logits_GG, target_G) + functional.cross_entropy(logits_GG.t(), target_G)
        return loss / 2, {"logit_scale": scale_B.mean().detach()}


class ToySamplewise:
    """A loss that is a mean over samples."""

    couples_samples = False

    def outputs(self, model: nn.Module, batch: ClipBatch, key: StepKey) -> tuple[torch.Tensor, ...]:
        video_BD, text_BD, scale_B = model(batch.frames_BTHWC, batch.tokens_BL)
        return (((video_BD - text_BD) ** 2).sum(dim=1) * scale_B,)

    def loss(self, outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, dict[str, float]]:
        return outputs[0].mean(), {"constant": 2.0}


@dataclass
class ToyStats:
    delivered: int = 0
    replaced: int = 0
    decoded_on_cpu: int = 0
    failures: dict[str, int] = field(default_factory=dict)


def toy_batch(step: int, micro: int, rank: int = 0) -> ClipBatch:
    first = ((step * 8 + micro) * 4 + rank) * ROWS
    rng = np.random.default_rng((step, micro, rank))
    return ClipBatch(
        frames_BTHWC=torch.from_numpy(rng.integers(0, 255, (ROWS, 1, 2, 2, 3), dtype=np.uint8)),
        tokens_BL=torch.from_numpy(rng.integers(0, 11, (ROWS, TOKENS))),
        labels_B=None,
        sample_ids=np.arange(first, first + ROWS),
        view_ids=np.zeros(ROWS, dtype=np.int64),
        valid=np.ones(ROWS, dtype=bool),
    )


@dataclass
class ToyLoader:
    steps_per_epoch: int = 3
    accum_steps: int = 1
    rank: int = 0
    stats: ToyStats = field(default_factory=ToyStats)
    closed: int = 0
    asked: list[int] = field(default_factory=list)

    def batches(self, first_step: int, last_step: int):
        for step in range(first_step, last_step):
            self.asked.append(step)
            for micro in range(self.accum_steps):
                self.stats.delivered += ROWS
                yield toy_batch(step, micro, self.rank)

    def close(self) -> None:
        self.closed += 1


def make_settings(folder: Path, **run: object) -> LoopSettings:
    optim = OptimConfig(global_batch=ROWS, micro_batch=ROWS, epochs=2, learning_rate=0.01, weight_decay=0.1)
    return LoopSettings(
        output_dir=folder,
        optim=optim,
        run=RunConfig(seed=3, log_every=1, **run),
        config={"note": "toy"},
        decoder="toy",
        best_metric="score",
        tensorboard=False,
    )


def make_loop(
    folder: Path, *, objective=None, loader=None, settings=None, distributed=None, **more
) -> TrainLoop:
    torch.manual_seed(7)
    model = ToyModel()
    settings = settings or make_settings(folder)
    return TrainLoop(
        model,
        build_optimizer(parameter_groups(model, settings.optim.weight_decay), settings.optim),
        objective=objective or ToyContrastive(),
        loader=loader or ToyLoader(),
        settings=settings,
        distributed=distributed,
        **more,
    )


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], atol: float = 0.0) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=atol, msg=name)


def gradients_after_one_step(train_loop: TrainLoop) -> dict[str, torch.Tensor]:
    (_,) = train_loop.steps(0, 1)
    return {name: p.grad.clone() for name, p in train_loop.model.named_parameters()}


def reference_gradients(objective, *, micro_batches: int, ranks: int = 1) -> dict[str, torch.Tensor]:
    """One large batch: the graphs of all micro-batches of all ranks at once, one loss, one backward."""
    torch.manual_seed(7)
    model = ToyModel().train()
    outputs = []
    for rank in range(ranks):
        for micro in range(micro_batches):
            torch.manual_seed(micro_seed(3, 0, rank=rank, micro=micro))
            outputs.append(objective.outputs(model, toy_batch(0, micro, rank), StepKey(3, 0)))
    loss, _ = objective.loss(tuple(torch.cat(parts) for parts in zip(*outputs, strict=True)))
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}
