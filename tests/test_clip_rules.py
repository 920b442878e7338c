"""Kinds of sampling, crops, views and texts: what each rule of the configuration does to a request."""

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from chunk_folders import chunk_row, chunk_rows, write_random_manifest

from avion_dali.config import DataConfig
from avion_dali.contracts import ClipRequest, UserError
from avion_dali.data.classes import CaptionTable, ClassTable
from avion_dali.data.frames import dense_frame_ids, strided_frame_ids
from avion_dali.data.manifest import Manifest, Sample, write_manifest
from avion_dali.data.planner import ClipRules, Planner, choose_frames, locate_frames

RULES = ClipRules(num_frames=4, frame_size=224, training=True, flip_probability=0.5)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return Manifest(write_random_manifest(tmp_path_factory.mktemp("rules"), num_samples=300))


@pytest.fixture(scope="module")
def planned(manifest: Manifest) -> list[ClipRequest]:
    planner = Planner(manifest, RULES, seed=1)
    return [planner.plan(row, 2) for row in range(50)]


def labelled_manifest(folder: Path, *, graded: bool = True) -> Manifest:
    """Four rows of 10 s with one, three, no and two texts; captions graded for all but the third."""
    texts = (("a",), ("b", "c", "d"), (), ("e", "f"))
    samples = [
        Sample(0, 1, i, i + 10.0, row, tuple((1, ord(text), 99) for text in row), label=i % 3 - 1)
        for i, row in enumerate(texts)
    ]
    grades = np.array([[1, 0.5, 0.1], [0, 0.2, 0.3], [0, 0.1, 0], [0.11, 0, 1]], np.float32)
    captions = CaptionTable(("x", "y", "z"), ((7,), (8,), (9,)), grades) if graded else None
    write_manifest(
        folder,
        chunk_root="/chunks",
        chunks=[chunk_row("v", 0)],
        samples=samples,
        captions=captions,
        classes=ClassTable(("one", "two")),
    )
    return Manifest(folder)


def test_rules_follow_the_configuration() -> None:
    data = DataConfig(
        num_frames=16, frame_size=112, sampling="dense", stride=2, crop="multi-scale", crop_scale=(0.1, 0.2),
        crop_ratio=(1.0, 2.0), flip_probability=0.25, repeats=2, eval_clips=5, eval_crops=3, text="relevant",
        relevancy_threshold=0.4,
    )  # fmt: skip
    training, evaluation = (ClipRules.from_options(data, training=value) for value in (True, False))
    assert replace(training, training=False) == evaluation
    for name in (field.name for field in fields(ClipRules) if field.name != "training"):
        assert getattr(training, name) == getattr(data, name)
        assert getattr(data, name) != getattr(DataConfig(), name)
    assert ClipRules.from_options(DataConfig(), training=True) == ClipRules(4, 224, training=True)
    assert (training.clip_shape, evaluation.clip_shape) == ((2, 16, 112, 112, 3), (3, 16, 112, 112, 3))


def test_own_texts_are_drawn_uniformly_in_training_and_are_the_first_in_evaluation(tmp_path: Path) -> None:
    manifest = labelled_manifest(tmp_path)
    training, evaluation = (Planner(manifest, replace(RULES, training=t), seed=0) for t in (True, False))
    drawn = [training.plan(1, epoch) for epoch in range(600)]
    counts = np.bincount([request.tokens[1] - ord("b") for request in drawn])
    np.testing.assert_allclose(counts / 600, 1 / 3, atol=0.07)
    assert {request.caption_id for request in drawn} == {-1}
    assert [evaluation.plan(row, 0).tokens for row in range(4)] == [(1, 97, 99), (1, 98, 99), (), (1, 101, 99)]
    assert training.plan(2, 0).tokens == ()


def test_texts_are_drawn_after_frames_and_views(tmp_path: Path) -> None:
    """So that a row's clips do not change when it is given another text."""
    several = Planner(labelled_manifest(tmp_path / "a"), RULES, seed=0)
    one = Planner(Manifest(labelled_manifest(tmp_path / "b", graded=False).folder), RULES, seed=0)
    relevant = Planner(several.manifest, replace(RULES, text="relevant"), seed=0)
    for epoch in range(20):
        requests = [planner.plan(1, epoch) for planner in (several, one, relevant)]
        assert len({(r.parts, r.gather, r.windows, r.flips) for r in requests}) == 1


def test_relevant_texts_are_captions_above_the_threshold(tmp_path: Path) -> None:
    planner = Planner(labelled_manifest(tmp_path), replace(RULES, text="relevant"), seed=0)
    drawn = {row: [planner.plan(row, epoch) for epoch in range(300)] for row in (0, 1, 3)}
    assert {row: {r.caption_id for r in requests} for row, requests in drawn.items()} == {
        0: {0, 1},  # 0.1 itself does not exceed 0.1
        1: {1, 2},
        3: {0, 2},
    }
    assert all(r.tokens == (7 + r.caption_id,) for requests in drawn.values() for r in requests)
    assert 100 < sum(r.caption_id == 1 for r in drawn[1]) < 200


def test_a_row_without_a_relevant_caption_is_named(tmp_path: Path) -> None:
    rules = replace(RULES, text="relevant")
    with pytest.raises(UserError, match=r"row 2 exceeds `relevancy_threshold` = 0\.1; lower it"):
        Planner(labelled_manifest(tmp_path), rules, seed=0).plan(2, 0)
    evaluation = Planner(labelled_manifest(tmp_path), replace(rules, training=False), seed=0)
    assert evaluation.plan(3, 0).tokens == (1, 101, 99)


def test_requests_carry_labels(tmp_path: Path) -> None:
    planner = Planner(labelled_manifest(tmp_path), RULES, seed=0)
    assert [planner.plan(row, 0).label for row in range(4)] == [-1, 0, 1, -1]


def test_repeats_draw_a_window_and_a_flip_for_each_view(manifest: Manifest) -> None:
    planner = Planner(manifest, replace(RULES, repeats=3), seed=1)
    requests = [planner.plan(row, 2) for row in range(200)]
    assert {request.frames_shape for request in requests} == {(3, 4, 224, 224, 3)}
    assert sum(len(set(request.windows)) == 3 for request in requests) > 190
    flips = np.array([request.flips for request in requests])
    np.testing.assert_allclose(flips.mean(axis=0), 0.5, atol=0.12)
    assert abs(np.corrcoef(flips.T)[0, 1]) < 0.25


def test_more_repeats_keep_the_first_view(manifest: Manifest, planned: list[ClipRequest]) -> None:
    planner = Planner(manifest, replace(RULES, repeats=2), seed=1)
    for row in range(50):
        request = planner.plan(row, 2)
        assert (request.windows[0], request.flips[0]) == (planned[row].windows[0], planned[row].flips[0])
        assert request.parts == planned[row].parts


@pytest.mark.parametrize("crop", ["simple-random", "multi-scale", "center"])
def test_every_kind_of_crop_is_drawn_by_its_own_rule(manifest: Manifest, crop: str) -> None:
    planner = Planner(manifest, replace(RULES, crop=crop), seed=1)
    windows = {planner.plan(row, 0).windows[0] for row in range(300)}
    shapes = {(w.width, w.height) for w in windows}
    if crop == "multi-scale":
        assert len(shapes) == 10
    else:
        assert shapes == {(256, 256)}
        assert len(windows) == (1 if crop == "center" else 33)


def test_three_test_crops_share_one_clip(manifest: Manifest) -> None:
    planner = Planner(manifest, replace(RULES, training=False, eval_crops=3), seed=1)
    request = planner.plan(0, 0)
    assert [w.x for w in request.windows] == [0, 32, 64]
    assert request.flips == (False, False, False)
    assert request.frames_shape == (3, 4, 224, 224, 3)


def clips_of_a_row(folder: Path, num_source: int, **rules: object) -> list[list[int]]:
    """Frame ids of all evaluation clips of the second of two rows, over a chunk of so many frames at 30 fps."""
    samples = [Sample(0, 1, 0.0, num_source / 30)] * 2
    chunk = chunk_row("v", 0, num_frames=num_source)
    write_manifest(folder, chunk_root="/chunks", chunks=[chunk], samples=samples)
    clips = ClipRules(16, 224, training=False, **rules)
    planner = Planner(Manifest(folder), clips, seed=0)
    assert planner.num_clips == 2 * clips.eval_clips
    requests = [planner.plan(row, 0) for row in range(clips.eval_clips, planner.num_clips)]
    assert {request.sample_id for request in requests} == {1}
    return [[request.parts[0].frame_ids[i] for i in request.gather] for request in requests]


@pytest.mark.parametrize("sampling", ["strided", "dense"])
@pytest.mark.parametrize(
    ("num_source", "starts"),
    [(300, [0, 59, 118, 177, 236]), (70, [0, 1, 3, 4, 6]), (64, [0] * 5), (40, [0] * 5)],
)
def test_evaluation_clips_start_where_they_were_recorded(
    tmp_path: Path, sampling: str, num_source: int, starts: list[int]
) -> None:
    clips = clips_of_a_row(tmp_path, num_source, sampling=sampling, eval_clips=5)
    expected = [[min(start + 4 * k, num_source - 1) for k in range(16)] for start in starts]
    assert clips == expected


def test_segments_give_each_evaluation_clip_an_equal_part(tmp_path: Path) -> None:
    clips = clips_of_a_row(tmp_path, 320, eval_clips=5)
    assert clips == [[64 * k + 4 * i + 2 for i in range(16)] for k in range(5)]
    assert clips_of_a_row(tmp_path, 2, eval_clips=5) == [[0] * 16] * 3 + [[1] * 16] * 2


@pytest.mark.parametrize("sampling", ["strided", "dense"])
def test_one_evaluation_clip_is_the_sampler_without_a_generator(tmp_path: Path, sampling: str) -> None:
    sampler = {"strided": strided_frame_ids, "dense": dense_frame_ids}[sampling]
    for num_source in (50, 300):
        (clip,) = clips_of_a_row(tmp_path, num_source, sampling=sampling)
        assert clip == sampler(num_source, 16, 4).tolist()


def test_wrapped_frames_keep_their_order_in_the_clip(tmp_path: Path) -> None:
    """Recorded for 50 frames: 0, 4, ..., 48, 2, 6, 10; parts are sorted, the gather restores the order."""
    (clip,) = clips_of_a_row(tmp_path, 50, sampling="strided")
    assert clip == [*range(0, 49, 4), 2, 6, 10]


@pytest.mark.parametrize("sampling", ["strided", "dense"])
def test_training_clips_run_over_all_chunks_of_the_span(sampling: str) -> None:
    """Frames are numbered through the chunks, so a stride of 4 goes on behind a border."""
    chunks, rules = chunk_rows("v", (450, 449), fps=30), ClipRules(16, 224, training=True, sampling=sampling)
    seen: set[int] = set()
    for seed in range(300):
        rng = np.random.default_rng(seed)
        parts, gather = locate_frames(
            13.0,
            17.0,
            chunks=chunks,
            choose=lambda total, rng=rng: choose_frames(total, rules, clip=0, rng=rng),
        )
        first = {chunks[0].ref.path: 0, chunks[1].ref.path: 450}
        ids = [first[part.chunk.path] + frame for part in parts for frame in part.frame_ids]
        clip = np.array(ids)[list(gather)]
        assert len(clip) == 16
        assert (np.diff(clip) > 0).all()
        assert 390 <= clip.min() <= clip.max() < 510
        assert 56 <= clip[-1] - clip[0] <= 64
        seen.add(int(clip[0]))
    assert len(seen) > 40
