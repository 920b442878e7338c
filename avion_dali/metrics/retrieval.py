"""Multi-instance retrieval of texts by clips and of clips by texts, with relevancy in [0, 1].

Definitions follow the EPIC-KITCHENS-100 challenge (Damen et al. 2022, "Rescaling Egocentric Vision",
arXiv 2006.13256, multi-instance retrieval; code by Wray et al. 2019, "Fine-Grained Action Retrieval Through
Multiple Parts-of-Speech Embeddings", arXiv 1908.03477), so results are comparable with published ones.
Axes: Q queries, G gallery items, V clips, T texts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from avion_dali.contracts import UserError

_BLOCK_ELEMENTS = 1 << 21  # similarities ranked at once; keeps the working set near 150 MB

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class DirectionalScore:
    """One metric in both directions, as fractions in [0, 1].

    A query without a positive has no score; it is excluded from the mean and counted. If all queries are
    excluded, the mean is NaN.

    Args:
        video_to_text: mean over clips as queries.
        text_to_video: mean over texts as queries.
        queries: number of scored queries (clips, texts).
        queries_without_positive: number of excluded queries (clips, texts).
    """

    video_to_text: float
    text_to_video: float
    queries: tuple[int, int]
    queries_without_positive: tuple[int, int]

    @property
    def average(self) -> float:
        """Arithmetic mean of both directions."""
        return (self.video_to_text + self.text_to_video) / 2.0


@dataclass(frozen=True)
class RetrievalScores:
    """All metrics of one similarity matrix.

    Args:
        mean_average_precision: see `mean_average_precision`.
        binary_mean_average_precision: see `binary_mean_average_precision`.
        ndcg: see `ndcg`.
    """

    mean_average_precision: DirectionalScore
    binary_mean_average_precision: DirectionalScore
    ndcg: DirectionalScore


def retrieval_scores(similarity_VT: Floats, relevancy_VT: Floats) -> RetrievalScores:
    """Compute all retrieval metrics in both directions.

    Similarities are ranked in float32. Ties are broken as in the published evaluation: lower index first for
    average precision, higher index first for nDCG.

    Args:
        similarity_VT: float (V, T), larger is more similar; only the order matters.
        relevancy_VT: float (V, T) in [0, 1]; exactly 1 means that all classes are equal.

    Returns:
        Mean average precision, its binary form, and nDCG.

    Raises:
        UserError: when shapes differ, a similarity is not finite or a relevancy lies outside [0, 1].
    """
    _check(similarity_VT, relevancy_VT)
    by_video = _direction(similarity_VT, relevancy_VT)
    by_text = _direction(similarity_VT.T, relevancy_VT.T)
    return RetrievalScores(
        *(_pair(to_text, to_video) for to_text, to_video in zip(by_video, by_text, strict=True))
    )


def mean_average_precision(similarity_VT: Floats, relevancy_VT: Floats) -> DirectionalScore:
    """Mean average precision as the challenge computes it, with relevancy in [0, 1].

    With r_k the relevancy at rank k, AP = sum over ranks with r_k == 1 of (r_1 + ... + r_k) / k, divided by
    the number of items with r == 1. Only exact matches contribute terms, but partly relevant items ranked above
    them add fractions, so values are >= those of the binary form.

    Args:
        similarity_VT: float (V, T).
        relevancy_VT: float (V, T) in [0, 1].

    Returns:
        The mean over queries with at least one item of relevancy exactly 1.
    """
    return retrieval_scores(similarity_VT, relevancy_VT).mean_average_precision


def binary_mean_average_precision(similarity_VT: Floats, relevancy_VT: Floats) -> DirectionalScore:
    """Standard mean average precision: items of relevancy exactly 1 are correct, all others are wrong.

    Args:
        similarity_VT: float (V, T).
        relevancy_VT: float (V, T) in [0, 1].

    Returns:
        The mean over queries with at least one item of relevancy exactly 1.
    """
    return retrieval_scores(similarity_VT, relevancy_VT).binary_mean_average_precision


def ndcg(similarity_VT: Floats, relevancy_VT: Floats) -> DirectionalScore:
    """Normalized discounted cumulative gain, cut at a query's number of relevant items.

    DCG = sum over ranks k <= K of r_k / log2(k + 1) with K the number of items with r > 0, divided by the same
    sum in the best possible order (Jarvelin & Kekalainen 2002, doi 10.1145/582415.582418).

    Args:
        similarity_VT: float (V, T).
        relevancy_VT: float (V, T) in [0, 1].

    Returns:
        The mean over queries with at least one item of relevancy above 0.
    """
    return retrieval_scores(similarity_VT, relevancy_VT).ndcg


def first_positive_ranks(similarity_QG: Floats, relevancy_QG: Floats) -> Floats:
    """Rank of the best exact match of each query, counted from 1.

    Items that are as similar as the best match rank before it, so constant similarities gain nothing.

    Args:
        similarity_QG: float (Q, G), larger is more similar.
        relevancy_QG: float (Q, G) in [0, 1]; exactly 1 is a match.

    Returns:
        Float64 (Q,); NaN for a query without a match.
    """
    ranks_Q = np.full(len(similarity_QG), np.nan)
    block = max(1, _BLOCK_ELEMENTS // similarity_QG.shape[1])
    for start in range(0, len(ranks_Q), block):
        rows = slice(start, start + block)
        is_match_QG = relevancy_QG[rows] == 1.0
        best_Q1 = np.where(is_match_QG, similarity_QG[rows], -np.inf).max(axis=1, keepdims=True)
        ahead_Q = ((similarity_QG[rows] >= best_Q1) & ~is_match_QG).sum(axis=1)
        ranks_Q[rows] = np.where(is_match_QG.any(axis=1), ahead_Q + 1.0, np.nan)
    return ranks_Q


def recall_at(similarity_QG: Floats, relevancy_QG: Floats, *, k: int) -> float:
    """Share of queries with a match among their k nearest items; NaN if no query has a match.

    Queries without any match are excluded.

    Args:
        similarity_QG: float (Q, G).
        relevancy_QG: float (Q, G) in [0, 1].
        k: number of nearest items considered, >= 1.
    """
    ranks_Q = first_positive_ranks(similarity_QG, relevancy_QG)
    ranks_Q = ranks_Q[~np.isnan(ranks_Q)]
    return float((ranks_Q <= k).mean()) if len(ranks_Q) else float("nan")


def median_rank(similarity_QG: Floats, relevancy_QG: Floats) -> float:
    """Median rank of the best match over the queries that have a match; NaN if no query has one.

    Args:
        similarity_QG: float (Q, G).
        relevancy_QG: float (Q, G) in [0, 1].
    """
    ranks_Q = first_positive_ranks(similarity_QG, relevancy_QG)
    ranks_Q = ranks_Q[~np.isnan(ranks_Q)]
    return float(np.median(ranks_Q)) if len(ranks_Q) else float("nan")


RETRIEVAL_METRICS: dict[str, Callable[[Floats, Floats], float]] = {
    "recall_at_1": partial(recall_at, k=1),
    "recall_at_5": partial(recall_at, k=5),
    "recall_at_10": partial(recall_at, k=10),
    "median_rank": median_rank,
}
"""Metrics per direction that every retrieval evaluation reports besides mean average precision and nDCG,
with the suffixes `_v2t` and `_t2v`; each maps (similarity_QG, relevancy_QG) to a number."""


def chance_scores(relevancy_VT: Floats, *, permutations: int = 20, seed: int = 0) -> RetrievalScores:
    """Scores at chance level: the mean over random similarities.

    Args:
        relevancy_VT: float (V, T) in [0, 1].
        permutations: number of random matrices to average over.
        seed: seed of numpy's default generator.

    Returns:
        Mean scores; query counts are those of one matrix.

    Raises:
        ValueError: when `permutations` < 1.
    """
    if permutations < 1:
        raise ValueError(f"permutations must be >= 1, got {permutations}")
    generator = np.random.default_rng(seed)
    runs = [
        retrieval_scores(generator.random(relevancy_VT.shape, dtype=np.float32), relevancy_VT)
        for _ in range(permutations)
    ]

    def mean(select: Callable[[RetrievalScores], DirectionalScore]) -> DirectionalScore:
        scores = [select(run) for run in runs]
        return DirectionalScore(
            video_to_text=float(np.mean([score.video_to_text for score in scores])),
            text_to_video=float(np.mean([score.text_to_video for score in scores])),
            queries=scores[0].queries,
            queries_without_positive=scores[0].queries_without_positive,
        )

    return RetrievalScores(
        mean_average_precision=mean(lambda run: run.mean_average_precision),
        binary_mean_average_precision=mean(lambda run: run.binary_mean_average_precision),
        ndcg=mean(lambda run: run.ndcg),
    )


def _check(similarity_VT: Floats, relevancy_VT: Floats) -> None:
    """Reject inputs whose result would be meaningless."""
    if similarity_VT.ndim != 2 or similarity_VT.shape != relevancy_VT.shape or similarity_VT.size == 0:
        raise UserError(
            f"retrieval: similarity {similarity_VT.shape} and relevancy {relevancy_VT.shape} must have one "
            "shape, be two-dimensional and not empty"
        )
    if not np.isfinite(similarity_VT).all():
        raise UserError("retrieval: a similarity is not finite; the model's weights or features are broken")
    if not (relevancy_VT.min() >= 0.0 and relevancy_VT.max() <= 1.0):
        raise UserError("retrieval: relevancies must lie in [0, 1]; check the relevancy file")


def _pair(to_text: Floats, to_video: Floats) -> DirectionalScore:
    """Average the scores per query; NaN marks a query without a positive."""
    scored = (int(np.count_nonzero(~np.isnan(to_text))), int(np.count_nonzero(~np.isnan(to_video))))
    return DirectionalScore(
        video_to_text=float(np.nanmean(to_text)) if scored[0] else float("nan"),
        text_to_video=float(np.nanmean(to_video)) if scored[1] else float("nan"),
        queries=scored,
        queries_without_positive=(len(to_text) - scored[0], len(to_video) - scored[1]),
    )


def _direction(similarity_QG: Floats, relevancy_QG: Floats) -> tuple[Floats, Floats, Floats]:
    """Compute AP, binary AP and nDCG of each query, float64 (Q,), one block of rows at a time."""
    queries, gallery = similarity_QG.shape
    block = max(1, _BLOCK_ELEMENTS // gallery)
    scores = np.empty((3, queries))
    for start in range(0, queries, block):
        rows = slice(start, start + block)
        similarity = np.ascontiguousarray(similarity_QG[rows], dtype=np.float32)
        relevancy = np.ascontiguousarray(relevancy_QG[rows])
        first = np.take_along_axis(relevancy, _ranking(similarity, lower_index_first=True), axis=1)
        scores[:2, rows] = _average_precisions(first)
        last = np.take_along_axis(relevancy, _ranking(similarity, lower_index_first=False), axis=1)
        scores[2, rows] = _ndcgs(last)
    return scores[0], scores[1], scores[2]


def _ranking(similarity_QG: NDArray[np.float32], *, lower_index_first: bool) -> NDArray[np.int64]:
    """Gallery indices by decreasing similarity, with a fixed order of ties.

    Similarity and index are packed into one integer and sorted by value. This is many times faster than a
    stable argsort and independent of the platform's sorting algorithm.
    """
    gallery = similarity_QG.shape[1]
    bits = (similarity_QG + np.float32(0.0)).view(np.uint32)  # adding zero turns -0.0 into 0.0
    # In IEEE 754, negative numbers decrease with increasing bits and positive ones increase. The order is
    # inverted here, so that the largest similarity comes first.
    falling = np.where(bits >> 31, bits, ~bits & np.uint32(0x7FFFFFFF))
    index = np.arange(gallery, dtype=np.uint64)
    tie_break = index if lower_index_first else index[::-1]
    keys = (falling.astype(np.uint64) << np.uint64(32)) | tie_break
    keys.sort(axis=1)
    ranked = (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
    return ranked if lower_index_first else gallery - 1 - ranked


def _average_precisions(ranked_QG: Floats) -> tuple[Floats, Floats]:
    """AP and binary AP of each row of relevancies in ranked order; NaN without an exact positive."""
    rank_G = np.arange(1, ranked_QG.shape[1] + 1)
    is_exact_QG = ranked_QG == 1.0
    positives_Q = is_exact_QG.sum(axis=1).astype(np.float64)
    positives_Q[positives_Q == 0] = np.nan
    graded_QG = np.cumsum(ranked_QG, axis=1, dtype=np.float64) / rank_G
    binary_QG = np.cumsum(is_exact_QG, axis=1, dtype=np.float64) / rank_G
    graded_Q = np.where(is_exact_QG, graded_QG, 0.0).sum(axis=1)
    binary_Q = np.where(is_exact_QG, binary_QG, 0.0).sum(axis=1)
    return graded_Q / positives_Q, binary_Q / positives_Q


def _ndcgs(ranked_QG: Floats) -> Floats:
    """The nDCG of each row of relevancies in ranked order; NaN without a relevant item."""
    rank_G = np.arange(1, ranked_QG.shape[1] + 1)
    discount_G = 1.0 / np.log2(rank_G + 1)
    relevant_Q = (ranked_QG > 0).sum(axis=1)
    gain_Q = np.where(rank_G <= relevant_Q[:, None], ranked_QG, 0.0) @ discount_G
    # In the ideal order all items beyond the cut are zero, so no cut is needed.
    ideal_Q = np.sort(ranked_QG, axis=1)[:, ::-1] @ discount_G
    ideal_Q[relevant_Q == 0] = np.nan
    scores_Q: Floats = gain_Q / ideal_Q
    return scores_Q
