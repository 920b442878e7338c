"""The scoring benchmark, run small: its cases check themselves."""

import sys

import pytest

from benchmarks.studies.retrieval import Sizes, loop_scores, retrieval_case

SIZES = Sizes(clips=60, captions=40, rounds=1)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


def test_the_case_agrees_with_its_loop():
    row = retrieval_case(SIZES)
    assert row["measured"] == "retrieval metrics"
    assert row["s"] >= 0 and row["cpu_s"] >= 0
    assert row["largest_difference_from_a_loop"] < 1e-6 and 0 < row["mean_average_precision"] < 1


def test_the_loop_is_the_published_definition():
    import numpy as np

    precision, gain = loop_scores(np.array([0.1, 0.9, 0.8, 0.3]), np.array([1, 0, 1, 0.5]))
    assert precision == pytest.approx((1 / 2 + 2.5 / 4) / 2)
    best = 1 + 1 / np.log2(3) + 0.5 / 2
    assert gain == pytest.approx((1 / np.log2(3) + 0.5 / 2) / best)
