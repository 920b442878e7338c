"""Retrieval between the clips and the captions of a manifest: EPIC-KITCHENS-100's protocol for any data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch.nn import functional

from avion_dali.config import Normalization
from avion_dali.contracts import ClipBatch, UserError
from avion_dali.data.manifest import Manifest
from avion_dali.data.relevancy import open_captions
from avion_dali.data.text import pad_tokens
from avion_dali.device_ops.normalize import normalize_frames
from avion_dali.engine.distributed import Distributed
from avion_dali.engine.per_sample import SampleSums
from avion_dali.engine.precision import Precision, autocast
from avion_dali.metrics.retrieval import RetrievalScores, retrieval_scores
from avion_dali.models.dual_encoder import DualEncoder

FramesTransform = Callable[[torch.Tensor], torch.Tensor]
_TEXTS_PER_PASS = 256
_CLIPS_PER_BLOCK = 2048


@dataclass(frozen=True)
class Gallery:
    """The unique captions of a manifest and how relevant each is to each clip.

    Args:
        texts: unique captions, in order of first appearance.
        tokens: their token ids.
        relevancy_VT: float32 (clips, captions) in [0, 1].
    """

    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    relevancy_VT: np.ndarray


@dataclass(frozen=True)
class RetrievalResult:
    """Outcome of a retrieval evaluation, the same on every rank.

    Args:
        scores: all measures.
        similarity_VT: float32 cosine of each scored clip with each caption.
        relevancy_VT: float32 relevancy of the same pairs.
        sample_ids: int64 (V,), the manifest rows of the clips.
        texts: the captions.
        unreadable: clips that could not be read and are not scored.
    """

    scores: RetrievalScores
    similarity_VT: np.ndarray
    relevancy_VT: np.ndarray
    sample_ids: np.ndarray
    texts: tuple[str, ...]
    unreadable: int

    def metrics(self) -> dict[str, float]:
        """Return the numbers to log, as fractions."""
        mean_ap, ndcg = self.scores.mean_average_precision, self.scores.ndcg
        return {
            "map_avg": mean_ap.average,
            "map_v2t": mean_ap.video_to_text,
            "map_t2v": mean_ap.text_to_video,
            "ndcg_avg": ndcg.average,
            "ndcg_v2t": ndcg.video_to_text,
            "ndcg_t2v": ndcg.text_to_video,
            "binary_map_avg": self.scores.binary_mean_average_precision.average,
            "clips": len(self.sample_ids),
            "unreadable": self.unreadable,
        }


def build_gallery(manifest: Manifest) -> Gallery:
    """Collect a manifest's unique captions and grade them against its clips.

    See `avion_dali.data.relevancy.open_captions` for what is relevant to what.

    Args:
        manifest: the evaluation manifest.
    """
    captions = open_captions(manifest)
    return Gallery(captions.texts, captions.tokens, captions.relevancy(np.arange(manifest.num_samples)))


def evaluate_retrieval(
    model: DualEncoder,
    batches: Iterable[ClipBatch],
    gallery: Gallery,
    *,
    normalization: Normalization,
    precision: Precision,
    distributed: Distributed,
    transform: FramesTransform | None = None,
) -> RetrievalResult:
    """Embed all clips and captions and score the retrieval in both directions.

    The vectors of a row's clips and crops are averaged and made unit vectors again. Similarity and relevancy
    are float32 (clips, captions): for EPIC-KITCHENS-100's 9,668 clips and 3,842 captions 149 MB each, on the
    CPU of every rank; the device holds a block of similarities at a time.

    Args:
        model: the bare dual encoder, in evaluation mode.
        batches: this rank's share of the manifest's clips, any number of clips a row and crops a clip.
        gallery: the captions.
        normalization: pixel mean and deviation.
        precision: of the forward passes.
        distributed: this rank among all.
        transform: changes frames (B, T, H, W, C) before the model, for controls such as frozen frames.

    Raises:
        UserError: when not one clip could be read.
    """
    device = distributed.device
    sums = SampleSums()
    with torch.inference_mode():
        for batch in batches:
            if not len(batch):  # the last share of a rank may be empty
                continue
            frames = batch.frames_BTHWC if transform is None else transform(batch.frames_BTHWC)
            with autocast(precision, device):
                sums.add(batch, model.encode_video(normalize_frames(frames, normalization)))
        with autocast(precision, device):
            text_TD = _embed_texts(model, gallery, device)
        clips = sums.gather(text_TD.shape[1], device)
        rows = clips.sample_ids
        if not len(rows):
            raise UserError(
                f"not one of {clips.unreadable} evaluation clips could be read; see quarantine.jsonl"
            )
        similarity = _similarity(torch.from_numpy(clips.means_SX).to(device), text_TD)
    everything = len(rows) == len(gallery.relevancy_VT)
    relevancy = gallery.relevancy_VT if everything else gallery.relevancy_VT[rows]
    scores = retrieval_scores(similarity, relevancy)
    return RetrievalResult(scores, similarity, relevancy, rows, gallery.texts, clips.unreadable)


def freeze_first_frame(frames_BTHWC: torch.Tensor) -> torch.Tensor:
    """Repeat each clip's first frame: a control that takes the motion away and leaves the picture.

    Args:
        frames_BTHWC: uint8 (B, T, H, W, C).
    """
    return frames_BTHWC[:, :1].expand_as(frames_BTHWC).contiguous()


def _similarity(video_VD: torch.Tensor, text_TD: torch.Tensor) -> np.ndarray:
    """Cosines of clips (any length) and captions (unit length), float32 (V, T) on the CPU."""
    blocks = functional.normalize(video_VD, dim=1).split(_CLIPS_PER_BLOCK)
    return torch.cat([(block @ text_TD.T).cpu() for block in blocks]).numpy()


def _embed_texts(model: DualEncoder, gallery: Gallery, device: torch.device) -> torch.Tensor:
    tokens_TL = torch.from_numpy(pad_tokens(gallery.tokens, cast(int, model.textual.context_length))).to(device)
    return torch.cat([model.encode_text(part).float() for part in tokens_TL.split(_TEXTS_PER_PASS)])
