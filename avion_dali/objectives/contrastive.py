"""InfoNCE: a clip and its text must find each other among all clips and texts of the step.

Axes: B clips of this rank, G clips of all ranks, D width of the shared space.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from avion_dali.config import AugmentConfig, Normalization
from avion_dali.contracts import ClipBatch, UserError
from avion_dali.device_ops.normalize import normalize_frames
from avion_dali.device_ops.randomness import StepKey
from avion_dali.objectives.clips import batch_augmentation, compute_dtype, require_one_view
from avion_dali.objectives.gather import EqualRows, gather_with_grad, rank, world_size


def info_nce(
    video_GD: Tensor, text_GD: Tensor, scale: Tensor, *, rows: slice = slice(None)
) -> tuple[Tensor, Tensor]:
    """Symmetric cross-entropy over all pairs; row i of both belongs together.

    Source: Radford et al. 2021, arXiv 2103.00020, section 2.3 and figure 3.

    Args:
        video_GD: unit video vectors, float (G, D).
        text_GD: unit text vectors, float (G, D).
        scale: factor on the cosines (the inverse temperature), float scalar.
        rows: the pairs to score, each against all; all by default.

    Returns:
        The loss, a float32 scalar with gradient, and the share of scored clips whose own text is nearest.
    """
    # Autocast would round the cosines to half precision, which at scale 100 moves logits by up to 0.4.
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

    A training step is `outputs` for every micro-batch, then one `loss` of their concatenation. Every rank
    computes the same global loss, or with `local_loss` the part of it that belongs to its own clips: logits
    (B, G) instead of (G, G), and the mean over ranks, which data-parallel training takes of gradients and the
    log of numbers, is the global loss and its gradient. Two ways to back-propagate, with equal results:

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

    def __init__(
        self,
        normalization: Normalization,
        *,
        augment: AugmentConfig | None = None,
        local_loss: bool = False,
    ) -> None:
        """Create the objective.

        Args:
            normalization: pixel statistics the model expects, see `device_ops/normalize.py`.
            augment: what is done to the pixels; nothing by default.
            local_loss: see the class.
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
            UserError: when the batch has no texts, or clips have several views.
        """
        if batch.tokens_BL is None:
            raise UserError(
                "contrastive training needs texts, and this manifest has none; build it from captions"
            )
        require_one_view(batch, "contrastive")
        frames_BCTHW = normalize_frames(
            batch.frames_BTHWC,
            self.normalization,
            dtype=compute_dtype(batch.frames_BTHWC.device),
            augmentation=batch_augmentation(batch, self.augment, key),
        )
        video_BD, text_BD, scale_B = model(frames_BCTHW, batch.tokens_BL)
        return video_BD, text_BD, scale_B

    def loss(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        """Compare the clips of the step with every text, over all ranks.

        Args:
            outputs: this rank's video vectors (B, D), text vectors (B, D) and scale (B,), micro-batches
                concatenated; B is the same on every rank and in every call.

        Returns:
            The loss (float32 scalar; without `local_loss` equal on every rank) and a report of detached
            scalars: `accuracy` (share of the scored clips that find their text) and `logit_scale`.

        Raises:
            UserError: when ranks hold different numbers of clips.
        """
        video_BD, text_BD, scale_B = outputs
        # Side by side, so that one collective gathers both.
        pairs_GX = torch.cat([video_BD, text_BD], dim=1)
        if world_size() > 1:
            self._equal_rows.check(len(pairs_GX), pairs_GX.device)
            pairs_GX = gather_with_grad(pairs_GX)
        video_GD, text_GD = pairs_GX.chunk(2, dim=1)
        scale, first = scale_B.mean(), rank() * len(video_BD)
        own = slice(first, first + len(video_BD)) if self.local_loss else slice(None)
        loss, accuracy = info_nce(video_GD, text_GD, scale, rows=own)
        return loss, {"accuracy": accuracy, "logit_scale": scale.detach()}
