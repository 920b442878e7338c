"""Puts the parts of a run together: configuration in, `TrainLoop` or evaluation out."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import nn

from avion_dali.assembly.loaders import Loaders
from avion_dali.assembly.tasks import (
    BEST_METRIC,
    EvaluationResult,
    Task,
    build_evaluation,
    build_model,
    build_task,
    class_table,
)
from avion_dali.config import EvaluateConfig, TrainConfig
from avion_dali.contracts import UserError
from avion_dali.data.manifest import Manifest
from avion_dali.engine.checkpoint import find_checkpoint, load_checkpoint
from avion_dali.engine.distributed import Distributed, require_agreement
from avion_dali.engine.evaluate import FramesTransform, freeze_first_frame
from avion_dali.engine.loop import TrainLoop
from avion_dali.engine.optim import build_optimizer, parameter_groups
from avion_dali.engine.settings import LoopSettings
from avion_dali.engine.sharding import shard_model, weight_sum
from avion_dali.models.implied_config import plain_config
from avion_dali.models.presets import PRESETS
from avion_dali.models.starting_weights import StartReport, StartWeights, apply_start, open_start
from avion_dali.models.towers import resolve_model

Evaluator = Callable[[FramesTransform | None], EvaluationResult]

_SAME_CLASSES = "--classes-from the training manifest; for kinetics --class-names, the same file for both"


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
        raise UserError("config: data.train_manifest is not set; make one with `avion-dali manifest`")
    output_dir = Path(config.output_dir)
    latest = find_checkpoint(output_dir, config.resume)
    train_manifest = Manifest(config.data.train_manifest)
    eval_manifest = Manifest(config.data.eval_manifest) if config.data.eval_manifest else None
    if config.objective.name == "classification" and eval_manifest:
        require_same_classes(train_manifest, eval_manifest)
    config, task = _start(config, train_manifest, distributed, latest)
    loaders = Loaders(config, distributed)
    try:
        loop = _build_loop(config, task, loaders, (train_manifest, eval_manifest))
        if latest is not None:
            loop.restore(latest)
        require_agreement({"step": loop.step, "sum of all weights": weight_sum(task.model), **loop.order})
        yield loop
        if loop.step >= loop.last_step:
            loop.export(output_dir / "weights.safetensors")
    finally:
        loaders.close()


def _start(
    config: TrainConfig, manifest: Manifest, distributed: Distributed, latest: Path | None
) -> tuple[TrainConfig, Task]:
    """Settle what weights decide and build the task; a fresh run is filled with the weights it starts from.

    A run that goes on is settled by its checkpoint: what it once started from need not exist any more.
    """
    start = _open_checkpoint(latest) if latest else None
    if config.model.weights and not latest:
        start = open_start(config.model.weights)
    config = replace(config, model=resolve_model(config.model, start.facts if start else None))
    task = build_task(config, manifest, distributed.device)
    if start and not latest:
        report = fill_model(task.model, start, config)
        if distributed.is_main:
            print("\n".join(report.lines()), file=sys.stderr)
    shard_model(task.model, config.run, distributed)
    return config, task


def _open_checkpoint(latest: Path) -> StartWeights:
    """Open a checkpoint without reading its tensors; of a damaged one `load_checkpoint` knows what to say."""
    try:
        return open_start(str(latest))
    except UserError:
        load_checkpoint(latest)
        raise


def fill_model(model: nn.Module, start: StartWeights, config: TrainConfig) -> StartReport:
    """Load weights into the model of a configuration; positions are fitted to its frames.

    Args:
        model: as the configuration describes it.
        start: the weights.
        config: the run's configuration.
    """
    activation = resolve_model(config.model).activation
    assert activation != "auto"
    return apply_start(
        model,
        start,
        temporal_resize=config.model.temporal_resize,
        normalization=config.data.normalization,
        activation=activation,
    )


def _build_loop(
    config: TrainConfig, task: Task, loaders: Loaders, manifests: tuple[Manifest, Manifest | None]
) -> TrainLoop:
    train_manifest, eval_manifest = manifests
    groups = parameter_groups(task.model, config.optim.weight_decay, layer_decay=config.optim.layer_decay)
    evaluate = evaluator(config, task.model, loaders, eval_manifest) if eval_manifest else None
    settings = LoopSettings.from_config(
        config,
        best_metric=BEST_METRIC[config.objective.name] if evaluate else "",
        decoder=loaders.decoder.name,
        decoder_reason=loaders.decoder.reason,
        data=resume_facts(config, train_manifest, eval_manifest),
        classes=class_table(train_manifest).names if config.objective.name == "classification" else (),
    )
    return TrainLoop(
        task.model,
        build_optimizer(groups, config.optim),
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
        "optim.optimizer": config.optim.optimizer,
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


def require_same_classes(train_manifest: Manifest, eval_manifest: Manifest) -> None:
    """Refuse an evaluation whose labels mean other classes than the training's.

    Args:
        train_manifest: the training manifest.
        eval_manifest: the evaluation manifest.

    Raises:
        UserError: when their classes differ, or one has none.
    """
    class_table(train_manifest)
    class_table(eval_manifest)
    if classes_fingerprint(train_manifest) != classes_fingerprint(eval_manifest):
        raise UserError(
            f"{train_manifest.folder} and {eval_manifest.folder} number their classes differently; build the "
            f"held-out manifest with the classes of the training's ({_SAME_CLASSES})"
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
    if start.facts.role == "video-tower":
        raise UserError(f"{start.source} holds a video tower alone; train or fine-tune from it first")
    config = evaluation_config(trained_config(start), options)
    folder = options.manifest or config.data.eval_manifest
    if not folder:
        raise UserError(f"{options.checkpoint} was trained without an evaluation manifest; give --manifest")
    manifest = Manifest(folder)
    if config.objective.name == "classification":
        _check_classes(config, manifest, start)
    model = build_model(config, distributed.device, num_classes=start.facts.num_classes)
    fill_model(model, start, config)
    model.eval()
    loaders = Loaders(config, distributed)
    if distributed.is_main:
        print(f"decoder: {loaders.decoder.name} ({loaders.decoder.reason})", file=sys.stderr)
    try:
        evaluate = evaluator(config, model, loaders, manifest)
        return evaluate(freeze_first_frame if options.frozen_frames else None)
    finally:
        loaders.close()


def _check_classes(config: TrainConfig, manifest: Manifest, start: StartWeights) -> None:
    """Refuse labels that do not mean the head's classes, as far as can be told."""
    names = class_table(manifest).names
    if len(names) != start.facts.num_classes:
        raise UserError(
            f"the model tells {start.facts.num_classes} classes apart and {manifest.folder} has {len(names)}; "
            f"build the manifest with the classes of the training's ({_SAME_CLASSES})"
        )
    differing = (item for item in enumerate(zip(start.classes, names, strict=False)) if len(set(item[1])) > 1)
    if found := next(differing, None):
        label, (trained, own) = found
        raise UserError(
            f"{manifest.folder} numbers its classes differently: class {label} of {start.source} is "
            f"{trained!r}, there it is {own!r}; build the manifest with the classes of the training's "
            f"({_SAME_CLASSES})"
        )
    if config.data.train_manifest and (Path(config.data.train_manifest) / "manifest.json").is_file():
        require_same_classes(Manifest(config.data.train_manifest), manifest)


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
