"""Arithmetic of `avion-dali plan` on hand-made numbers."""

import math
from dataclasses import replace

import pytest

from avion_dali.inspection.plan_forecast import (
    Candidate,
    ClipCost,
    Forecast,
    ModelDemand,
    forecast,
    recommend,
)

COST = ClipCost(worker_ms=10.0, trainer_ms=0.0, decoded=20.0)
SLOW_DISK = replace(COST, waiting_ms=52.1, disk_ms=26.05)
ALONE = ModelDemand()


def rates(cost=COST, *, cores=8, workers=8, demand=ALONE, decoded=20.0):
    return forecast(decoded, cost, cores=cores, workers=workers, demand=demand)


def test_the_papers_typical_numbers_give_about_16_seconds():
    # 1,024 clips per step of 4 s, 1 Mbit/s, 500 MB/s.
    assert candidate("any", 15, bytes_per_s=1e6 / 8, clips_per_s=256).longest_chunk_s(500.0) == pytest.approx(
        15.625
    )


def test_a_workers_time_follows_the_pictures_that_are_decoded():
    assert rates(decoded=30.0).decode_ms == pytest.approx(15.0)
    assert rates(replace(COST, trainer_ms=1.0), decoded=30.0).core_ms == pytest.approx(16.0)


@pytest.mark.parametrize(
    ("cost", "machine", "demand", "limit", "clips_per_s"),
    [
        (COST, (8, 4), ALONE, "workers", 400),
        (replace(COST, trainer_ms=2.5), (8, 8), ALONE, "trainer", 400),
        (replace(COST, trainer_ms=1.0), (8, 8), ALONE, "cores", 8000 / 11),
        (SLOW_DISK, (8, 80), ALONE, "disk", 1000 / 26.05),
        (SLOW_DISK, (8, 1), ALONE, "workers", 1000 / 62.1),
        (SLOW_DISK, (2, 2), ALONE, "workers", 2000 / 62.1),
        (COST, (8, 8), ModelDemand(300.0), "model", 300),
        (COST, (8, 8), ModelDemand(core_ms=6.0), "cores", 500),
        (replace(COST, trainer_ms=4.0), (8, 8), ModelDemand(processes=2), "trainer", 500),
    ],
)
def test_the_slowest_part_decides(cost, machine, demand, limit, clips_per_s):
    found = rates(cost, cores=machine[0], workers=machine[1], demand=demand)
    assert found.limit == limit
    assert found.clips_per_s == pytest.approx(clips_per_s)
    assert found.clips_per_s == min(found.ceilings.values())


def test_workers_are_blamed_only_where_more_of_them_would_help():
    short_wait = rates(replace(COST, waiting_ms=0.5, disk_ms=0.1))
    assert short_wait.clips_per_s == pytest.approx(8000 / 10.5)
    assert short_wait.limit == "cores"
    assert rates(replace(COST, waiting_ms=1.5, disk_ms=0.1)).limit == "workers"


def test_workers_for_a_rate():
    found = rates(replace(COST, trainer_ms=2.0))
    assert found.workers_for(250.0) == 3
    assert found.workers_for(math.inf) == 5  # the training process allows 500 clips/s
    waiting = rates(SLOW_DISK)
    assert waiting.workers_for(10.0) == 1
    assert waiting.workers_for(32.0) == 2  # each spends 62 ms on a clip, of which 10 decoding


def candidate(profile, seconds, *, bytes_per_s, clips_per_s):
    ceilings = dict.fromkeys(("workers", "disk", "trainer", "model"), math.inf) | {"cores": clips_per_s}
    found = Forecast(ceilings, 10.0, 0.0, 10.0)
    return Candidate(profile, seconds, bytes_per_s, 10, 5, 210_000, found)


SMALL = candidate("compat", 15, bytes_per_s=100e3, clips_per_s=100)
MIDDLE = candidate("balanced", 15, bytes_per_s=125e3, clips_per_s=400)
LARGE = candidate("intra", 15, bytes_per_s=400e3, clips_per_s=900)


@pytest.mark.parametrize(
    ("wanted", "profile"),
    [(50, "compat"), (200, "balanced"), (600, "intra"), (5000, "intra"), (math.inf, "balanced")],
)
def test_the_profile_is_the_smallest_that_keeps_the_model_busy(wanted, profile):
    assert recommend([LARGE, SMALL, MIDDLE], clips_per_s=wanted, read_mb_s=math.inf).profile == profile


@pytest.mark.parametrize(
    ("lengths", "read_mb_s", "seconds"),
    [
        ((60, 5, 15), math.inf, 15),
        ((60, 30, 5), math.inf, 30),
        ((60, 5, 15), 1000, 15),  # equation 3 allows 20 s at 400 clips/s of 1 Mbit/s
        ((60, 5, 18), 1000, 18),
        ((60, 5, 15), 300, 5),  # 6 s
        ((60, 5, 15), 10, 5),  # less than any
    ],
)
def test_the_chunk_is_the_papers_if_equation_3_allows(lengths, read_mb_s, seconds):
    candidates = [replace(MIDDLE, chunk_seconds=s) for s in lengths]
    assert recommend(candidates, clips_per_s=math.inf, read_mb_s=read_mb_s).chunk_seconds == seconds


def test_a_chunk_length_that_costs_speed_is_not_taken():
    slower = candidate("balanced", 15, bytes_per_s=125e3, clips_per_s=300)
    lengths = [replace(MIDDLE, chunk_seconds=60), slower]
    assert recommend(lengths, clips_per_s=math.inf, read_mb_s=math.inf).chunk_seconds == 60
