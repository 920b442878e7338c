"""Embeddings of the clips of a manifest. Axes: B clips, V views, S samples, D width."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from avion_dali.config import Normalization
from avion_dali.contracts import ClipBatch
from avion_dali.device_ops.normalize import normalize_frames
from avion_dali.models.dual_encoder import DualEncoder
from avion_dali.tasks.sample_means import PerSample

Embed = Callable[[Tensor], Tensor]


def embedding_of(model: nn.Module, *, before_projection: bool) -> Embed:
    """Choose what a model says of a clip.

    Args:
        model: a dual encoder, or a model with a video tower `visual`.
        before_projection: of a dual encoder, the tower's features instead of the unit vectors of the shared
            space; other models have no projection.

    Returns:
        A function from normalised frames (B, 3, T, H, W) to float (B, D).
    """
    if isinstance(model, DualEncoder) and not before_projection:
        return model.encode_video
    features: Embed = model.visual.features  # type: ignore[union-attr, assignment]
    return features


class EmbeddingScorer:
    """Embeds clips; a sample's embedding is the mean over its clips and views, of unit length where theirs are.

    Args:
        model: a dual encoder, or a model with a video tower `visual`.
        before_projection: see `embedding_of`.
        normalization: pixel mean and deviation.
    """

    def __init__(self, model: nn.Module, *, before_projection: bool, normalization: Normalization) -> None:
        self._embed = embedding_of(model, before_projection=before_projection)
        self._has_unit_length = isinstance(model, DualEncoder) and not before_projection
        self._normalization = normalization

    def scores(self, model: nn.Module, batch: ClipBatch) -> Tensor:
        """Return the embeddings of a batch's views, float (B*V, D).

        Args:
            model: the one given to the constructor.
            batch: B samples of V views each.
        """
        del model
        return self._embed(normalize_frames(batch.frames_BTHWC, self._normalization))

    def result(self, model: nn.Module, samples: PerSample, device: torch.device) -> PerSample:
        """Return the embeddings, the same on every rank.

        Args:
            model: not used.
            samples: mean embeddings.
            device: not used.
        """
        del model, device
        if not self._has_unit_length:
            return samples
        lengths_S1 = np.linalg.norm(samples.means_SX, axis=1, keepdims=True)
        return replace(samples, means_SX=samples.means_SX / np.maximum(lengths_S1, 1e-12))
