"""A decoder, an encoder, an objective, a metric, a crop rule and a dataset that the library does not know.

Each is defined here in one place and registered by one line at the end. Run as a program, it trains with all of
them: `python toy_parts.py train CHUNKS FOLDER STEPS [kill]`; or `python toy_parts.py evaluate FOLDER`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from avion_dali.assembly.evaluators import evaluate_checkpoint
from avion_dali.assembly.training import training
from avion_dali.cli.main import main as avion_dali
from avion_dali.cli.manifest import DATASETS, Dataset, add_common_arguments
from avion_dali.config import (
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from avion_dali.contracts import ClipBatch, ClipRequest, CropWindow
from avion_dali.data.crops import CROPS
from avion_dali.datasets.building import AnnotationRow, manifest_build
from avion_dali.decode import cpu_fused
from avion_dali.decode.decoders import CPU_DECODERS
from avion_dali.device_ops.normalize import normalize_frames
from avion_dali.device_ops.step_key import StepKey
from avion_dali.engine.distributed import Distributed
from avion_dali.metrics.accuracy import CLASS_METRICS
from avion_dali.models.blocks import NamedPatchEmbedding, VideoEncoder, init_linear_layers
from avion_dali.models.layout import TowerLayout
from avion_dali.models.residual import run_blocks
from avion_dali.models.starting_weights import open_start
from avion_dali.models.towers import ENCODERS
from avion_dali.models.videomae import build_blocks
from avion_dali.objectives.clips import batch_augmentation, compute_dtype
from avion_dali.tasks.recognition import CLASSIFICATION
from avion_dali.tasks.table import TASKS


def decode_inverted(request: ClipRequest, frames_VTHWC: np.ndarray) -> None:
    """A decoder: negatives of the pictures."""
    cpu_fused.decode_clip(request, frames_VTHWC)
    np.subtract(255, frames_VTHWC, out=frames_VTHWC)


class MeanTower(VideoEncoder):
    """An encoder: patches of all frames with learned places, two blocks, and their mean."""

    layout = TowerLayout(
        blocks="blocks",
        stem=("patch_embed",),
        tokens=(),
        frame_positions=(),
        place_positions=("where",),
        patches="patch_embed.proj.weight",
    )

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.patch_embed = NamedPatchEmbedding(config.patch_size, config.width)
        self.where = nn.Parameter(torch.zeros(config.patches_per_frame, config.width))
        self.blocks = build_blocks(replace(config, layers=2))
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.add_projection()
        init_linear_layers(self)
        self.init_projection()

    def features(self, frames_BCTHW: Tensor) -> Tensor:
        x_BND = self.patch_embed(frames_BCTHW) + self.where.repeat(frames_BCTHW.shape[2], 1)
        return self.norm(run_blocks(self.blocks, x_BND, checkpoint_every=0).mean(dim=1))


class Hinge:
    """An objective: the right class must score higher than all others by one."""

    couples_samples = False

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def outputs(self, model: nn.Module, batch: ClipBatch, key: StepKey) -> tuple[Tensor, Tensor]:
        assert batch.labels_B is not None
        config = self.config
        frames_BCTHW = normalize_frames(
            batch.frames_BTHWC,
            config.data.normalization,
            dtype=compute_dtype(batch.frames_BTHWC.device),
            augmentation=batch_augmentation(batch, config.augment, key=key),
        )
        return model(frames_BCTHW), batch.labels_B

    def loss(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        return nn.functional.multi_margin_loss(outputs[0].float(), outputs[1]), {}


def mean_reciprocal_rank(scores_NK: np.ndarray, label_N: np.ndarray) -> float:
    """A metric: the mean of 1 / rank of the right class."""
    own_N1 = np.take_along_axis(scores_NK, label_N[:, None], axis=1)
    return float((1 / (scores_NK >= own_N1).sum(axis=1)).mean())


def left_square(width: int, height: int, options: Any, rng: np.random.Generator) -> CropWindow:
    """A crop rule: the left end of the picture, a little smaller at random."""
    side = min(width, height) // 2 * 2 - 2 * int(rng.integers(0, 3))
    return CropWindow(0, 0, side, side)


def build_parity(options: Any, settings: Any) -> Any:
    """A dataset: lines `video second`, labelled by whether the second is even."""
    from avion_dali.data.classes import ClassTable

    lines = [line.split() for line in options.annotations.read_text().splitlines()]
    with manifest_build(settings) as build:
        rows = (
            AnnotationRow(number, video, int(second), int(second) + 1, label=int(second) % 2)
            for number, (video, second) in enumerate(lines, start=1)
        )
        return build.finish(build.place(rows), source="parity", classes=ClassTable(("even", "odd")))


CPU_DECODERS["inverted"] = decode_inverted
ENCODERS["mean"] = MeanTower
TASKS["hinge"] = replace(CLASSIFICATION, build_objective=lambda config, model, manifest: Hinge(config))
CLASS_METRICS["mrr"] = mean_reciprocal_rank
CROPS["left-square"] = left_square
DATASETS["parity"] = Dataset(
    "lines `video second`", lambda parser: add_common_arguments(parser, annotations="file"), build_parity
)


def config_of(folder: Path) -> TrainConfig:
    """A training that uses every part."""
    return TrainConfig(
        output_dir=str(folder / "run"),
        decoder="inverted",
        data=DataConfig(
            train_manifest=str(folder / "m"),
            eval_manifest=str(folder / "m"),
            num_frames=2,
            frame_size=32,
            crop="left-square",
            workers=1,
        ),
        model=ModelConfig(encoder="mean", size="tiny"),
        objective=ObjectiveConfig(name="hinge"),
        optim=OptimConfig(global_batch=4, micro_batch=4, epochs=1, learning_rate=1e-3, layer_decay=0.5),
        run=RunConfig(log_every=1, save_every=1),
    )


def make_manifest(chunks: Path, folder: Path) -> None:
    """Twelve clips of the chunks' videos, through the command line."""
    videos = sorted(path.stem for path in chunks.iterdir())
    lines = [f"{video} {second}" for video in videos for second in range(12 // len(videos))]
    (folder / "list.txt").write_text("\n".join(lines))
    where = ["--chunks", str(chunks), "--annotations", str(folder / "list.txt"), "--output", str(folder / "m")]
    assert avion_dali(["manifest", "parity", *where, "--jobs", "1"]) == 0


def train(chunks: Path, folder: Path, steps: int, *, kill: bool) -> None:
    """Train up to a step; with `kill`, die there without a word."""
    torch.set_num_threads(1)
    if not (folder / "m").exists():
        make_manifest(chunks, folder)
    with training(config_of(folder), Distributed()) as loop:
        if kill:
            save = loop.checkpointer.save_latest

            def save_and_die() -> None:
                save()
                if loop.step == steps:
                    os.kill(os.getpid(), signal.SIGKILL)

            loop.checkpointer.save_latest = save_and_die  # type: ignore[method-assign]
        loop.run()


def evaluate(folder: Path) -> None:
    """Print what the exported weights are, and their metrics."""
    weights = str(folder / "run" / "weights.safetensors")
    start = open_start(weights)
    options = EvaluateConfig(weights, decoder="inverted", workers=1, micro_batch=5)
    metrics = evaluate_checkpoint(options, Distributed()).metrics()
    found = {"encoder": start.facts.encoder, "classes": start.classes, "metrics": metrics}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1] == "evaluate":
        evaluate(Path(sys.argv[2]))
    else:
        train(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), kill=sys.argv[5:] == ["kill"])
