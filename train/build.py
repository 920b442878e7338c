"""Puts the parts of a run together: configuration in, `TrainLoop` or evaluation out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch

from avion_dali.config import EvaluateConfig, TrainConfig
from avion_dali.contracts import UserError
from avion_dali.data.manifest import Manifest
from avion_dali.engine.checkpoint import export_safetensors, find_checkpoint, read_weights, restore_model
from avion_dali.engine.distributed import Distributed, require_agreement
from avion_dali.engine.evaluate import (
    FramesTransform,
    RetrievalResult,
    build_gallery,
    evaluate_retrieval,
    freeze_first_frame,
)
from avion_dali.engine.loop import LoopSettings, TrainLoop
from avion_dali.engine.optim import build_optimizer, parameter_groups
from avion_dali.engine.precision import resolve_precision
from avion_dali.models.dual_encoder import DualEncoder, build_dual_encoder
from avion_dali.objectives.contrastive import Contrastive
from train.loaders import Loaders

BEST_METRIC = "map_avg"


def build_model(config: TrainConfig, device: torch.device) -> DualEncoder:
    """Create the model with weights drawn from the run's seed.

    Args:
        config: the run's configuration.
        device: where it goes.
    """
    torch.manual_seed(config.run.seed)
    model = build_dual_encoder(
        config.model, num_frames=config.data.num_frames, frame_size=config.data.frame_size
    )
    return model.to(device)


def retrieval_evaluator(
    model: DualEncoder, loaders: Loaders, manifest: Manifest
) -> Callable[[FramesTransform | None], RetrievalResult]:
    """Return a function that evaluates the model as it stands; its argument changes the frames.

    Args:
        model: the bare dual encoder.
        loaders: this rank's loaders.
        manifest: the evaluation manifest.
    """
    gallery = build_gallery(manifest)
    config, distributed = loaders.config, loaders.distributed
    # One loader for all evaluations: workers keep the shared memory of every loader they have served.
    loader = loaders.evaluation(manifest)

    def evaluate(transform: FramesTransform | None = None) -> RetrievalResult:
        return evaluate_retrieval(
            model,
            loader.batches(0, loader.steps_per_epoch),
            gallery,
            normalization=config.data.normalization,
            precision=resolve_precision(config.run.precision, distributed.device),
            distributed=distributed,
            transform=transform,
        )

    return evaluate


@contextmanager
def pretraining(config: TrainConfig, distributed: Distributed) -> Iterator[TrainLoop]:
    """Build a video-text pre-training, resumed where its folder holds a checkpoint.

    Args:
        config: the run's configuration.
        distributed: this rank among all.

    Yields:
        The loop, ready to run.

    Raises:
        UserError: when a manifest or checkpoint does not fit.
    """
    if not config.data.train_manifest:
        raise UserError("config: data.train_manifest is not set; make one with `avion-dali manifest captions`")
    output_dir = Path(config.output_dir)
    latest = find_checkpoint(output_dir, config.resume)
    train_manifest = Manifest(config.data.train_manifest)
    eval_manifest = Manifest(config.data.eval_manifest) if config.data.eval_manifest else None
    model = build_model(config, distributed.device)
    loaders = Loaders(config, distributed)
    try:
        evaluate = retrieval_evaluator(model, loaders, eval_manifest) if eval_manifest else None
        loop = TrainLoop(
            model,
            build_optimizer(parameter_groups(model, config.optim.weight_decay), config.optim),
            objective=Contrastive(config.data.normalization),
            loader=loaders.training(train_manifest),
            settings=LoopSettings.from_config(
                config,
                best_metric=BEST_METRIC if evaluate else "",
                decoder=loaders.decoder.name,
                decoder_reason=loaders.decoder.reason,
                data=resume_facts(config, train_manifest, eval_manifest),
            ),
            distributed=distributed,
            evaluate=(lambda: evaluate(None).metrics()) if evaluate else None,
            after_step=model.clamp_logit_scale,
        )
        if latest is not None:
            loop.restore(latest)
        weights = sum(float(p.detach().double().abs().sum()) for p in model.parameters())
        require_agreement({"step": loop.step, "sum of all weights": weights, **loop.order})
        yield loop
        if distributed.is_main:
            export_safetensors(model, output_dir / "weights.safetensors", {"config": asdict(config)})
    finally:
        loaders.close()


def resume_facts(
    config: TrainConfig, train_manifest: Manifest, eval_manifest: Manifest | None
) -> dict[str, int | float | str]:
    """Return what must not change when a run is resumed: its data, and what its weights mean.

    Args:
        config: the run's configuration.
        train_manifest: the training manifest.
        eval_manifest: the evaluation manifest, whose scores the best checkpoint is chosen by.
    """
    return {
        "data.train_manifest": train_manifest.fingerprint,
        "data.eval_manifest": eval_manifest.fingerprint if eval_manifest else 0,
        "data.num_frames": config.data.num_frames,
        "data.frame_size": config.data.frame_size,
        "data.normalization": config.data.normalization,
        "model.activation": config.model.activation,
        "model.norm_eps": config.model.norm_eps,
    }


def evaluate_checkpoint(options: EvaluateConfig, distributed: Distributed) -> RetrievalResult:
    """Load a checkpoint and evaluate it as its own configuration says.

    Args:
        options: the checkpoint, the manifest, and how to decode.
        distributed: this rank among all.

    Raises:
        UserError: when the file or the manifest cannot be used.
    """
    weights, header = read_weights(Path(options.checkpoint))
    trained = TrainConfig.from_plain(header["config"])
    config = replace(
        trained,
        decoder=options.decoder,
        output_dir=options.output_dir or trained.output_dir,
        data=replace(trained.data, workers=options.workers),
        optim=replace(trained.optim, micro_batch=options.micro_batch),
    )
    folder = options.manifest or config.data.eval_manifest
    if not folder:
        raise UserError(f"{options.checkpoint} was trained without an evaluation manifest; give --manifest")
    manifest = Manifest(folder)
    model = build_model(config, distributed.device)
    restore_model(model, weights, source=options.checkpoint)
    model.eval()
    loaders = Loaders(config, distributed)
    if distributed.is_main:
        print(f"decoder: {loaders.decoder.name} ({loaders.decoder.reason})", file=sys.stderr)
    try:
        evaluate = retrieval_evaluator(model, loaders, manifest)
        return evaluate(freeze_first_frame if options.frozen_frames else None)
    finally:
        loaders.close()
