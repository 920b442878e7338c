"""Retrieval fine-tuning: each clip must be nearer to its own caption than to other captions, by a margin.

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
from avion_dali.device_ops.step_key import StepKey
from avion_dali.objectives.clips import batch_augmentation, compute_dtype, require_one_view
from avion_dali.objectives.gather import EqualRows, gather_rows, gather_with_grad

SAME_RELEVANCY: Final = 1.1 / 240
"""Relevancies that differ by less count as equal. The value is that of the released code of SMS."""


class CaptionRelevancy(Protocol):
    """The captions of a manifest, as far as this objective needs them."""

    def relevancy(self, rows: np.ndarray, captions: np.ndarray | None = None) -> np.ndarray:
        """Return the relevancy of manifest rows to captions, float32 (rows, captions) in [0, 1]."""


def margins_to_others(text_GD: Tensor, video_GD: Tensor) -> Tensor:
    """Difference between the cosine of each matching pair and the cosines with all other partners.

    Args:
        text_GD: caption vectors, float (G, D); row i of both inputs is a matching pair.
        video_GD: clip vectors, float (G, D).

    Returns:
        Float32 (2, G, G): the cosine of pair i minus that of (caption i, clip j) in [0, i, j], and minus that
        of (clip i, caption j) in [1, i, j]. The diagonals are zero.
    """
    with torch.autocast(text_GD.device.type, enabled=False):
        text_GD, video_GD = (functional.normalize(x.float(), dim=1, eps=1e-8) for x in (text_GD, video_GD))
        cosine_GG = text_GD @ video_GD.t()
        return cosine_GG.diagonal()[None, :, None] - torch.stack([cosine_GG, cosine_GG.t()])


def max_margin(margins_2GG: Tensor, *, margin: float) -> Tensor:
    """Mean hinge loss over all pairs of a clip and a caption that do not match, in both directions.

    Source: the multi-instance max-margin loss of EPIC-KITCHENS-100 retrieval (Wray et al. 2019, arXiv
    1908.03477) as AVION and LaViLa use it: there is no mining, other captions with the same text count as
    negatives, and the G diagonal terms, which are constants equal to the margin, are omitted.

    Args:
        margins_2GG: output of `margins_to_others`, G >= 2.
        margin: required cosine difference between the own partner and the others.

    Returns:
        Float32 scalar: mean of max(0, margin - difference) over the 2 G (G - 1) pairs.
    """
    return _mean_off_diagonal(functional.relu(margin - margins_2GG))


def symmetric_multi_similarity(
    margins_2GG: Tensor, relevancy_GG: Tensor, *, margin: float, relaxation: float
) -> Tensor:
    """Mean hinge loss whose margin and direction depend on the difference of relevancies.

    Source: Wang et al. 2024, "Symmetric Multi-Similarity Loss for EPIC-KITCHENS-100 Multi-Instance Retrieval
    Challenge 2024", arXiv 2406.12256, and the same authors' arXiv 2506.14356, section IV-B, equation 15. With
    d the difference of cosines and r the difference of relevancies (own partner minus the other), a term is

    * max(0, r margin - d) if r > 0: the own partner must be nearer,
    * max(0, d - r margin) if r < 0: the other partner is more relevant and must be nearer,
    * max(0, |d| - relaxation) if r = 0: both must be about equally near.

    As in their released code, the mean is over the same 2 G (G - 1) pairs as in `max_margin`, and relevancies
    that differ by less than `SAME_RELEVANCY` are equal; their recipe has margin 0.6 and relaxation 0.1. The
    second threshold of equation 16 is not implemented.

    Args:
        margins_2GG: output of `margins_to_others`, G >= 2.
        relevancy_GG: float32 (G, G) in [0, 1]; [i, j] is the relevancy of caption j to clip i.
        margin: required cosine difference for a relevancy difference of one.
        relaxation: allowed cosine difference between equally relevant partners.

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

    Outputs and back-propagation are as in `Contrastive`. Sample and caption ids are an output as well (float64,
    exact up to 2^53), so that they are gathered with the vectors. With `symmetric-multi-similarity` every step
    waits once for the device, because relevancies are looked up on the CPU.
    """

    couples_samples = True  # the loss needs the outputs of the whole batch at once

    def __init__(
        self,
        config: MaxMarginConfig,
        normalization: Normalization,
        captions: CaptionRelevancy | None,
        *,
        augment: AugmentConfig | None = None,
    ) -> None:
        """Create the objective.

        Args:
            config: which loss, and its margins.
            normalization: pixel statistics that the model expects.
            captions: captions of the training manifest; only `symmetric-multi-similarity` needs them.
            augment: augmentation of the pixels; none by default.
        """
        self.config, self.normalization, self.captions = config, normalization, captions
        self.augment = augment or AugmentConfig()
        self.is_graded = config.loss == "symmetric-multi-similarity"
        self._equal_rows = EqualRows()

    def outputs(self, model: nn.Module, batch: ClipBatch, key: StepKey) -> tuple[Tensor, Tensor, Tensor]:
        """Run the model on one micro-batch.

        Args:
            model: a `DualEncoder` with a frozen temperature, or its data-parallel wrapper.
            batch: B clips of one view each, with tokens and, for `symmetric-multi-similarity`, caption ids.
            key: the optimizer step, for augmentation.

        Returns:
            Unit video vectors (B, D), unit text vectors (B, D), both float32, and ids (B, 2), float64: sample,
            caption.

        Raises:
            UserError: texts or caption ids are missing, the clips have several views, or the temperature is
                trainable.
        """
        if batch.tokens_BL is None:
            raise UserError(
                "max-margin training needs texts, and this manifest has none; build it from annotations with "
                "texts"
            )
        require_one_view(batch, "max-margin")
        ids_B2 = torch.from_numpy(self._ids(batch)).to(batch.frames_BTHWC.device, non_blocking=True)
        frames_BCTHW = normalize_frames(
            batch.frames_BTHWC,
            self.normalization,
            dtype=compute_dtype(batch.frames_BTHWC.device),
            augmentation=batch_augmentation(batch, self.augment, key=key),
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
            The global loss (float32 scalar, equal on every rank) and a report: `accuracy`, the fraction of
            clips that are nearest to their own caption.

        Raises:
            UserError: the ranks hold different numbers of clips, or a step has a single clip.
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
        # A clip's own caption is nearest if no difference is negative.
        accuracy = (margins_2GG[1].detach() >= 0).all(dim=1).float().mean()
        return loss, {"accuracy": accuracy}

    def _ids(self, batch: ClipBatch) -> np.ndarray:
        """Return sample and caption ids, float64 (B, 2); the caption id is -1 if the batch has none."""
        captions = np.full(len(batch), -1) if batch.caption_ids is None else batch.caption_ids
        if self.is_graded and (captions < 0).any():
            raise UserError(
                "symmetric-multi-similarity needs the caption that each text is; set data.text to `relevant`"
            )
        return np.stack([batch.sample_ids, captions], axis=1).astype(np.float64)

    def _relevancy(self, ids_G2: Tensor) -> Tensor:
        """Return the relevancy of the step's captions to its clips, float32 (G, G), on the ids' device."""
        if self.captions is None:
            raise UserError("symmetric-multi-similarity needs a training manifest with captions")
        sample_ids, caption_ids = ids_G2.cpu().numpy().astype(np.int64).T
        relevancy_GG = np.ascontiguousarray(self.captions.relevancy(sample_ids, caption_ids), dtype=np.float32)
        return torch.from_numpy(relevancy_GG).to(ids_G2.device, non_blocking=True)


def _mean_off_diagonal(terms_2GG: Tensor) -> Tensor:
    """Average over all pairs except the G matching ones of each direction."""
    clips = terms_2GG.shape[-1]
    is_other_GG = ~torch.eye(clips, dtype=torch.bool, device=terms_2GG.device)
    return (terms_2GG * is_other_GG).sum() / (2 * clips * (clips - 1))
