"""Embeddings of the clips of a manifest. Axes: B clips, V views, S samples, D width."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from avion_dali.config import Normalization
from avion_dali.contracts import ClipBatch
from avion_dali.device_ops.normalize import normalize_frames
from avion_dali.engine.distributed import Distributed
from avion_dali.engine.per_sample import PerSample, SampleSums
from avion_dali.engine.precision import Precision, autocast
from avion_dali.models.dual_encoder import DualEncoder

Embed = Callable[[Tensor], Tensor]


def embedding_of(model: nn.Module, *, before_projection: bool) -> tuple[Embed, int]:
    """Choose what a model says of a clip.

    Args:
        model: a dual encoder, or a model with a video tower `visual`.
        before_projection: of a dual encoder, the tower's features instead of the unit vectors of the shared
            space; other models have no projection.

    Returns:
        A function from normalised frames (B, 3, T, H, W) to float (B, D), and D.
    """
    if isinstance(model, DualEncoder) and not before_projection:
        return model.encode_video, int(model.textual.output_dim)  # type: ignore[arg-type]
    tower = model.visual
    return tower.features, int(tower.width)  # type: ignore[union-attr, return-value, arg-type]


def extract_features(
    model: nn.Module,
    batches: Iterable[ClipBatch],
    *,
    before_projection: bool,
    normalization: Normalization,
    precision: Precision,
    distributed: Distributed,
) -> PerSample:
    """Embed all samples; a sample's embedding is the mean over its clips and crops.

    Args:
        model: the bare model, in evaluation mode.
        batches: this rank's share of the manifest's rows.
        before_projection: see `embedding_of`.
        normalization: pixel mean and deviation.
        precision: of the forward passes.
        distributed: this rank among all.

    Returns:
        The embeddings, the same on every rank; unit vectors where the model's are.
    """
    embed, width = embedding_of(model, before_projection=before_projection)
    sums = SampleSums()
    with torch.inference_mode():
        for batch in batches:
            if not len(batch):  # the last share of a rank may be empty
                continue
            with autocast(precision, distributed.device):
                features_BD = embed(normalize_frames(batch.frames_BTHWC, normalization))
            sums.add(batch, features_BD.float())
    samples = sums.gather(width, distributed.device)
    if isinstance(model, DualEncoder) and not before_projection:
        lengths_S1 = np.linalg.norm(samples.means_SX, axis=1, keepdims=True)
        return replace(samples, means_SX=samples.means_SX / np.maximum(lengths_S1, 1e-12))
    return samples
