"""Recognition accuracy, for classes and for the verbs and nouns of actions.

Definitions follow the EPIC-KITCHENS-100 action recognition benchmark (Damen et al. 2022, "Rescaling
Egocentric Vision", arXiv 2006.13256) as AVION evaluates it, so results are comparable with published ones.
Axes: N samples, K classes, P parts (verbs or nouns).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from avion_dali.contracts import UserError

Floats = NDArray[np.floating]
Integers = NDArray[np.integer]


def softmax(logits_NK: Floats) -> Floats:
    """Convert logits to probabilities, float (N, K) -> (N, K) of the same dtype."""
    exponentials_NK = np.exp(logits_NK - logits_NK.max(axis=1, keepdims=True))
    probabilities_NK: Floats = exponentials_NK / exponentials_NK.sum(axis=1, keepdims=True)
    return probabilities_NK


def top_k_accuracy(scores_NK: Floats, label_N: Integers, *, k: int) -> float:
    """Share of samples whose class is among the `k` highest scores.

    Among equal scores the lower class index ranks first, so constant scores gain nothing.

    Args:
        scores_NK: float (N, K).
        label_N: class of each sample.
        k: number of highest scores considered, >= 1.
    """
    own_N1 = np.take_along_axis(scores_NK, label_N[:, None], axis=1)
    is_before_NK = np.arange(scores_NK.shape[1])[None, :] < label_N[:, None]
    ahead_N = ((scores_NK > own_N1) | ((scores_NK == own_N1) & is_before_NK)).sum(axis=1)
    return float((ahead_N < k).mean())


def mean_class_accuracy(predicted_N: Integers, label_N: Integers) -> float:
    """Accuracy per class, averaged over the classes that occur among the labels.

    Args:
        predicted_N: predicted class of each sample.
        label_N: class of each sample.
    """
    _, class_N, counts = np.unique(label_N, return_inverse=True, return_counts=True)
    right = np.bincount(class_N, weights=predicted_N == label_N, minlength=len(counts))
    return float((right / counts).mean())


CLASS_METRICS: dict[str, Callable[[Floats, Integers], float]] = {
    "top1": partial(top_k_accuracy, k=1),
    "top5": partial(top_k_accuracy, k=5),
    "mean_class": lambda scores_NK, label_N: mean_class_accuracy(scores_NK.argmax(axis=1), label_N),
}
"""Metrics of every recognition evaluation; each maps (scores_NK, label_N) to a number. `top1` and `top5`
are `top_k_accuracy` with k = 1 and 5, `mean_class` is `mean_class_accuracy`."""


def class_scores(
    scores_NK: Floats, label_N: Integers, *, verbs: Sequence[int] = (), nouns: Sequence[int] = ()
) -> dict[str, float]:
    """Compute all accuracies of one set of scores.

    Args:
        scores_NK: one score per sample and class; must be probabilities if verbs and nouns are given.
        label_N: class of each sample.
        verbs: verb id of each class, or empty.
        nouns: noun id of each class, or empty.

    Returns:
        Fractions in [0, 1] by name: those of `CLASS_METRICS`, and `verb_top1` and `noun_top1` if the classes
        have verbs and nouns.

    Raises:
        UserError: the shapes do not match, a score is not finite, or a label is out of range.
    """
    _check(scores_NK, label_N)
    scores = {name: metric(scores_NK, label_N) for name, metric in CLASS_METRICS.items()}
    parts = {"verb_top1": verbs, "noun_top1": nouns}
    return scores | {
        name: part_accuracy(scores_NK, label_N, part_K=part) for name, part in parts.items() if len(part)
    }


def marginalize(probabilities_NK: Floats, part_K: Sequence[int] | Integers) -> Floats:
    """Probability of each verb (or noun): the sum over the classes that contain it.

    Args:
        probabilities_NK: class probabilities, float (N, K).
        part_K: verb (or noun) id of each class, >= 0.

    Returns:
        Float (N, P), where P is the largest id plus one. An id that no class has gets 0.
    """
    part_of_class_K = np.asarray(part_K)
    has_part_KP = np.zeros((len(part_of_class_K), int(part_of_class_K.max()) + 1), probabilities_NK.dtype)
    has_part_KP[np.arange(len(part_of_class_K)), part_of_class_K] = 1.0
    summed_NP: Floats = probabilities_NK @ has_part_KP
    return summed_NP


def part_accuracy(probabilities_NK: Floats, label_N: Integers, *, part_K: Sequence[int]) -> float:
    """Share of samples whose most probable verb (or noun) is that of their class.

    Args:
        probabilities_NK: class probabilities, float (N, K).
        label_N: class of each sample.
        part_K: verb (or noun) id of each class.
    """
    return float((marginalize(probabilities_NK, part_K).argmax(axis=1) == np.asarray(part_K)[label_N]).mean())


def _check(scores_NK: Floats, label_N: Integers) -> None:
    """Reject inputs whose result would be meaningless."""
    if scores_NK.ndim != 2 or len(scores_NK) != len(label_N) or scores_NK.size == 0:
        raise UserError(
            f"recognition: scores {scores_NK.shape} must be (samples, classes) with one row per label "
            f"({len(label_N)}), and not empty"
        )
    if not np.isfinite(scores_NK).all():
        raise UserError("recognition: a score is not finite; the model's weights are broken")
    if label_N.min() < 0 or label_N.max() >= scores_NK.shape[1]:
        raise UserError(
            f"recognition: labels lie in [{label_N.min()}, {label_N.max()}], the model has "
            f"{scores_NK.shape[1]} classes; every row of the manifest needs a class of the training manifest"
        )
