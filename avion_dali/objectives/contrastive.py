"""InfoNCE: identifies each clip's text, and each text's clip, among all clips and texts of a step.

Axes: B clips of this rank, G clips of all ranks, D width of the shared space.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from avion_dali.config import AugmentConfig, Normalization
from avion_dali.contracts import ClipBatch, UserError
from avion_dali.device_ops.normalize import normalize_frames
from avion_dali.device_ops.step_key import StepKey
from avion_dali.objectives.clips import batch_augmentation, compute_dtype, require_one_view
from avion_dali.objectives.gather import EqualRows, gather_with_grad, rank, world_size


def info_nce(
    video_GD: Tensor, text_GD: Tensor, *, scale: Tensor, rows: slice = slice(None)
) -> tuple[Tensor, Tensor]:
    """Symmetric cross-entropy over all pairs of a clip and a text; row i of both inputs is a matching pair.

    Source: Radford et al. 2021, arXiv 2103.00020, section 2.3 and figure 3.

    Args:
        video_GD: unit video vectors, float (G, D).
        text_GD: unit text vectors, float (G, D).
        scale: factor on the cosines (the inverse temperature), float scalar.
        rows: the pairs to score, each against all others; all pairs by default.

    Returns:
        The loss, a float32 scalar with gradient, and the fraction of scored clips whose own text is nearest.
    """
    # Autocast would round the cosines to half precision, which changes logits by up to 0.4 at scale 100.
    with torch.autocast(video_GD.device.type, enabled=False):
        video_GD, text_GD = video_GD.float(), text_GD.float()
        to_text_BG = scale.float() * (video_GD[rows] @ text_GD.t())
        to_video_BG = scale.float() * (text_GD[rows] @ video_GD.t())
        target_B = torch.arange(len(video_GD), device=video_GD.device)[rows]
        loss = functional.cross_entropy(to_text_BG, target_B) + functional.cross_entropy(to_video_BG, target_B)
        accuracy = (to_text_BG.detach().argmax(dim=1) == target_B).float().mean()
        return loss / 2.0, accuracy


class Contrastive:
    """The pre-training objective: one loss over the clips of all micro-batches and all ranks.

    A training step calls `outputs` for every micro-batch and then `loss` once for their concatenation. Every
    rank computes the same global loss. With `local_loss` a rank computes only the part of its own clips, with
    logits (B, G) instead of (G, G); the mean over ranks, which data-parallel training takes of gradients and
    the log takes of numbers, is then the global loss and its gradient. There are two equivalent ways to
    back-propagate:

    * One micro-batch: `loss(outputs(...))[0].backward()`.
    * Several, without keeping their activations (GradCache: Gao et al. 2021, arXiv 2101.06983): compute all
      outputs without gradient, concatenate them into leaves, and back-propagate the loss into the leaves. Then
      repeat each micro-batch's forward pass with the same random state and call
      `torch.autograd.backward(outputs, grads)` with the matching rows of the leaves' gradients, omitting
      outputs that require no gradient (a frozen scale). Only the last of these passes reduces gradients over
      ranks.

    The scale is an output with one equal number per row, so the objective does not access the model's
    parameters. The gradients of its rows add up to the scale's gradient in the backward passes of the
    micro-batches. Every rank obtains the whole gradient, so the mean over ranks does not change it.
    """

    couples_samples = True  # the loss needs the outputs of the whole batch at once

    def __init__(
        self,
        normalization: Normalization,
        *,
        augment: AugmentConfig | None = None,
        local_loss: bool = False,
    ) -> None:
        """Create the objective.

        Args:
            normalization: pixel statistics that the model expects, see `device_ops/normalize.py`.
            augment: augmentation of the pixels; none by default.
            local_loss: score only this rank's clips, see the class.
        """
        self.normalization = normalization
        self.augment = augment or AugmentConfig()
        self.local_loss = local_loss
        self._equal_rows = EqualRows()

    def outputs(self, model: nn.Module, batch: ClipBatch, key: StepKey) -> tuple[Tensor, Tensor, Tensor]:
        """Run the model on one micro-batch.

        Args:
            model: a `DualEncoder`, or its data-parallel wrapper.
            batch: B clips of one view each, with tokens.
            key: the optimizer step, for augmentation.

        Returns:
            Unit video vectors (B, D), unit text vectors (B, D) and the scale (B,), float32.

        Raises:
            UserError: when the batch has no texts, or the clips have several views.
        """
        if batch.tokens_BL is None:
            raise UserError(
                "contrastive training needs texts, and this manifest has none; build it from annotations with "
                "texts"
            )
        require_one_view(batch, "contrastive")
        frames_BCTHW = normalize_frames(
            batch.frames_BTHWC,
            self.normalization,
            dtype=compute_dtype(batch.frames_BTHWC.device),
            augmentation=batch_augmentation(batch, self.augment, key=key),
        )
        video_BD, text_BD, scale_B = model(frames_BCTHW, batch.tokens_BL)
        return video_BD, text_BD, scale_B

    def loss(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        """Compare every clip of the step with every text, over all ranks.

        Args:
            outputs: this rank's video vectors (B, D), text vectors (B, D) and scale (B,), micro-batches
                concatenated; B is the same on every rank and in every call.

        Returns:
            The loss (float32 scalar; without `local_loss` equal on every rank) and a report of detached
            scalars: `accuracy` (fraction of the scored clips whose own text is nearest) and `logit_scale`.

        Raises:
            UserError: when ranks hold different numbers of clips.
        """
        video_BD, text_BD, scale_B = outputs
        # One collective sends the video and text vectors together.
        pairs_GX = torch.cat([video_BD, text_BD], dim=1)
        if world_size() > 1:
            self._equal_rows.check(len(pairs_GX), pairs_GX.device)
            pairs_GX = gather_with_grad(pairs_GX)
        video_GD, text_GD = pairs_GX.chunk(2, dim=1)
        scale, first = scale_B.mean(), rank() * len(video_BD)
        own = slice(first, first + len(video_BD)) if self.local_loss else slice(None)
        loss, accuracy = info_nce(video_GD, text_GD, scale=scale, rows=own)
        return loss, {"accuracy": accuracy, "logit_scale": scale.detach()}
