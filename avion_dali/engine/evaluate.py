"""Zero-shot retrieval between the clips and the captions of a manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from avion_dali.config import Normalization
from avion_dali.contracts import ClipBatch, UserError
from avion_dali.data.manifest import Manifest, Sample
from avion_dali.data.text import pad_tokens
from avion_dali.device_ops.normalize import normalize_frames
from avion_dali.engine.distributed import Distributed, all_gather_rows
from avion_dali.engine.precision import Precision, autocast
from avion_dali.metrics.retrieval import RetrievalScores, relevancy_from_classes, retrieval_scores
from avion_dali.models.dual_encoder import DualEncoder

FramesTransform = Callable[[torch.Tensor], torch.Tensor]
_TEXTS_PER_PASS = 256


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
            "clips": float(len(self.sample_ids)),
            "unreadable": float(self.unreadable),
        }


def build_gallery(manifest: Manifest) -> Gallery:
    """Collect a manifest's unique captions and grade them against its clips.

    When every clip has verb and noun classes, relevancy is the mean of verb equality and noun overlap
    (`relevancy_from_classes`). Without, a caption is relevant (1) to the clips that carry its very text.

    Args:
        manifest: the evaluation manifest.
    """
    samples = [manifest.sample(row) for row in range(manifest.num_samples)]
    unique: dict[tuple[str, str, tuple[str, ...]], Sample] = {}
    for sample in samples:
        unique.setdefault((sample.text, sample.verb, sample.nouns), sample)
    captions = list(unique.values())
    if all(s.verb and s.nouns for s in samples):
        relevancy = relevancy_from_classes(*_classes(samples, captions))
    else:
        number = {text: i for i, text in enumerate(dict.fromkeys(c.text for c in captions))}
        rows, columns = ([number[s.text] for s in group] for group in (samples, captions))
        relevancy = np.equal.outer(rows, columns).astype(np.float32)
    return Gallery(tuple(c.text for c in captions), tuple(c.tokens for c in captions), relevancy)


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

    Args:
        model: the bare dual encoder, in evaluation mode.
        batches: this rank's share of the manifest's clips.
        gallery: the captions.
        normalization: pixel mean and deviation.
        precision: of the forward passes.
        distributed: this rank among all.
        transform: changes frames (B, T, H, W, C) before the model, for controls such as frozen frames.

    Raises:
        UserError: when not one clip could be read.
    """
    device = distributed.device
    features, ids, unreadable = [], [], 0
    with torch.inference_mode():
        for batch in batches:
            if not len(batch):  # the last share of a rank may be empty
                continue
            valid = torch.from_numpy(batch.valid)
            unreadable += int((~valid).sum())
            frames = batch.frames_BTHWC if transform is None else transform(batch.frames_BTHWC)
            with autocast(precision, device):
                embedded = model.encode_video(normalize_frames(frames, normalization))
            features.append(embedded.float()[valid.to(device)])
            ids.append(torch.from_numpy(batch.sample_ids)[valid].to(device))
        with autocast(precision, device):
            text_TD = _embed_texts(model, gallery, device)
        width = text_TD.shape[1]
        video_VD = all_gather_rows(torch.cat([text_TD.new_zeros(0, width), *features]))
        sample_ids = all_gather_rows(torch.cat([torch.zeros(0, dtype=torch.int64, device=device), *ids]))
        lost = int(all_gather_rows(torch.tensor([unreadable], device=device)).sum())
        similarity = (video_VD @ text_TD.T).cpu().numpy()
    rows = sample_ids.cpu().numpy()
    if not len(rows):
        raise UserError(f"not one of {lost} evaluation clips could be read; see quarantine.jsonl")
    order = np.argsort(rows)
    rows, similarity = rows[order], similarity[order]
    relevancy = gallery.relevancy_VT[rows]
    scores = retrieval_scores(similarity, relevancy)
    return RetrievalResult(scores, similarity, relevancy, rows, gallery.texts, lost)


def freeze_first_frame(frames_BTHWC: torch.Tensor) -> torch.Tensor:
    """Repeat each clip's first frame: a control that takes the motion away and leaves the picture.

    Args:
        frames_BTHWC: uint8 (B, T, H, W, C).
    """
    return frames_BTHWC[:, :1].expand_as(frames_BTHWC).contiguous()


def _embed_texts(model: DualEncoder, gallery: Gallery, device: torch.device) -> torch.Tensor:
    tokens_TL = torch.from_numpy(pad_tokens(gallery.tokens, cast(int, model.textual.context_length))).to(device)
    return torch.cat([model.encode_text(part).float() for part in tokens_TL.split(_TEXTS_PER_PASS)])


def _classes(
    samples: list[Sample], captions: list[Sample]
) -> tuple[list[int], list[list[int]], list[int], list[list[int]]]:
    """Number the verbs and nouns: (verbs, nouns) of the clips, then of the captions."""
    verbs = {verb: i for i, verb in enumerate(sorted({s.verb for s in samples}))}
    nouns = {noun: i for i, noun in enumerate(sorted({n for s in samples for n in s.nouns}))}

    def numbered(rows: list[Sample]) -> tuple[list[int], list[list[int]]]:
        return [verbs[s.verb] for s in rows], [[nouns[n] for n in s.nouns] for s in rows]

    return (*numbered(samples), *numbered(captions))
