"""Builds the `TrainLoop` of a configuration."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from avion_dali.assembly.class_agreement import classes_fingerprint, require_same_classes
from avion_dali.assembly.evaluators import Evaluator, open_evaluator
from avion_dali.assembly.open_clips import open_pool
from avion_dali.assembly.resolve import ResolvedRun, require_trainable, resolve
from avion_dali.assembly.run_clips import open_run_clips
from avion_dali.assembly.run_model import build_model, fill_model
from avion_dali.config import TrainConfig
from avion_dali.contracts import UserError
from avion_dali.data.manifest import Manifest
from avion_dali.engine.agreement import require_same_inputs, shared_folder_lock
from avion_dali.engine.checkpoint import find_checkpoint, load_checkpoint
from avion_dali.engine.distributed import Distributed, require_agreement
from avion_dali.engine.loop import TrainLoop
from avion_dali.engine.loop_settings import LoopSettings
from avion_dali.engine.optimizers import build_optimizer, parameter_groups
from avion_dali.engine.sharding import shard_model, weight_sum
from avion_dali.loading.clip_loader import ClipLoader
from avion_dali.models.float8 import convert_mlps
from avion_dali.models.starting_weights import StartWeights, open_start
from avion_dali.report.run_report import report_run

_log = logging.getLogger(__name__)


@contextmanager
def training(config: TrainConfig, distributed: Distributed) -> Iterator[TrainLoop]:
    """Build a training; it resumes from a checkpoint if its folder contains one.

    Args:
        config: the run's configuration.
        distributed: this process among all processes of the run.

    Yields:
        The loop, ready to run. The weights are exported afterwards if all steps are done.

    Raises:
        UserError: when a manifest, the initial weights or a checkpoint do not fit the configuration.
    """
    if not config.data.train_manifest:
        raise UserError("config: data.train_manifest is not set; make one with `avion-dali manifest`")
    with (
        shared_folder_lock(config.output_dir, "training", distributed=distributed),
        _training(config, distributed) as loop,
    ):
        yield loop


@contextmanager
def _training(config: TrainConfig, distributed: Distributed) -> Iterator[TrainLoop]:
    """Build a training whose output folder is held."""
    output_dir = Path(config.output_dir)
    latest = find_checkpoint(output_dir, config.resume)
    manifest = Manifest(config.data.train_manifest)
    eval_manifest = Manifest(config.data.eval_manifest) if config.data.eval_manifest else None
    require_same_inputs(manifest, eval_manifest)
    start = _open_start(config, latest)
    run = resolve(config, distributed, start)
    require_trainable(run)
    if eval_manifest and run.task.class_names(manifest):
        require_same_classes(manifest, eval_manifest)
    run.task.check(run.config, manifest)
    _require_whole_steps(run, manifest)
    model = build_model(run, num_classes=len(run.task.class_names(manifest)))
    if distributed.is_main:
        _log.info("%s", "\n".join([*run.lines(), *run.batch_lines()]))
    if start and not latest:
        report = fill_model(model, start, run.config)
        if distributed.is_main:
            _log.info("%s", "\n".join(report.lines()))
    if run.config.model.mlp_dtype == "fp8":
        convert_mlps(model)
    shard_model(model, run.config.run, distributed=distributed)
    with ExitStack() as stack:
        pool = stack.enter_context(open_pool(run.config.data))
        loader = stack.enter_context(open_run_clips(run, manifest, training=True, pool=pool))
        evaluate: Evaluator | None = None
        if eval_manifest:
            evaluate = stack.enter_context(open_evaluator(run, model, manifest=eval_manifest, pool=pool))
        facts = resume_facts(run.config, manifest, eval_manifest=eval_manifest)
        loop = _build_loop(run, model, loader=loader, evaluate=evaluate, manifest=manifest, facts=facts)
        if latest is not None:
            loop.restore(latest)
        require_agreement({"step": loop.step, "sum of all weights": weight_sum(model), **loop.order})
        yield loop
        if loop.step >= loop.last_step:
            loop.export(output_dir / "weights.safetensors")
        if distributed.is_main:
            report_run(output_dir)


def _open_start(config: TrainConfig, latest: Path | None) -> StartWeights | None:
    """Open the initial weights of a run.

    A resumed run opens its checkpoint; the weights that it started from originally may no longer exist.
    """
    if latest is None:
        return open_start(config.model.weights) if config.model.weights else None
    try:
        return open_start(str(latest))
    except UserError:
        load_checkpoint(latest)  # raises a more helpful error if the checkpoint is damaged
        raise


def _require_whole_steps(run: ResolvedRun, manifest: Manifest) -> None:
    """Reject batch sizes that do not divide evenly, and manifests smaller than one step."""
    optim, micro, world = run.config.optim, run.micro_batch, run.distributed.world_size
    if optim.global_batch % (micro * world):
        raise UserError(
            f"optim.global_batch = {optim.global_batch} must be a multiple of optim.micro_batch x ranks = "
            f"{micro} x {world} = {micro * world}; change one of them"
        )
    if manifest.num_samples < optim.global_batch:
        raise UserError(
            f"{manifest.folder} has {manifest.num_samples} samples, fewer than one global batch "
            f"({optim.global_batch}); lower optim.global_batch or add data"
        )


def _build_loop(
    run: ResolvedRun,
    model: nn.Module,
    *,
    loader: ClipLoader[Any],
    evaluate: Evaluator | None,
    manifest: Manifest,
    facts: dict[str, int | float | str],
) -> TrainLoop:
    config, task = run.config, run.task
    groups = parameter_groups(model, config.optim.weight_decay, layer_decay=config.optim.layer_decay)
    settings = LoopSettings.from_config(
        config,
        best_metric=task.best_metric if evaluate else "",
        decoder=run.decoder.name,
        decoder_reason=run.decoder.reason,
        data=facts,
        classes=task.class_names(manifest),
    )
    return TrainLoop(
        model,
        build_optimizer(groups, config.optim),
        objective=task.build_objective(config, model, manifest),
        loader=loader,
        settings=settings,
        distributed=run.distributed,
        evaluate=(lambda: evaluate(None).metrics()) if evaluate else None,
        after_step=lambda: task.after_step(model),
    )


def resume_facts(
    config: TrainConfig, train_manifest: Manifest, *, eval_manifest: Manifest | None
) -> dict[str, int | float | str]:
    """Return the facts that must not change when a run is resumed: its data and the meaning of its weights.

    Args:
        config: the run's configuration.
        train_manifest: the training manifest.
        eval_manifest: the evaluation manifest, whose scores select the best checkpoint.
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
