"""InfoNCE: a clip and its text must find each other among all clips and texts of the step.

Axes: B clips of this rank, G clips of all ranks, D width of the shared space.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from avion_dali.config import Normalization
from avion_dali.contracts import ClipBatch, UserError
from avion_dali.device_ops.normalize import normalize_frames
from avion_dali.objectives.gather import check_equal_rows, gather_with_grad, world_size


def info_nce(video_GD: Tensor, text_GD: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric cross-entropy over all pairs; row i of both belongs together.

    Source: Radford et al. 2021, arXiv 2103.00020, section 2.3 and figure 3.

    Args:
        video_GD: unit video vectors, float (G, D).
        text_GD: unit text vectors, float (G, D).
        scale: factor on the cosines (the inverse temperature), float scalar.

    Returns:
        The loss, a float32 scalar with gradient, and the percentage of clips whose own text scores highest.
    """
    # Autocast would round the cosines to half precision, which at scale 100 moves logits by up to 0.4.
    with torch.autocast(video_GD.device.type, enabled=False):
        logits_GG = scale.float() * (video_GD.float() @ text_GD.float().t())
        target_G = torch.arange(logits_GG.shape[0], device=logits_GG.device)
        to_text = functional.cross_entropy(logits_GG, target_G)
        to_video = functional.cross_entropy(logits_GG.t(), target_G)
        accuracy = (logits_GG.detach().argmax(dim=1) == target_G).float().mean() * 100.0
        return (to_text + to_video) / 2.0, accuracy


class Contrastive:
    """The pre-training objective: one loss over the clips of all micro-batches and all ranks.

    A training step is `outputs` for every micro-batch, then one `loss` of their concatenation. Every rank
    computes the same global loss. Two ways to back-propagate, with equal results:

    * One micro-batch: `loss(outputs(...))[0].backward()`.
    * Several, without keeping their activations (GradCache: Gao et al. 2021, arXiv 2101.06983): compute all
      outputs without gradient, concatenate them into leaves, back-propagate the loss into those leaves, then
      repeat each micro-batch's forward pass with the same random state and call
      `torch.autograd.backward(outputs, grads)` with the leaves' matching rows, leaving out outputs that
      require no gradient (a frozen scale). Data-parallel reduction happens in the last of these only.

    The scale travels as an output, one equal number per row, so nothing reaches into the model: its rows'
    gradients add up to the scale's gradient in the micro-batches' own backward passes, and the mean over ranks
    of the global gradient, which every rank holds, is the global gradient.
    """

    couples_samples = True  # the loss needs the outputs of the whole batch at once

    def __init__(self, normalization: Normalization) -> None:
        """Create the objective.

        Args:
            normalization: pixel statistics the model expects, see `device_ops/normalize.py`.
        """
        self.normalization = normalization
        self._rows: int | None = None

    def outputs(self, model: nn.Module, batch: ClipBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Run the model on one micro-batch.

        Args:
            model: a `DualEncoder`, or its data-parallel wrapper.
            batch: B clips of one view each, with tokens.

        Returns:
            Unit video vectors (B, D), unit text vectors (B, D) and the scale (B,), float32.

        Raises:
            UserError: when the batch has no texts.
            ValueError: when clips have several views.
        """
        if batch.tokens_BL is None:
            raise UserError(
                "contrastive training needs texts, and this manifest has none; build it from captions"
            )
        if len(batch.view_ids) != len(batch):
            raise ValueError(
                f"contrastive training takes one view a clip, got {len(batch.view_ids)} of {len(batch)}"
            )
        frames_BCTHW = normalize_frames(
            batch.frames_BTHWC, self.normalization, dtype=_compute_dtype(batch.frames_BTHWC.device)
        )
        video_BD, text_BD, scale_B = model(frames_BCTHW, batch.tokens_BL)
        return video_BD, text_BD, scale_B

    def loss(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        """Compare every clip of the step with every text, over all ranks.

        Args:
            outputs: this rank's video vectors (B, D), text vectors (B, D) and scale (B,), micro-batches
                concatenated; B is the same on every rank and in every call.

        Returns:
            The global loss (float32 scalar, equal on every rank) and a report of detached scalars: `accuracy`
            (percent of clips that find their text) and `logit_scale`.

        Raises:
            UserError: when ranks hold different numbers of clips.
        """
        video_BD, text_BD, scale_B = outputs
        self._check_rows(video_BD)
        # One collective for both: the vectors of a clip travel side by side.
        video_GD, text_GD = gather_with_grad(torch.cat([video_BD, text_BD], dim=1)).chunk(2, dim=1)
        scale = scale_B.mean()
        loss, accuracy = info_nce(video_GD, text_GD, scale)
        return loss, {"accuracy": accuracy, "logit_scale": scale.detach()}

    def _check_rows(self, video_BD: Tensor) -> None:
        """Compare row counts with the other ranks once, later with this rank's first: no wait in every step."""
        rows = video_BD.shape[0]
        if self._rows is None:
            check_equal_rows(rows, video_BD.device)
            self._rows = rows
        if world_size() > 1 and rows != self._rows:
            raise UserError(
                f"this rank holds {rows} clips in this step and held {self._rows} before; keep it equal"
            )


def _compute_dtype(device: torch.device) -> torch.dtype:
    """The precision the model's first layer will run in under the caller's autocast."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return torch.float32
