"""The scoring benchmark, run small."""

import sys

import pytest

from benchmarks.studies.retrieval import Sizes, retrieval_case

SIZES = Sizes(clips=60, captions=40, rounds=1)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


def test_a_row_says_what_was_scored_and_how_well():
    row = retrieval_case(SIZES)
    assert row["measured"] == "retrieval metrics"
    assert (row["clips"], row["captions"], row["matrix_mb"]) == (60, 40, 0.0)
    assert row["s"] >= 0 and row["cpu_s"] >= 0
    assert 0 < row["mean_average_precision"] < 1 and 0 < row["ndcg"] < 1
