"""Accuracies against the published evaluation's vectors and against loops."""

from __future__ import annotations

import numpy as np
import pytest

from avion_dali.contracts import UserError
from avion_dali.metrics.accuracy import (
    class_scores,
    marginalize,
    mean_class_accuracy,
    part_accuracy,
    softmax,
    top_k_accuracy,
)

# Classes '0:0', '0:1', '10:2', '1:0', '2:1' in string order, as EPIC-KITCHENS-100's table has them.
VERBS, NOUNS = (0, 0, 10, 1, 2), (0, 1, 2, 0, 1)
PROBABILITIES = np.array([[0.30, 0.05, 0.25, 0.28, 0.12], [0.1, 0.2, 0.3, 0.15, 0.25]])


def test_verb_and_noun_vectors():
    verbs = marginalize(PROBABILITIES, VERBS)
    assert verbs[:, [0, 1, 2, 10]] == pytest.approx(
        np.array([[0.35, 0.28, 0.12, 0.25], [0.30, 0.15, 0.25, 0.30]])
    )
    assert (verbs[:, 3:10] == 0).all(), "ids that no class has get nothing"
    assert marginalize(PROBABILITIES, NOUNS) == pytest.approx(
        np.array([[0.58, 0.17, 0.25], [0.25, 0.45, 0.30]])
    )


def test_verb_and_noun_accuracy_follow_sums_not_the_best_action():
    # The first sample's best action has verb 0 and noun 0; the second's noun by sums is 1, by best action 2.
    assert part_accuracy(PROBABILITIES, np.array([1, 4]), part_K=VERBS) == 0.5
    assert part_accuracy(PROBABILITIES, np.array([3, 1]), part_K=NOUNS) == 1.0
    assert part_accuracy(PROBABILITIES, np.array([3, 2]), part_K=NOUNS) == 0.5


def test_confusion_vector():
    confusion = [[3, 1, 0], [0, 0, 2], [0, 0, 4]]
    pairs = [(i, j) for i, row in enumerate(confusion) for j, n in enumerate(row) for _ in range(n)]
    labels, predicted = np.array(pairs).T
    assert mean_class_accuracy(predicted, labels) == pytest.approx(0.583333, abs=1e-6)
    assert top_k_accuracy(np.eye(3)[predicted], labels, k=1) == pytest.approx(0.7)


def test_classes_that_do_not_occur_are_left_out_of_the_mean():
    assert mean_class_accuracy(np.array([7, 7]), np.array([7, 900])) == 0.5


def test_top_k_against_sorting():
    generator = np.random.default_rng(0)
    scores = generator.integers(0, 6, (50, 9)).astype(np.float32)  # most are tied
    labels = generator.integers(0, 9, 50)
    for k in (1, 5, 9):
        ranked = [sorted(range(9), key=lambda c, row=row: (-row[c], c))[:k] for row in scores.tolist()]
        expected = np.mean([label in best for label, best in zip(labels, ranked, strict=True)])
        assert top_k_accuracy(scores, labels, k=k) == pytest.approx(expected)
    assert top_k_accuracy(scores, labels, k=9) == 1.0


def test_constant_scores_are_not_rewarded():
    labels = np.arange(10)
    assert top_k_accuracy(np.zeros((10, 10)), labels, k=1) == 0.1


def test_softmax_is_stable_and_keeps_the_type():
    logits = np.array([[1e4, 1e4 - 1.0], [-1e4, 0.0]], dtype=np.float32)
    probabilities = softmax(logits)
    assert probabilities.dtype == np.float32
    assert probabilities == pytest.approx(np.array([[1 / (1 + np.exp(-1)), 1 / (1 + np.e)], [0, 1]]), abs=1e-6)


def test_all_scores_together():
    scores = class_scores(PROBABILITIES, np.array([0, 2]), verbs=VERBS, nouns=NOUNS)
    assert scores == {"top1": 1.0, "top5": 1.0, "mean_class": 1.0, "verb_top1": 0.5, "noun_top1": 0.5}
    assert class_scores(PROBABILITIES, np.array([0, 2])) == {"top1": 1.0, "top5": 1.0, "mean_class": 1.0}


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (np.zeros((2, 3)), np.array([0]), "one row per label"),
        (np.zeros((0, 3)), np.array([], dtype=int), "not empty"),
        (np.full((1, 3), np.nan), np.array([0]), "not finite"),
        (np.zeros((1, 3)), np.array([3]), "3 classes"),
        (np.zeros((1, 3)), np.array([-1]), "class of the training manifest"),
    ],
)
def test_meaningless_input_is_refused(scores, labels, message):
    with pytest.raises(UserError, match=message):
        class_scores(scores, labels)
