"""Embeds the clips of a manifest. Axes: B clips, V views, S samples, D width."""

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
    """Return the function that embeds clips with a model.

    Args:
        model: a dual encoder, or a model with a video tower `visual`.
        before_projection: for a dual encoder, use the features of its video tower instead of the unit vectors
            in the shared space. Other models have no projection.

    Returns:
        A function from normalized frames (B, 3, T, H, W) to float (B, D).
    """
    if isinstance(model, DualEncoder) and not before_projection:
        return model.encode_video
    features: Embed = model.visual.features  # type: ignore[union-attr, assignment]
    return features


class EmbeddingScorer:
    """Embeds samples by the mean over the embeddings of their clips and views.

    If the embeddings have unit length, the mean is normalized to unit length as well.

    Args:
        model: a dual encoder, or a model with a video tower `visual`.
        before_projection: see `embedding_of`.
        normalization: pixel statistics that the model expects.
    """

    def __init__(self, model: nn.Module, *, before_projection: bool, normalization: Normalization) -> None:
        self._embed = embedding_of(model, before_projection=before_projection)
        self._has_unit_length = isinstance(model, DualEncoder) and not before_projection
        self._normalization = normalization

    def scores(self, model: nn.Module, batch: ClipBatch) -> Tensor:
        """Return the embeddings of a batch's views, float (B*V, D).

        Args:
            model: the model given to the constructor.
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
