"""Builds the evaluation of a model during training, or of a file of weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from avion_dali.assembly.class_agreement import require_classes_of_weights
from avion_dali.assembly.open_clips import open_pool
from avion_dali.assembly.resolve import ResolvedRun, resolve
from avion_dali.assembly.run_clips import open_run_clips
from avion_dali.assembly.run_model import load_model
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
    run: ResolvedRun, model: nn.Module, *, manifest: Manifest, pool: WorkerPool
) -> Iterator[Evaluator]:
    """Open an evaluator, which scores the current weights of a model each time it is called.

    Args:
        run: the resolved configuration.
        model: the bare model.
        manifest: the evaluation manifest.
        pool: processes that decode.

    Yields:
        A function that scores the model; its argument transforms the frames, None leaves them unchanged.

    Raises:
        UserError: when the manifest lacks what the evaluation needs.
    """
    scorer = run.task.build_scorer(run.config, model, manifest)
    # All evaluations share one loader, because workers keep the shared memory of every loader they have served.
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
    """Load a checkpoint and evaluate it with the configuration that it contains.

    Args:
        options: the checkpoint, the manifest, and how to decode.
        distributed: this process among all processes of the run.

    Raises:
        UserError: when the file or the manifest cannot be used.
    """
    start = open_start(options.checkpoint)
    if start.facts.role == "video-tower":
        raise UserError(f"{start.source} contains only a video tower; train or fine-tune from it first")
    config = evaluation_config(trained_config(start), options)
    folder = options.manifest or config.data.eval_manifest
    if not folder:
        raise UserError(f"{options.checkpoint} was trained without an evaluation manifest; give --manifest")
    manifest = Manifest(folder)
    require_same_inputs(manifest)
    run = resolve(config, distributed, start)
    if options.frozen_frames and not run.task.has_frozen_control:
        raise UserError("frozen_frames applies only to recognition and retrieval models; remove this option")
    if start.facts.num_classes:
        require_classes_of_weights(config, manifest, start=start)
    model = load_model(run, start)
    if distributed.is_main:
        _log.info("%s", "\n".join(run.lines()))
    with open_pool(run.config.data) as pool, open_evaluator(run, model, manifest=manifest, pool=pool) as score:
        return score(freeze_first_frame if options.frozen_frames else None)


def trained_config(start: StartWeights) -> TrainConfig:
    """Return the configuration that weights were trained with, as far as the file specifies it.

    Args:
        start: weights of this project or another.

    Raises:
        UserError: when no `model.size` has the dimensions of the weights.
    """
    config, facts = start.config or plain_config(start.facts), start.facts
    if not config:
        raise UserError(
            f"{start.source} has width {facts.width}, {facts.layers} blocks and patches of {facts.patch_size} "
            f"pixels, which matches no model.size ({', '.join(PRESETS)}); it cannot be evaluated"
        )
    trained = TrainConfig.from_plain(config)
    return trained if start.config else replace(trained, output_dir="runs/evaluate")


def evaluation_config(trained: TrainConfig, options: EvaluateConfig) -> TrainConfig:
    """Return the configuration of a training with the options of an evaluation applied.

    Args:
        trained: the training's configuration.
        options: the options; zeros and empty strings keep the values of the training.
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
        dali=options.dali,
        output_dir=options.output_dir or trained.output_dir,
        data=data,
        # The evaluation may run on another kind of device than the training.
        model=replace(trained.model, temporal_resize="interpolate", attention="auto"),
        optim=replace(trained.optim, micro_batch=options.micro_batch),
        # fp16 is for GPUs without bf16, and the evaluation may run on another device.
        run=replace(trained.run, precision="auto") if trained.run.precision == "fp16" else trained.run,
    )
