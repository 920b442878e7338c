"""The scoring benchmark, run small: its cases check themselves."""

import sys

import pytest

from benchmarks.retrieval import (
    Sizes,
    caption_classes,
    loop_scores,
    recognition_case,
    relevancy_case,
    retrieval_case,
)

SIZES = Sizes(clips=60, captions=40, classes=30, rounds=1)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


def test_cases_agree_with_their_loops():
    rows = [case(SIZES) for case in (relevancy_case, retrieval_case, recognition_case)]
    assert [row["case"] for row in rows] == ["relevancy by classes", "retrieval metrics", "recognition metrics"]
    assert all(row["s"] >= 0 and row["cpu_s"] >= 0 for row in rows)
    assert rows[1]["largest_difference_from_a_loop"] < 1e-6 and 0 < rows[1]["mean_average_precision"] < 1
    assert rows[2]["largest_difference_from_a_loop"] < 1e-9 and 0 < rows[2]["top1"] <= 1


def test_the_loop_is_the_published_definition():
    import numpy as np

    precision, gain = loop_scores(np.array([0.1, 0.9, 0.8, 0.3]), np.array([1, 0, 1, 0.5]))
    assert precision == pytest.approx((1 / 2 + 2.5 / 4) / 2)
    best = 1 + 1 / np.log2(3) + 0.5 / 2
    assert gain == pytest.approx((1 / np.log2(3) + 0.5 / 2) / best)


def test_captions_repeat_like_those_of_kitchens():
    verbs, nouns = caption_classes(2000, seed=0)
    assert verbs.max() < 97 and all(1 <= len(group) <= 3 and max(group) < 300 for group in nouns)
    assert (verbs == 0).mean() > 0.2
