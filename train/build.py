"""Puts the parts of a run together: configuration in, `TrainLoop` or evaluation out."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from torch import nn

from avion_dali.config import EvaluateConfig, TrainConfig
from avion_dali.contracts import UserError
from avion_dali.data.manifest import Manifest
from avion_dali.engine.checkpoint import export_safetensors, find_checkpoint
from avion_dali.engine.distributed import Distributed, require_agreement
from avion_dali.engine.evaluate import FramesTransform, freeze_first_frame
from avion_dali.engine.loop import TrainLoop
from avion_dali.engine.optim import build_optimizer, describe_rates, parameter_groups
from avion_dali.engine.settings import LoopSettings
from avion_dali.models.start import apply_start, open_start, settle
from train.loaders import Loaders
from train.tasks import BEST_METRIC, EvaluationResult, Task, build_evaluation, build_model, build_task, class_count

Evaluator = Callable[[FramesTransform | None], EvaluationResult]


@contextmanager
def training(config: TrainConfig, distributed: Distributed) -> Iterator[TrainLoop]:
    """Build a training, resumed where its folder holds a checkpoint.

    Args:
        config: the run's configuration.
        distributed: this rank among all.

    Yields:
        The loop, ready to run.

    Raises:
        UserError: when a manifest, the weights to start from or a checkpoint do not fit.
    """
    if not config.data.train_manifest:
        raise UserError("config: data.train_manifest is not set; make one with `avion-dali manifest captions`")
    output_dir = Path(config.output_dir)
    latest = find_checkpoint(output_dir, config.resume)
    train_manifest = Manifest(config.data.train_manifest)
    eval_manifest = Manifest(config.data.eval_manifest) if config.data.eval_manifest else None
    _require_same_classes(train_manifest, eval_manifest)
    config, task = _start(config, train_manifest, distributed, fresh=latest is None)
    loaders = Loaders(config, distributed)
    try:
        loop = _build_loop(config, task, loaders, (train_manifest, eval_manifest))
        if latest is not None:
            loop.restore(latest)
        weights = sum(float(p.detach().double().abs().sum()) for p in task.model.parameters())
        require_agreement({"step": loop.step, "sum of all weights": weights, **loop.order})
        yield loop
        if distributed.is_main:
            header = {"config": asdict(config), "classes": classes_fingerprint(train_manifest)}
            export_safetensors(task.model, output_dir / "weights.safetensors", header)
    finally:
        loaders.close()


def _start(
    config: TrainConfig, manifest: Manifest, distributed: Distributed, *, fresh: bool
) -> tuple[TrainConfig, Task]:
    """Settle what the weights to start from decide, build the task and, for a fresh run, load them."""
    start = open_start(config.model.weights) if config.model.weights else None
    config = replace(config, model=settle(config.model, start.facts if start else None))
    task = build_task(config, manifest, distributed.device)
    if start and fresh:
        report = apply_start(task.model, start, temporal_resize=config.model.temporal_resize)
        if distributed.is_main:
            print(report.describe(), file=sys.stderr)
    return config, task


def _build_loop(
    config: TrainConfig, task: Task, loaders: Loaders, manifests: tuple[Manifest, Manifest | None]
) -> TrainLoop:
    train_manifest, eval_manifest = manifests
    evaluate = evaluator(config, task.model, loaders, eval_manifest) if eval_manifest else None
    settings = LoopSettings.from_config(
        config,
        best_metric=BEST_METRIC[config.objective.name] if evaluate else "",
        decoder=loaders.decoder.name,
        decoder_reason=loaders.decoder.reason,
        data=resume_facts(config, train_manifest, eval_manifest),
    )
    return TrainLoop(
        task.model,
        build_optimizer(parameter_groups(task.model, config.optim), config.optim),
        objective=task.objective,
        loader=loaders.training(train_manifest),
        settings=settings,
        distributed=loaders.distributed,
        evaluate=(lambda: evaluate(None).metrics()) if evaluate else None,
        after_step=task.after_step,
    )


def evaluator(config: TrainConfig, model: nn.Module, loaders: Loaders, manifest: Manifest) -> Evaluator:
    """Return a function that scores the model as it stands; its argument changes the frames.

    Args:
        config: the run's configuration.
        model: the bare model.
        loaders: this rank's loaders.
        manifest: the evaluation manifest.
    """
    evaluate = build_evaluation(config, model, manifest, loaders.distributed)
    # One loader for all evaluations: workers keep the shared memory of every loader they have served.
    loader = loaders.evaluation(manifest)
    return lambda transform: evaluate(loader.batches(0, loader.steps_per_epoch), transform)


def resume_facts(
    config: TrainConfig, train_manifest: Manifest, eval_manifest: Manifest | None
) -> dict[str, int | float | str]:
    """Return what must not change when a run is resumed: its data, and what its weights mean.

    Args:
        config: the run's configuration.
        train_manifest: the training manifest.
        eval_manifest: the evaluation manifest, whose scores the best checkpoint is chosen by.
    """
    data = ("num_frames", "frame_size", "normalization", "sampling", "stride", "repeats")
    return {
        "data.train_manifest": train_manifest.fingerprint,
        "data.eval_manifest": eval_manifest.fingerprint if eval_manifest else 0,
        **{f"data.{name}": getattr(config.data, name) for name in data},
        "objective.name": config.objective.name,
        "model.encoder": config.model.encoder,
        "model.activation": config.model.activation,
        "model.norm_eps": config.model.norm_eps,
        "classes": classes_fingerprint(train_manifest),
    }


def classes_fingerprint(manifest: Manifest) -> int:
    """Return a checksum of a manifest's class names in label order; 0 without classes.

    Args:
        manifest: a manifest.
    """
    return zlib.crc32("\n".join(manifest.classes.names).encode()) if manifest.classes else 0


def _require_same_classes(train_manifest: Manifest, eval_manifest: Manifest | None) -> None:
    if eval_manifest and classes_fingerprint(train_manifest) != classes_fingerprint(eval_manifest):
        raise UserError(
            f"{train_manifest.folder} and {eval_manifest.folder} number their classes differently; build the "
            "held-out manifest with `--classes-from` the training manifest"
        )


def evaluate_checkpoint(options: EvaluateConfig, distributed: Distributed) -> EvaluationResult:
    """Load a checkpoint and evaluate it as its own configuration says.

    Args:
        options: the checkpoint, the manifest, and how to decode.
        distributed: this rank among all.

    Raises:
        UserError: when the file or the manifest cannot be used.
    """
    start = open_start(options.checkpoint)
    config = evaluation_config(TrainConfig.from_plain(start.config), options)
    folder = options.manifest or config.data.eval_manifest
    if not folder:
        raise UserError(f"{options.checkpoint} was trained without an evaluation manifest; give --manifest")
    manifest = Manifest(folder)
    num_classes = class_count(manifest) if config.objective.name == "classification" else 0
    model = build_model(config, distributed.device, num_classes=num_classes)
    apply_start(model, start, temporal_resize=config.model.temporal_resize)
    model.eval()
    loaders = Loaders(config, distributed)
    if distributed.is_main:
        print(f"decoder: {loaders.decoder.name} ({loaders.decoder.reason})", file=sys.stderr)
    try:
        evaluate = evaluator(config, model, loaders, manifest)
        return evaluate(freeze_first_frame if options.frozen_frames else None)
    finally:
        loaders.close()


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
        optim=replace(trained.optim, micro_batch=options.micro_batch),
    )
