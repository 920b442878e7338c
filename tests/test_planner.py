"""Requests as pure functions of (seed, epoch, sample id), with frames of the right seconds and chunks."""

import hashlib
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from chunk_folders import NTSC_30, NTSC_60, chunk_row, chunk_rows, write_random_manifest

from avion_dali.contracts import ClipRequest
from avion_dali.data.crops import center_square_window
from avion_dali.data.frames import segment_frame_ids
from avion_dali.data.manifest import Chunk, Manifest
from avion_dali.data.planner import ClipRules, Planner, draw_views, locate_frames
from avion_dali.data.randomness import generator

COUNT = 1000
RULES = ClipRules(num_frames=4, frame_size=224, training=True, flip_probability=0.5)
# Chunk lengths as ffmpeg cuts them from sources of these rates, and one chunk that misses its last frame.
LAYOUTS = [
    (Fraction(30), (450, 450, 450)),
    (NTSC_30, (450, 450, 449)),
    (Fraction(25), (375, 375, 375)),
    (Fraction(50), (750, 750, 750)),
    (NTSC_60, (900, 899, 899)),
    (Fraction(30), (449, 449, 449)),
]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return Manifest(write_random_manifest(tmp_path_factory.mktemp("plan"), num_samples=COUNT))


@pytest.fixture(scope="module")
def planned(manifest: Manifest) -> list[ClipRequest]:
    planner = Planner(manifest, RULES, seed=1)
    return [planner.plan(i, 2) for i in range(COUNT)]


def frame_seconds(request: ClipRequest, chunks: list[Chunk]) -> np.ndarray:
    """Second of the video at which each of the T frames is shown."""
    facts = {chunk.ref.path: chunk for chunk in chunks}
    seconds = []
    for part in request.parts:
        chunk = facts[part.chunk.path]
        times = np.arange(chunk.ref.num_frames) / float(chunk.fps)
        times = times if chunk.frame_times is None else chunk.frame_times
        seconds += [chunk.start_s + float(times[i]) for i in part.frame_ids]
    return np.array(seconds)[list(request.gather)]


def plan_span(
    chunks: list[Chunk], start_s: float, end_s: float, *, num_frames: int = 4, rng: np.random.Generator | None
) -> ClipRequest:
    """The request of a span over all given chunks, without a manifest."""
    parts, gather = locate_frames(
        start_s, end_s, chunks=chunks, choose=lambda total: segment_frame_ids(0, total, num_frames, rng)
    )
    window = center_square_window(chunks[0].ref.width, chunks[0].ref.height)
    return ClipRequest(0, 0, parts, gather, (window,), (False,), 224)


def touching(chunks: list[Chunk], start_s: float, end_s: float) -> list[Chunk]:
    """The chunks that a span of a 15 s grid touches."""
    first = int(start_s // 15)
    return chunks[first : max(int(np.ceil(end_s / 15)), first + 1)]


def test_planning_twice_and_in_any_order_gives_the_same(manifest: Manifest, planned: list[ClipRequest]) -> None:
    planner = Planner(Manifest(manifest.folder), RULES, seed=1)
    for i in np.random.default_rng(0).permutation(COUNT):
        assert planner.plan(int(i), 2) == planned[i]


def test_another_process_plans_the_same(manifest: Manifest, planned: list[ClipRequest]) -> None:
    code = (
        "import hashlib\n"
        "from avion_dali.data.manifest import Manifest\n"
        "from avion_dali.data.planner import ClipRules, Planner\n"
        "rules = ClipRules(num_frames=4, frame_size=224, training=True, flip_probability=0.5)\n"
        f"planner = Planner(Manifest({str(manifest.folder)!r}), rules, seed=1)\n"
        f"plans = [planner.plan(i, 2) for i in reversed(range({COUNT}))]\n"
        "print(hashlib.sha256(repr(plans[::-1]).encode()).hexdigest())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == hashlib.sha256(repr(planned).encode()).hexdigest()


@pytest.mark.parametrize(("seed", "epoch"), [(2, 2), (1, 3), (1, 0)])
def test_another_seed_or_epoch_plans_other_clips(
    manifest: Manifest, planned: list[ClipRequest], seed: int, epoch: int
) -> None:
    planner = Planner(manifest, RULES, seed=seed)
    others = [planner.plan(i, epoch) for i in range(300)]
    same_window = sum(a.windows == b.windows for a, b in zip(others, planned, strict=False))
    same_flip = sum(a.flips == b.flips for a, b in zip(others, planned, strict=False))
    assert same_window < 5
    assert 100 < same_flip < 200
    assert {a.epoch for a in others} == {epoch}


def test_training_frames_are_drawn_anew_each_epoch_around_the_middles(manifest: Manifest) -> None:
    training, middles = (
        Planner(manifest, RULES, seed=1),
        Planner(manifest, replace(RULES, training=False), seed=1),
    )
    long = next(i for i in range(COUNT) if 4 < manifest.sample(i).end_s - manifest.sample(i).start_s < 10)
    row = manifest.sample(long)
    chunks = [manifest.chunk(row.first_chunk + k) for k in range(row.num_chunks)]
    drawn = np.stack([frame_seconds(training.plan(long, epoch), chunks) for epoch in range(200)])
    assert all(len(set(slot)) > 20 for slot in drawn.T.tolist())
    slot_s = (row.end_s - row.start_s) / 4
    middle = frame_seconds(middles.plan(long, 0), chunks)
    np.testing.assert_allclose(drawn.mean(axis=0), middle, atol=4 * slot_s / np.sqrt(12 * 200) + 0.04)


def test_a_request_carries_its_row(manifest: Manifest, planned: list[ClipRequest]) -> None:
    for i, request in enumerate(planned):
        row = manifest.sample(i)
        assert (request.sample_id, request.epoch, request.tokens) == (i, 2, row.tokens[0])
        assert request.frames_shape == RULES.clip_shape == (1, 4, 224, 224, 3)
        allowed = {manifest.chunk(row.first_chunk + k).ref for k in range(row.num_chunks)}
        assert {part.chunk for part in request.parts} <= allowed


def test_frames_lie_in_the_span_and_in_order(manifest: Manifest, planned: list[ClipRequest]) -> None:
    for i, request in enumerate(planned):
        row = manifest.sample(i)
        chunks = [manifest.chunk(row.first_chunk + k) for k in range(row.num_chunks)]
        seconds, frame = frame_seconds(request, chunks), float(1 / min(c.fps for c in chunks))
        assert (np.diff(seconds) >= 0).all()
        assert seconds.min() >= row.start_s - frame
        assert seconds.max() <= row.end_s + frame


def test_some_clips_cross_a_border_and_still_have_one_window(planned: list[ClipRequest]) -> None:
    crossing = [request for request in planned if len(request.parts) > 1]
    assert len(crossing) > 50
    assert {len(request.windows) for request in crossing} == {len(request.flips) for request in crossing} == {1}


def test_evaluation_takes_middles_and_the_centre_square_in_every_epoch(manifest: Manifest) -> None:
    rules = ClipRules(num_frames=4, frame_size=224, training=False, flip_probability=1.0)
    for i in range(100):
        first, other = Planner(manifest, rules, seed=1).plan(i, 0), Planner(manifest, rules, seed=9).plan(i, 0)
        assert first == other
        assert Planner(manifest, rules, seed=1).plan(i, 5).parts == first.parts
        assert (first.windows, first.flips) == ((center_square_window(320, 256),), (False,))


@pytest.mark.parametrize(("probability", "low", "high"), [(0.0, 0, 0), (1.0, 400, 400), (0.5, 160, 240)])
def test_flips_happen_as_often_as_asked(probability: float, low: int, high: int) -> None:
    rules = ClipRules(num_frames=4, frame_size=224, training=True, flip_probability=probability)
    draws = [draw_views(320, 256, rules, generator("clip", seed=0, epoch=0, index=i))[1] for i in range(400)]
    assert low <= sum(flip for (flip,) in draws) <= high


def test_crop_ranges_of_the_rules_are_obeyed() -> None:
    rules = ClipRules(4, 224, training=True, crop_scale=(0.25, 0.25), crop_ratio=(1.0, 1.0))
    (window,), _ = draw_views(320, 256, rules, generator("clip", seed=0, epoch=0))
    assert window.width == window.height == 144  # a quarter of 320 x 256 is 143.1 squared


@pytest.mark.parametrize(("fps", "counts"), LAYOUTS)
@pytest.mark.parametrize("num_frames", [1, 4, 16])
def test_evaluation_frames_are_the_middles_in_seconds(
    fps: Fraction, counts: tuple[int, ...], num_frames: int
) -> None:
    """Checked in seconds of the video, so that neither rate nor chunk borders enter the expectation."""
    chunks = chunk_rows("v", counts, fps=fps)
    for start, end in [(0, 4), (14, 16), (13.3, 17.1), (10, 40), (29.5, 30.5), (0, 44.9), (20, 31.7)]:
        request = plan_span(touching(chunks, start, end), start, end, num_frames=num_frames, rng=None)
        wanted = start + (np.arange(num_frames) + 0.5) * (end - start) / num_frames
        # Three frames: truncating to one, rounding both ends, and what two borders miss or repeat.
        np.testing.assert_allclose(frame_seconds(request, chunks), wanted, atol=3 / float(fps))
        assert len(request.gather) == num_frames


@pytest.mark.parametrize(("fps", "counts"), LAYOUTS)
def test_jittered_clips_never_leave_a_chunk_or_the_span(fps: Fraction, counts: tuple[int, ...]) -> None:
    chunks, draws = chunk_rows("v", counts, fps=fps), np.random.default_rng(0)
    for i in range(150):
        start = float(draws.uniform(0, 44.5))
        end = min(start + float(draws.exponential(4)), 44.9)
        request = plan_span(touching(chunks, start, end), start, end, rng=np.random.default_rng(i))
        seconds = frame_seconds(request, chunks)
        assert (np.diff(seconds) >= 0).all()
        assert start - 1.01 / float(fps) <= seconds.min() <= seconds.max() <= end + 1.01 / float(fps)


def test_a_border_inside_a_clip_neither_repeats_nor_skips_frames() -> None:
    chunks = chunk_rows("v", (450, 450), fps=30)
    request = plan_span(chunks, 14.9, 15.1, num_frames=6, rng=None)
    assert [(part.chunk.path[-6:], part.frame_ids) for part in request.parts] == [
        ("/0.mp4", (447, 448, 449)),
        ("15.mp4", (0, 1, 2)),
    ]
    assert request.gather == (0, 1, 2, 3, 4, 5)


def test_a_449_frame_chunk_is_clamped_to_what_it_has() -> None:
    chunks = chunk_rows("v", (449, 450), fps=30)
    request = plan_span(chunks, 14.9, 15.1, num_frames=5, rng=None)
    assert [part.frame_ids for part in request.parts] == [(447, 448), (0, 1, 2)]


def test_a_clip_may_cross_a_whole_chunk_and_rates_may_differ() -> None:
    chunks = [chunk_row("v", 0, num_frames=375, fps=25), *chunk_rows("v", (0, 450, 450), fps=30)[1:]]
    request = plan_span(chunks, 14, 31, num_frames=16, rng=None)
    assert [part.chunk.path for part in request.parts] == [c.ref.path for c in chunks]
    wanted = 14 + (np.arange(16) + 0.5) * 17 / 16
    np.testing.assert_allclose(frame_seconds(request, chunks), wanted, atol=0.3)


@pytest.mark.parametrize(
    ("start", "end", "frame"),
    [
        (3.0, 3.0, 90),  # zero length
        (3.001, 3.002, 90),  # shorter than a frame
        (3.03, 3.031, 91),
        (14.999, 14.9995, 449),  # behind the last frame's start
        (14.99, 15.0, 449),
        (0.0, 0.0, 0),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_spans_without_a_frame_of_their_own_take_the_nearest(
    start: float, end: float, frame: int, training: bool
) -> None:
    rng = np.random.default_rng(0) if training else None
    request = plan_span([chunk_row("v", 0)], start, end, rng=rng)
    assert [part.frame_ids for part in request.parts] == [(frame,)]
    assert request.gather == (0, 0, 0, 0)


def test_a_short_span_across_a_border_takes_one_existing_frame() -> None:
    request = plan_span(chunk_rows("v", (449, 450), fps=30), 14.99, 15.01, rng=None)
    assert [part.frame_ids for part in request.parts] == [(448,)]


def test_two_frames_fill_a_longer_clip_by_repetition() -> None:
    request = plan_span([chunk_row("v", 0)], 10 / 30, 12 / 30, rng=None)
    assert [part.frame_ids for part in request.parts] == [(10, 11)]
    assert request.gather == (0, 0, 1, 1)


def variable_rate_chunks() -> list[Chunk]:
    times = np.concatenate([np.arange(100) / 50, 2 + np.arange(200) / 20])  # 2 s at 50 fps, 10 s at 20 fps
    return [chunk_row("v", start, num_frames=300, fps=Fraction(25), frame_times=times) for start in (0.0, 12.0)]


@pytest.mark.parametrize(("start", "end"), [(0.5, 1.5), (3.0, 7.0), (11.0, 13.0), (11.5, 12.5)])
def test_variable_rate_chunks_are_read_by_their_timestamps(start: float, end: float) -> None:
    chunks = variable_rate_chunks()[: 1 if end <= 12 else 2]
    seconds = frame_seconds(plan_span(chunks, start, end, num_frames=8, rng=None), chunks)
    assert (np.diff(seconds) >= 0).all()
    assert start <= seconds.min() <= seconds.max() < end
    for i in range(50):
        drawn = frame_seconds(plan_span(chunks, start, end, rng=np.random.default_rng(i)), chunks)
        assert start <= drawn.min() <= drawn.max() < end


def test_a_span_inside_a_held_frame_takes_that_frame() -> None:
    held = chunk_row("v", 0, num_frames=3, fps=Fraction(1), frame_times=np.array([0.0, 5.0, 10.0]))
    request = plan_span([held], 5.2, 5.6, rng=None)
    assert [part.frame_ids for part in request.parts] == [(1,)]


def test_tiny_frames_can_be_planned(tmp_path: Path) -> None:
    for i, size in enumerate([(16, 16), (17, 19), (2, 2)]):
        for k in range(50):
            rng = generator("clip", seed=0, epoch=i, index=k)
            (window,), _ = draw_views(*size, RULES, rng)
            assert window.x + window.width <= size[0]
            assert window.y + window.height <= size[1]
