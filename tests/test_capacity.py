"""Arithmetic of `avion-dali plan` on hand-made numbers."""

import math
from dataclasses import astuple, replace

import numpy as np
import pytest

from avion_dali.inspection.capacity import (
    Candidate,
    ClipNeeds,
    DecodeCost,
    DiskSpeed,
    Forecast,
    Machine,
    ModelDemand,
    ReadCost,
    TrainerCost,
    fit_decode_cost,
    fit_read_cost,
    forecast,
    longest_chunk_s,
    mean_needs,
    recommend,
)

NEEDS = ClipNeeds(
    decoded=10, rendered=4, picture_bytes=200_000, reads=5, read_bytes=210_000, chunk_bytes=2_000_000
)
COST = DecodeCost(base=1.0, per_decoded=0.3, per_rendered=0.25, per_100kb=2.5)  # 10 ms for NEEDS
SLOW_DISK = DiskSpeed(100.0, 100.0, ReadCost(10.0, 100.0), ReadCost(5.0, 200.0), readers=4)


FREE = TrainerCost(0.0, 0.0)


def machine(cores=8, physical=8, slowdown=1.0, trainer=FREE, disk=None):
    return Machine(cores, physical, slowdown, trainer, disk)


def rates(m, workers=8, demand=None):
    return forecast(NEEDS, COST, m, num_frames=4, workers=workers, demand=demand)


def test_the_papers_typical_numbers_give_about_16_seconds():
    assert longest_chunk_s(clips=1024, mbit_per_s=1.0, step_s=4.0, read_mb_s=500.0) == pytest.approx(15.625)


def test_a_cost_is_the_sum_of_its_parts():
    assert COST.ms(NEEDS) == pytest.approx(1 + 3 + 1 + 5)


def test_mean_needs():
    assert mean_needs([NEEDS, replace(NEEDS, decoded=20, reads=7)]) == replace(NEEDS, decoded=15, reads=6)


def random_needs(rng, count):
    rows = rng.uniform((1, 1, 1e4), (90, 16, 1e6), (count, 3))
    return [ClipNeeds(d, r, b, reads=1, read_bytes=b, chunk_bytes=b) for d, r, b in rows.tolist()]


def test_a_fit_finds_the_costs_that_made_the_times():
    clips = random_needs(np.random.default_rng(0), 40)
    found = fit_decode_cost(clips, [COST.ms(clip) for clip in clips])
    assert astuple(found) == pytest.approx(astuple(COST))


def test_a_fit_to_noisy_times_predicts_clips_it_has_not_seen():
    rng = np.random.default_rng(1)
    clips = random_needs(rng, 100)
    found = fit_decode_cost(clips, [COST.ms(clip) * rng.uniform(0.9, 1.1) for clip in clips])
    for clip in random_needs(rng, 20):
        assert found.ms(clip) == pytest.approx(COST.ms(clip), rel=0.05)


def test_no_fitted_cost_is_negative():
    clips = random_needs(np.random.default_rng(2), 40)
    # Times that fall with every picture kept: the best unbounded fit has a negative cost.
    found = fit_decode_cost(clips, [5 + 0.1 * clip.decoded - 0.2 * clip.rendered for clip in clips])
    assert min(found.base, found.per_decoded, found.per_rendered, found.per_100kb) >= 0
    assert found.per_rendered == 0
    assert found.per_decoded == pytest.approx(0.1, rel=0.2)


def test_a_fit_where_parts_cannot_be_told_apart_still_predicts():
    # All-intra clips decode exactly what they keep.
    clips = [ClipNeeds(n, n, 2e4 * n, n, 2e4 * n, 1e6) for n in (1, 2, 4, 8)]
    found = fit_decode_cost(clips, [1 + 0.9 * clip.decoded for clip in clips])
    assert found.ms(ClipNeeds(16, 16, 3.2e5, 16, 3.2e5, 1e6)) == pytest.approx(1 + 0.9 * 16)


def test_read_costs_of_two_sizes():
    cost = fit_read_cost((1e5, 0.1 + 0.5), (1e6, 0.1 + 5.0))  # 0.1 ms a read, 200 MB/s
    assert (cost.ms_per_read, cost.mb_per_s) == pytest.approx((0.1, 200.0))
    assert cost.ms(3, 4e5) == pytest.approx(0.3 + 2.0)


@pytest.mark.parametrize("large_ms", [0.5, 20.0], ids=["no slower for more bytes", "no cost for a read itself"])
def test_read_costs_are_never_negative(large_ms):
    cost = fit_read_cost((1e5, 1.0), (1e6, large_ms))
    assert cost.ms_per_read == 0
    assert cost.ms(1, 1e6) == pytest.approx(large_ms)


def test_read_costs_of_tiny_files_are_per_read():
    assert fit_read_cost((5e3, 0.2), (6e3, 0.21)).ms(2, 1e4) == pytest.approx(0.42)


@pytest.mark.parametrize(
    ("m", "workers", "demand", "binds", "clips_per_s"),
    [
        (machine(), 4, None, "workers", 400),
        (machine(trainer=TrainerCost(1.5, 0.25)), 8, None, "trainer", 400),
        (machine(trainer=TrainerCost(0.6, 0.1)), 8, None, "cores", 8000 / 11),
        (machine(trainer=TrainerCost(0.6, 0.1, waking=1.5)), 8, None, "cores", 8000 / 12.5),
        (machine(disk=SLOW_DISK), 80, None, "disk", 1000 / (5 * 5 + 1.05)),
        (machine(disk=SLOW_DISK), 1, None, "workers", 1000 / (10 + 50 + 2.1)),
        (machine(cores=2, physical=2, disk=SLOW_DISK), 2, None, "reads", 2000 / (10 + 50 + 2.1)),
        (machine(), 8, ModelDemand(300.0), "model", 300),
        (machine(), 8, ModelDemand(core_ms=6.0), "cores", 500),
        (machine(trainer=TrainerCost(4.0, 0.0)), 8, ModelDemand(processes=2), "trainer", 500),
    ],
)
def test_the_slowest_part_decides(m, workers, demand, binds, clips_per_s):
    found = rates(m, workers, demand)
    assert found.binds == binds
    assert found.clips_per_s == pytest.approx(clips_per_s)
    assert found.clips_per_s == min(found.ceilings.values())


def test_hyper_threads_slow_clips_only_when_cores_are_shared():
    threads = machine(cores=16, physical=8, slowdown=1.6)
    assert [threads.slowdown(n) for n in (1, 8, 12, 16)] == pytest.approx([1.0, 1.0, 1.3, 1.6])
    assert rates(threads, workers=16).clips_per_s == pytest.approx(16 * 100 / 1.6)


def test_cores_that_share_memory_slow_each_other_step_by_step():
    assert [machine(slowdown=1.14).slowdown(n) for n in (1, 2, 8, 99)] == pytest.approx([1, 1.02, 1.14, 1.14])
    assert machine(cores=1, physical=1, slowdown=2.0).slowdown(1) == 1


def test_cores_and_workers_for_a_rate():
    found = rates(machine(trainer=TrainerCost(2.0, 0.0)))
    assert found.cores_for(100.0) == pytest.approx(1.2)
    assert found.workers_for(250.0) == 3
    assert found.workers_for(math.inf) == 5  # the training process allows 500 clips/s
    waiting = rates(machine(disk=SLOW_DISK))
    assert waiting.workers_for(10.0) == 1
    assert waiting.workers_for(32.0) == 2  # each spends 62 ms on a clip, of which 10 decoding


def candidate(profile, seconds, *, gb_per_hour, clips_per_s, mbit_per_s=1.0):
    found = Forecast(clips_per_s, "cores", {"cores": clips_per_s}, 10.0, 0.0, 10.0)
    return Candidate(profile, seconds, gb_per_hour * 1e9, mbit_per_s, NEEDS, found)


SMALL = candidate("compat", 15, gb_per_hour=0.4, clips_per_s=100)
MIDDLE = candidate("balanced", 15, gb_per_hour=0.5, clips_per_s=400)
LARGE = candidate("intra", 15, gb_per_hour=1.5, clips_per_s=900)


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
    lengths = [replace(MIDDLE, chunk_seconds=60), candidate("balanced", 15, gb_per_hour=0.5, clips_per_s=300)]
    assert recommend(lengths, clips_per_s=math.inf, read_mb_s=math.inf).chunk_seconds == 60
