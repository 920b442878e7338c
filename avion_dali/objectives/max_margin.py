"""Retrieval fine-tuning: a clip must be nearer to its caption than to others, by a margin.

Axes: B clips of this rank, G clips of all ranks (and their captions), D width of the shared space.
"""

from __future__ import annotations

from typing import Final, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from avion_dali.config import AugmentConfig, MaxMarginConfig, Normalization
from avion_dali.contracts import ClipBatch, UserError
from avion_dali.device_ops.normalize import normalize_frames
from avion_dali.device_ops.randomness import StepKey
from avion_dali.objectives.clips import batch_augmentation, compute_dtype, require_one_view
from avion_dali.objectives.gather import EqualRows, gather_rows, gather_with_grad

SAME_RELEVANCY: Final = 1.1 / 240
"""Relevancies that differ by less count as equal; what the authors of SMS take in their released code."""


class Captions(Protocol):
    """What this objective needs of a manifest's captions."""

    def relevancy(self, rows: np.ndarray, captions: np.ndarray | None = None) -> np.ndarray:
        """Relevancy of manifest rows to captions, float32 (rows, captions) in [0, 1]."""


def margins_to_others(text_GD: Tensor, video_GD: Tensor) -> Tensor:
    """How much nearer each clip and caption is to its own partner than to every other.

    Args:
        text_GD: caption vectors, float (G, D); row i of both belongs together.
        video_GD: clip vectors, float (G, D).

    Returns:
        Float32 (2, G, G) differences of cosines: [0, i, j] is pair i less (caption i, clip j), [1, i, j] is
        pair i less (clip i, caption j). The diagonals are zero.
    """
    with torch.autocast(text_GD.device.type, enabled=False):
        text_GD, video_GD = (functional.normalize(x.float(), dim=1, eps=1e-8) for x in (text_GD, video_GD))
        cosine_GG = text_GD @ video_GD.t()
        return cosine_GG.diagonal()[None, :, None] - torch.stack([cosine_GG, cosine_GG.t()])


def max_margin(margins_2GG: Tensor, *, margin: float) -> Tensor:
    """Mean hinge over all pairs of a clip or caption with a caption or clip that is not its own.

    Source: the multi-instance max-margin loss of EPIC-KITCHENS-100 retrieval (Wray et al. 2019, arXiv
    1908.03477) as AVION and LaViLa train with it: no mining, captions equal to the anchor's count
    as wrong, and the G diagonal terms, constants equal to the margin, are left out.

    Args:
        margins_2GG: of `margins_to_others`, G >= 2.
        margin: by how much the own partner must be nearer, in cosine.

    Returns:
        Float32 scalar: mean of max(0, margin - difference) over the 2 G (G - 1) pairs.
    """
    return _mean_off_diagonal(functional.relu(margin - margins_2GG))


def symmetric_multi_similarity(
    margins_2GG: Tensor, relevancy_GG: Tensor, *, margin: float, relaxation: float
) -> Tensor:
    """Hinges whose margin and direction follow from how much more relevant the own partner is.

    Source: Wang et al. 2024, "Symmetric Multi-Similarity Loss for EPIC-KITCHENS-100 Multi-Instance Retrieval
    Challenge 2024", arXiv 2406.12256, and the same authors' arXiv 2506.14356, section IV-B, equation 15. With
    d the difference of cosines of a pair and r of its relevancies (own less other), a term is

    * max(0, r margin - d) where r > 0: the own partner must be nearer,
    * max(0, d - r margin) where r < 0: the other is the more relevant one and must be nearer,
    * max(0, |d| - relaxation) where r = 0: both must be about as near.

    From their released code: the mean over the same 2 G (G - 1) pairs as `max_margin`, relevancies equal
    up to `SAME_RELEVANCY`, and margin 0.6 with relaxation 0.1. Not taken: the second threshold of equation 16.

    Args:
        margins_2GG: of `margins_to_others`, G >= 2.
        relevancy_GG: float32 (G, G) in [0, 1]; [i, j] is clip i to caption j.
        margin: cosine difference asked for a relevancy difference of one.
        relaxation: cosine difference allowed between equally relevant partners.

    Returns:
        Float32 scalar.
    """
    own_1G1 = relevancy_GG.diagonal()[None, :, None]
    gain_2GG = own_1G1 - torch.stack([relevancy_GG.t(), relevancy_GG])
    short_2GG = gain_2GG * margin - margins_2GG
    is_equal_2GG = gain_2GG.abs() < SAME_RELEVANCY
    ranked_2GG = functional.relu(torch.where(gain_2GG > 0, short_2GG, -short_2GG))
    equal_2GG = functional.relu(margins_2GG.abs() - relaxation)
    return _mean_off_diagonal(torch.where(is_equal_2GG, equal_2GG, ranked_2GG))


class MaxMargin:
    """Fine-tuning for retrieval: one loss over the clips and captions of all micro-batches and all ranks.

    Outputs and back-propagation are as `Contrastive` describes. Sample and caption ids travel as an output
    too (float64, exact up to 2^53), so that they are gathered with the rows; for `symmetric-multi-similarity`
    every step then waits once for the device, because relevancies are looked up on the CPU.
    """

    couples_samples = True  # the loss needs the outputs of the whole batch at once

    def __init__(
        self,
        config: MaxMarginConfig,
        normalization: Normalization,
        captions: Captions | None,
        *,
        augment: AugmentConfig | None = None,
    ) -> None:
        """Create the objective.

        Args:
            config: which loss, and its margins.
            normalization: pixel statistics the model expects.
            captions: the training manifest's captions; only `symmetric-multi-similarity` needs them.
            augment: what is done to the pixels; nothing by default.
        """
        self.config, self.normalization, self.captions = config, normalization, captions
        self.augment = augment or AugmentConfig()
        self.is_graded = config.loss == "symmetric-multi-similarity"
        self._equal_rows = EqualRows()

    def outputs(self, model: nn.Module, batch: ClipBatch, key: StepKey) -> tuple[Tensor, Tensor, Tensor]:
        """Run the model on one micro-batch.

        Args:
            model: a `DualEncoder` with a frozen temperature, or its data-parallel wrapper.
            batch: B clips of one view each, with tokens and, for graded relevancy, caption ids.
            key: the optimizer step, for augmentation.

        Returns:
            Unit video vectors (B, D), unit text vectors (B, D), both float32, and ids (B, 2), float64: sample,
            caption.

        Raises:
            UserError: texts or caption ids are missing, clips have several views, or the temperature would be
                trained.
        """
        if batch.tokens_BL is None:
            raise UserError(
                "max-margin training needs texts, and this manifest has none; build it from captions"
            )
        require_one_view(batch, "max-margin")
        ids_B2 = torch.from_numpy(self._ids(batch)).to(batch.frames_BTHWC.device, non_blocking=True)
        frames_BCTHW = normalize_frames(
            batch.frames_BTHWC,
            self.normalization,
            dtype=compute_dtype(batch.frames_BTHWC.device),
            augmentation=batch_augmentation(batch, self.augment, key),
        )
        video_BD, text_BD, scale_B = model(frames_BCTHW, batch.tokens_BL)
        if scale_B.requires_grad:
            raise UserError("max-margin losses have no temperature; set model.train_logit_scale to false")
        return video_BD, text_BD, ids_B2

    def loss(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        """Compare every clip of the step with every caption, over all ranks.

        Args:
            outputs: this rank's video vectors, text vectors and ids, micro-batches concatenated.

        Returns:
            The global loss (float32 scalar, equal on every rank) and a report: `accuracy`, the share of
            clips that are nearest to their own caption.

        Raises:
            UserError: ranks hold different numbers of clips, or a step has a single clip.
        """
        video_BD, text_BD, ids_B2 = outputs
        self._equal_rows.check(len(video_BD), video_BD.device)
        video_GD, text_GD = gather_with_grad(torch.cat([video_BD, text_BD], dim=1)).chunk(2, dim=1)
        if len(video_GD) < 2:
            raise UserError(
                "max-margin losses compare clips with each other; set optim.global_batch to 2 or more"
            )
        margins_2GG = margins_to_others(text_GD, video_GD)
        if self.is_graded:
            relevancy_GG = self._relevancy(gather_rows(ids_B2))
            margin, relaxation = self.config.margin, self.config.relaxation
            loss = symmetric_multi_similarity(margins_2GG, relevancy_GG, margin=margin, relaxation=relaxation)
        else:
            loss = max_margin(margins_2GG, margin=self.config.margin)
        # A clip finds its caption when no other caption is nearer, that is, when no difference is negative.
        accuracy = (margins_2GG[1].detach() >= 0).all(dim=1).float().mean()
        return loss, {"accuracy": accuracy}

    def _ids(self, batch: ClipBatch) -> np.ndarray:
        """Sample and caption ids, float64 (B, 2); caption -1 where the loss does not need it."""
        captions = np.full(len(batch), -1) if batch.caption_ids is None else batch.caption_ids
        if self.is_graded and (captions < 0).any():
            raise UserError(
                "symmetric-multi-similarity must know which caption each text is; set data.text to `relevant`"
            )
        return np.stack([batch.sample_ids, captions], axis=1).astype(np.float64)

    def _relevancy(self, ids_G2: Tensor) -> Tensor:
        """Relevancy of the step's clips to its captions, float32 (G, G), on the ids' device."""
        if self.captions is None:
            raise UserError("symmetric-multi-similarity needs a training manifest with captions")
        sample_ids, caption_ids = ids_G2.cpu().numpy().astype(np.int64).T
        relevancy_GG = np.ascontiguousarray(self.captions.relevancy(sample_ids, caption_ids), dtype=np.float32)
        return torch.from_numpy(relevancy_GG).to(ids_G2.device, non_blocking=True)


def _mean_off_diagonal(terms_2GG: Tensor) -> Tensor:
    """Mean over all pairs but the G own ones of each direction."""
    clips = terms_2GG.shape[-1]
    is_other_GG = ~torch.eye(clips, dtype=torch.bool, device=terms_2GG.device)
    return (terms_2GG * is_other_GG).sum() / (2 * clips * (clips - 1))
