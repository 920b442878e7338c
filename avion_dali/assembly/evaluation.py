"""Assembles an evaluation: of a model in training, or of a file of weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from avion_dali.assembly.class_agreement import require_classes_of_weights
from avion_dali.assembly.model import load_model
from avion_dali.assembly.open_clips import open_pool
from avion_dali.assembly.resolve import ResolvedRun, resolve
from avion_dali.assembly.run_clips import open_run_clips
from avion_dali.config import EvaluateConfig, TrainConfig
from avion_dali.contracts import UserError
from avion_dali.data.manifest import Manifest
from avion_dali.engine.agreement import require_same_inputs
from avion_dali.engine.distributed import Distributed
from avion_dali.loading.pool import WorkerPool
from avion_dali.models.implied_config import plain_config
from avion_dali.models.presets import PRESETS
from avion_dali.models.starting_weights import StartWeights, open_start
from avion_dali.tasks.evaluation import EvaluationResult, FramesTransform, evaluate, freeze_first_frame

Evaluator = Callable[[FramesTransform | None], EvaluationResult]

_log = logging.getLogger(__name__)


@contextmanager
def open_evaluator(
    run: ResolvedRun, model: nn.Module, manifest: Manifest, *, pool: WorkerPool
) -> Iterator[Evaluator]:
    """Open what scores a model as it stands, as often as asked.

    Args:
        run: the resolved configuration.
        model: the bare model.
        manifest: the evaluation manifest.
        pool: processes that decode.

    Yields:
        A function that scores the model; its argument changes the frames, None leaves them.

    Raises:
        UserError: when the manifest lacks what the evaluation needs.
    """
    scorer = run.task.build_scorer(run.config, model, manifest)
    # One loader for all evaluations: workers keep the shared memory of every loader they have served.
    with open_run_clips(run, manifest, training=False, pool=pool) as loader:

        def score(transform: FramesTransform | None) -> EvaluationResult:
            loader.set_epoch(0)
            result: EvaluationResult = evaluate(
                model,
                loader,
                scorer,
                precision=run.precision,
                distributed=run.distributed,
                transform=transform,
            )
            return result

        yield score


def evaluate_checkpoint(options: EvaluateConfig, distributed: Distributed) -> EvaluationResult:
    """Load a checkpoint and evaluate it as its own configuration says.

    Args:
        options: the checkpoint, the manifest, and how to decode.
        distributed: this rank among all.

    Raises:
        UserError: when the file or the manifest cannot be used.
    """
    start = open_start(options.checkpoint)
    if start.facts.role == "video-tower":
        raise UserError(f"{start.source} holds a video tower alone; train or fine-tune from it first")
    config = evaluation_config(trained_config(start), options)
    folder = options.manifest or config.data.eval_manifest
    if not folder:
        raise UserError(f"{options.checkpoint} was trained without an evaluation manifest; give --manifest")
    manifest = Manifest(folder)
    require_same_inputs(manifest)
    run = resolve(config, distributed, start)
    if options.frozen_frames and not run.task.has_frozen_control:
        raise UserError("frozen_frames is for models that recognise or retrieve; leave it out")
    if start.facts.num_classes:
        require_classes_of_weights(config, manifest, start)
    model = load_model(run, start)
    if distributed.is_main:
        _log.info("%s", "\n".join(run.lines()))
    with open_pool(run.config.data) as pool, open_evaluator(run, model, manifest, pool=pool) as score:
        return score(freeze_first_frame if options.frozen_frames else None)


def trained_config(start: StartWeights) -> TrainConfig:
    """Return the configuration that weights were trained with, as far as they tell.

    Args:
        start: weights of this project or another.

    Raises:
        UserError: when their dimensions are no model.size.
    """
    config, facts = start.config or plain_config(start.facts), start.facts
    if not config:
        raise UserError(
            f"{start.source} has width {facts.width}, {facts.layers} blocks and patches of {facts.patch_size} "
            f"pixels, which is no model.size ({', '.join(PRESETS)}); it cannot be used here"
        )
    trained = TrainConfig.from_plain(config)
    return trained if start.config else replace(trained, output_dir="runs/evaluate")


def evaluation_config(trained: TrainConfig, options: EvaluateConfig) -> TrainConfig:
    """Return the configuration of a training, changed as an evaluation asks.

    Args:
        trained: the training's configuration.
        options: what to change; zeros and empty texts change nothing.
    """
    data = replace(
        trained.data,
        workers=options.workers,
        num_frames=options.num_frames or trained.data.num_frames,
        eval_clips=options.eval_clips or trained.data.eval_clips,
        eval_crops=options.eval_crops or trained.data.eval_crops,
    )
    return replace(
        trained,
        decoder=options.decoder,
        output_dir=options.output_dir or trained.output_dir,
        data=data,
        # The device may be another than that of the training.
        model=replace(trained.model, temporal_resize="interpolate", attention="auto"),
        optim=replace(trained.optim, micro_batch=options.micro_batch),
        # fp16 is for GPUs without bf16: the device of the evaluation may be another.
        run=replace(trained.run, precision="auto") if trained.run.precision == "fp16" else trained.run,
    )
