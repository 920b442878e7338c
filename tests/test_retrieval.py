import math

import numpy as np
import pytest

from avion_dali.contracts import UserError
from avion_dali.metrics import retrieval
from avion_dali.metrics.retrieval import (
    binary_mean_average_precision,
    chance_scores,
    first_positive_ranks,
    mean_average_precision,
    median_rank,
    ndcg,
    recall_at,
    retrieval_scores,
)

# Vectors computed with the published evaluation code: similarity, relevancy, graded mAP, binary mAP, nDCG.
VECTORS = {
    "A": (
        [[0.9, 0.2, 0.4], [0.8, 0.3, 0.7], [0.6, 0.65, 0.1], [0.2, 0.4, 0.95]],
        [[1, 0.5, 0], [0.5, 1, 0.25], [1, 0.5, 0.5], [0, 0.25, 1]],
        (0.833333, 0.833333, 0.833333),
        (0.708333, 0.722222),
        (0.861508, 0.863192, 0.862350),
    ),
    "B": (
        [[0.11, 0.92, 0.35], [0.74, 0.21, 0.66], [0.48, 0.57, 0.39], [0.83, 0.05, 0.62]],
        [[1, 0, 0.5], [0.5, 0, 1], [0, 1, 0.25], [1, 0.5, 0]],
        (0.812500, 0.770833, 0.791667),
        (0.708333, 0.75),
        (0.680869, 0.653331, 0.667100),
    ),
    "C": (
        [[0.1, 0.9, 0.8, 0.3], [0.7, 0.6, 0.5, 0.4]],
        [[1, 0, 1, 0.5], [0, 1, 1, 1]],
        (0.600694, 0.75, 0.675347),
        None,
        (0.499535, 0.5, 0.499767),
    ),
    "D": (
        [
            [0.5488, 0.7152, 0.6028, 0.5449, 0.4237],
            [0.6459, 0.4376, 0.8918, 0.9637, 0.3834],
            [0.7917, 0.5289, 0.568, 0.9256, 0.071],
            [0.0871, 0.0202, 0.8326, 0.7782, 0.87],
            [0.9786, 0.7992, 0.4615, 0.7805, 0.1183],
            [0.6399, 0.1434, 0.9447, 0.5218, 0.4147],
        ],
        [
            [0.75, 0.5, 0.75, 1, 0.75],
            [0, 1, 1, 0, 0],
            [0.25, 0.25, 0.5, 1, 0],
            [1, 0.75, 0, 0.25, 0.5],
            [0.5, 0.75, 0, 1, 0.25],
            [0.75, 0.25, 0.25, 0.75, 1],
        ],
        (0.687500, 0.629444, 0.658472),
        (0.430556, 0.367778),
        (0.735652, 0.714059, 0.724855),
    ),
    "E": (
        [[0.5] * 3] * 4,
        [[1, 0.5, 0], [0.5, 1, 0.25], [1, 0, 0.5], [0, 0.25, 1]],
        (0.791667, 0.701389, 0.746528),
        None,
        (0.601255, 0.663004, 0.632130),
    ),
}


def both(score: retrieval.DirectionalScore) -> tuple[float, float, float]:
    return score.video_to_text, score.text_to_video, score.average


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", VECTORS)
def test_published_evaluation_vectors(name, dtype):
    similarity, relevancy, graded, binary, gain = VECTORS[name]
    arrays = np.array(similarity, dtype), np.array(relevancy, dtype)
    assert both(mean_average_precision(*arrays)) == pytest.approx(graded, abs=1e-6)
    assert both(ndcg(*arrays)) == pytest.approx(gain, abs=1e-6)
    if binary is not None:
        assert both(binary_mean_average_precision(*arrays))[:2] == pytest.approx(binary, abs=1e-6)


def test_query_without_positive_is_left_out_and_counted():
    scores = retrieval_scores(np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([[0.5, 0.25], [0, 1]]))
    assert both(scores.mean_average_precision) == (1.0, 1.0, 1.0)
    assert scores.mean_average_precision.queries == (1, 1)
    assert scores.mean_average_precision.queries_without_positive == (1, 1)
    assert both(scores.ndcg) == (1.0, 1.0, 1.0)
    assert scores.ndcg.queries == (2, 2) and scores.ndcg.queries_without_positive == (0, 0)


def test_data_without_any_positive_has_no_score():
    scores = retrieval_scores(np.eye(3), np.zeros((3, 3)))
    assert math.isnan(scores.mean_average_precision.average) and math.isnan(scores.ndcg.video_to_text)
    assert scores.ndcg.queries == (0, 0) and scores.ndcg.queries_without_positive == (3, 3)


def test_nearly_one_is_not_an_exact_match():
    almost = np.array([[0.9999999, 0.0]])
    assert mean_average_precision(np.ones((1, 2)), almost).queries == (0, 0)


def textbook(similarity, relevancy):
    """Query by query, item by item, with Python's sort: graded AP, binary AP and nDCG of the rows."""
    rows = []
    for s, r in zip(similarity.tolist(), relevancy.tolist(), strict=True):
        best_first = sorted(range(len(s)), key=lambda g: (-s[g], g))
        graded = binary = credit = exact = 0.0
        for k, g in enumerate(best_first, start=1):
            credit, exact = credit + r[g], exact + (r[g] == 1)
            if r[g] == 1:
                graded, binary = graded + credit / k, binary + exact / k
        cut = sum(value > 0 for value in r)
        best_last = sorted(range(len(s)), key=lambda g: (-s[g], -g))
        gain = sum(r[g] / math.log2(k + 1) for k, g in enumerate(best_last[:cut], start=1))
        ideal = sum(v / math.log2(k + 1) for k, v in enumerate(sorted(r, reverse=True)[:cut], start=1))
        rows.append((graded / exact, binary / exact, gain / ideal))
    return np.mean(rows, axis=0)


@pytest.mark.parametrize("block_elements", [1, 100, 1 << 21])
def test_random_matrices_with_ties_and_negatives_against_loops(monkeypatch, block_elements):
    monkeypatch.setattr(retrieval, "_BLOCK_ELEMENTS", block_elements)
    generator = np.random.default_rng(0)
    similarity = generator.integers(-5, 6, (23, 31)) / 5.0  # 11 values: most are tied, some are zero
    similarity[::2] *= -1.0  # and zeros of both signs
    relevancy = generator.choice([0, 0.25, 0.5, 1], (23, 31), p=[0.5, 0.2, 0.2, 0.1])
    relevancy[:, 0] = relevancy[0] = 1.0
    scores = retrieval_scores(similarity, relevancy)
    measures = scores.mean_average_precision, scores.binary_mean_average_precision, scores.ndcg
    assert [m.video_to_text for m in measures] == pytest.approx(textbook(similarity, relevancy), abs=1e-9)
    assert [m.text_to_video for m in measures] == pytest.approx(textbook(similarity.T, relevancy.T), abs=1e-9)


def test_only_the_order_of_similarities_matters():
    generator = np.random.default_rng(1)
    similarity = generator.standard_normal((12, 9)).astype(np.float32)
    relevancy = generator.choice([0.0, 0.5, 1.0], (12, 9))
    expected = retrieval_scores(similarity, relevancy)
    assert retrieval_scores(np.exp(similarity), relevancy) == expected
    transposed = retrieval_scores(similarity.T, relevancy.T)
    assert transposed.ndcg.text_to_video == expected.ndcg.video_to_text


def test_relevancy_as_similarity_is_perfect():
    relevancy = np.random.default_rng(2).choice([0.0, 0.5, 1.0], (10, 10)) + np.eye(10)
    relevancy = np.minimum(relevancy, 1.0)
    scores = retrieval_scores(relevancy, relevancy)
    assert scores.ndcg.average == pytest.approx(1.0) and scores.binary_mean_average_precision.average == 1.0


def test_chance_scores_lie_where_shuffling_puts_them():
    relevancy = np.eye(40)
    chance = chance_scores(relevancy, permutations=30, seed=3)
    # One positive at a uniform rank: the expected AP is the mean of 1/k, the expected nDCG is P(rank 1).
    expected = float(np.mean(1.0 / np.arange(1, 41)))
    assert chance.mean_average_precision.average == pytest.approx(expected, abs=0.02)
    assert chance.ndcg.average == pytest.approx(1 / 40, abs=0.015)
    assert chance.mean_average_precision.queries == (40, 40)
    assert chance_scores(relevancy, permutations=30, seed=3) == chance
    assert chance_scores(relevancy, permutations=30, seed=4) != chance
    with pytest.raises(ValueError, match="permutations"):
        chance_scores(relevancy, permutations=0)


@pytest.mark.parametrize(
    ("similarity", "relevancy", "message"),
    [
        (np.zeros((2, 3)), np.zeros((3, 2)), "must have one"),
        (np.zeros((0, 3)), np.zeros((0, 3)), "not empty"),
        (np.array([[np.nan]]), np.ones((1, 1)), "not finite"),
        (np.ones((1, 1)), np.array([[1.5]]), r"in \[0, 1\]"),
        (np.ones((1, 1)), np.array([[np.nan]]), r"in \[0, 1\]"),
    ],
)
def test_meaningless_input_is_refused(similarity, relevancy, message):
    with pytest.raises(UserError, match=message):
        retrieval_scores(similarity, relevancy)


def test_ranks_of_the_first_match_in_a_case_counted_by_hand():
    similarity = np.array([[0.9, 0.8, 0.1], [0.5, 0.5, 0.5], [0.3, 0.2, 0.1]])
    relevancy = np.array([[0.0, 1.0, 1.0], [0.5, 1.0, 0.0], [0.9, 0.0, 0.0]])
    # Row 1: the match ties with two others, which come first; row 2 has no match.
    np.testing.assert_array_equal(first_positive_ranks(similarity, relevancy), [2.0, 3.0, np.nan])
    assert recall_at(similarity, relevancy, k=1) == 0.0
    assert recall_at(similarity, relevancy, k=2) == 0.5
    assert recall_at(similarity, relevancy, k=3) == 1.0
    assert median_rank(similarity, relevancy) == 2.5


def test_recall_agrees_with_a_plain_sort():
    rng = np.random.default_rng(3)
    similarity = rng.normal(size=(40, 30))
    relevancy = (rng.random((40, 30)) < 0.1).astype(np.float32)
    order = np.argsort(-similarity, axis=1)
    found = [set(np.flatnonzero(relevancy[q])) for q in range(40)]
    for k in (1, 5, 10):
        hits = [bool(positives & set(order[q, :k])) for q, positives in enumerate(found) if positives]
        assert recall_at(similarity, relevancy, k=k) == pytest.approx(np.mean(hits))


def test_measures_without_any_match_do_not_exist():
    assert np.isnan(recall_at(np.ones((2, 2)), np.zeros((2, 2)), k=1))
    assert np.isnan(median_rank(np.ones((2, 2)), np.zeros((2, 2))))
