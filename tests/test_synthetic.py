import csv
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import make_videos as mv
import numpy as np
import pytest

from avion_dali.contracts import UserError
from avion_dali.data.chunking import ChunkSettings, chunk_video
from avion_dali.data.probe import probe_chunk
from avion_dali.data.synthetic import (
    ACTIONS,
    COLORS,
    SHAPES,
    SyntheticSettings,
    draw_backdrop,
    draw_scene_frame,
    make_videos,
    plan_video,
)

SMALL = SyntheticSettings(train_videos=2, heldout_videos=1, seconds=6, fps=12, side=64, seed=7)
DIRECTIONS = {"moves left": (-1, 0), "moves right": (1, 0), "moves up": (0, -1), "moves down": (0, 1)}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_videos(tmp_path_factory.mktemp("synthetic"), settings=SMALL, jobs=2)


def scenes_of(settings, split="train", videos=12):
    return [scene for index in range(videos) for scene in plan_video(settings, split, index=index)]


def test_videos_and_annotations(dataset):
    assert [path.name for path in dataset.videos] == ["train_000.mp4", "train_001.mp4", "heldout_000.mp4"]
    for path in dataset.videos:
        facts = probe_chunk(path)
        assert (facts.num_frames, facts.fps, facts.width, facts.height) == (72, 12, 64, 64)
        assert facts.is_cfr
    for path, rows in ((dataset.train_csv, dataset.train), (dataset.heldout_csv, dataset.heldout)):
        with open(path, newline="", encoding="utf-8") as file:
            read = list(csv.DictReader(file))
        assert list(read[0]) == ["video", "start", "end", "text", "verb", "noun", "label"]
        assert [(row["video"], float(row["start"]), row["text"]) for row in read] == [
            (row.video, row.start, row.text) for row in rows
        ]
    assert {row.video for row in dataset.train} == {"train_000.mp4", "train_001.mp4"}
    assert {row.video for row in dataset.heldout} == {"heldout_000.mp4"}


def test_narrations_follow_each_other_and_fill_the_video(dataset):
    for video in {row.video for row in dataset.train}:
        rows = [row for row in dataset.train if row.video == video]
        assert (rows[0].start, rows[-1].end) == (0, 6)
        for before, after in zip(rows, rows[1:], strict=False):
            assert before.end == after.start
        assert all(1 <= row.end - row.start <= 3 for row in rows)


def test_pictures_in_the_file_show_the_planned_scene(dataset):
    scenes = plan_video(SMALL, "train", index=1)
    frames = mv.decode_all(dataset.videos[1])
    at = 0
    for scene in scenes:
        drawn = draw_scene_frame(scene, 1.0, backdrop_HWC=draw_backdrop(scene.backdrop, 64))
        found = frames[at + scene.frames - 1]
        assert np.abs(found.astype(float) - drawn).mean() < 6  # half-resolution color, compression
        at += scene.frames
    assert at == len(frames)


def test_sentences_name_object_and_action(dataset):
    for row in (*dataset.train, *dataset.heldout):
        article, color, shape, *way = row.text.split()
        assert article in ("the", "a")
        assert f"{color} {shape}" == row.noun
        assert " ".join(way) in ACTIONS[row.verb][2]


def test_same_seed_same_bytes_other_seed_other_videos(dataset, tmp_path):
    again = make_videos(tmp_path / "again", settings=SMALL, jobs=1)
    for one, two in zip(dataset.videos, again.videos, strict=True):
        assert one.read_bytes() == two.read_bytes()
    assert dataset.train_csv.read_bytes() == again.train_csv.read_bytes()
    assert plan_video(SMALL, "train", index=0) != plan_video(replace(SMALL, seed=8), "train", index=0)


def test_no_two_videos_share_a_scene():
    scenes = scenes_of(SMALL) + scenes_of(SMALL, "heldout")
    assert len({scene.backdrop for scene in scenes}) == len(scenes)


def test_objects_and_actions_are_balanced():
    scenes = scenes_of(SyntheticSettings(), videos=44)
    assert 1500 <= len(scenes) <= 2500
    verbs, nouns = Counter(s.verb for s in scenes), Counter(s.noun for s in scenes)
    assert len(verbs) == len(ACTIONS) == 6
    assert len(nouns) == len(COLORS) * len(SHAPES) == 12
    for counts in (verbs, nouns):
        mean = len(scenes) / len(counts)
        assert all(0.75 * mean < count < 1.25 * mean for count in counts.values())
    assert len({(s.verb, s.noun) for s in scenes}) == 72
    heldout = scenes_of(SyntheticSettings(), "heldout", videos=8)
    assert 250 <= len(heldout) <= 400


def test_first_picture_does_not_depend_on_the_action():
    for scene in scenes_of(SMALL, videos=2):
        backdrop = draw_backdrop(scene.backdrop, 64)
        others = [replace(scene, verb=verb) for verb in ACTIONS]
        first = [draw_scene_frame(other, 0.0, backdrop_HWC=backdrop) for other in others]
        last = [draw_scene_frame(other, 1.0, backdrop_HWC=backdrop) for other in others]
        assert all((picture == first[0]).all() for picture in first)
        for i, one in enumerate(last):
            assert all((one != two).any() for two in last[i + 1 :])


def test_start_is_spread_alike_for_every_action():
    """Were places tied to actions, the mean start of a direction would lie off the middle."""
    scenes = scenes_of(SyntheticSettings(seed=5), videos=44)
    for verb in ACTIONS:
        places = np.array([scene.place for scene in scenes if scene.verb == verb])
        # The mean of n numbers uniform over 0.3 has the deviation 0.3 * sqrt(1 / 12 n).
        assert np.abs(places.mean(axis=0) - 0.5).max() < 4 * 0.3 * (1 / 12 / len(places)) ** 0.5
        sizes = np.array([scene.radius for scene in scenes if scene.verb == verb])
        assert abs(sizes.mean() - 0.17) < 4 * 0.06 * (1 / 12 / len(sizes)) ** 0.5


def _object_pixels(scene, progress, side=128):
    backdrop = draw_backdrop(scene.backdrop, side)
    return (draw_scene_frame(scene, progress, backdrop_HWC=backdrop) != backdrop).any(axis=-1)


def _circular_centre(mask):
    """Centre of pixels on a picture that wraps around, as two angles."""
    angles = np.arange(len(mask)) / len(mask) * 2 * np.pi
    return tuple(np.angle((mask.sum(axis=axis) * np.exp(1j * angles)).sum()) for axis in (0, 1))


@pytest.mark.parametrize("verb", DIRECTIONS)
def test_objects_go_where_the_sentence_says(verb):
    for scene in scenes_of(SyntheticSettings(), videos=1)[:15]:
        scene = replace(scene, verb=verb)
        start, later = (_circular_centre(_object_pixels(scene, progress)) for progress in (0.0, 0.5))
        way = [np.angle(np.exp(1j * (b - a))) / (2 * np.pi) for a, b in zip(start, later, strict=True)]
        along = np.dot(way, DIRECTIONS[verb])
        across = np.abs(np.dot(way, DIRECTIONS[verb][::-1]))
        assert 0.11 < along < 0.22, "half of a way of 0.28 to 0.38, and a drift"
        assert across < 0.04


def test_growing_and_shrinking():
    for scene in scenes_of(SyntheticSettings(), videos=1)[:15]:
        for verb, low, high in (("grows", 3, 6), ("shrinks", 0.1, 0.35)):
            masks = [_object_pixels(replace(scene, verb=verb), progress).sum() for progress in (0.0, 1.0)]
            assert low < masks[1] / masks[0] < high


def test_shapes_differ():
    scene = replace(scenes_of(SMALL, videos=1)[0], place=(0.5, 0.5), radius=0.3)
    backdrop = np.zeros((64, 64, 3), np.uint8)
    masks = [
        draw_scene_frame(replace(scene, shape=shape), 0, backdrop_HWC=backdrop).any(axis=-1) for shape in SHAPES
    ]
    radius = 0.3 * 64
    areas = [np.pi * radius**2, (2 * 0.88 * radius) ** 2, np.pi * radius**2 * (1 - 0.25)]
    assert [mask.sum() for mask in masks] == pytest.approx(areas, rel=0.12)


def test_videos_become_chunks(dataset, tmp_path):
    settings = ChunkSettings(chunk_seconds=2)
    report = chunk_video(dataset.videos[0], tmp_path / "train_000.mp4", settings)
    assert (report.made, report.failed) == (3, "")
    assert probe_chunk(tmp_path / "train_000.mp4" / "4.mp4").num_frames == 24


@pytest.mark.parametrize(
    "change", [{"train_videos": 0}, {"fps": 3}, {"seconds": 1}, {"side": 100}, {"side": 16}, {"seed": -1}]
)
def test_settings_are_checked(change):
    with pytest.raises(UserError, match=next(iter(change))):
        replace(SMALL, **change)


def test_workers_stay_light():
    code = "import sys, avion_dali.data.synthetic; print([m for m in sys.modules if '.' not in m])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for heavy in ("torch", "pebble", "pyarrow", "open_clip", "PIL"):
        assert f"'{heavy}'" not in loaded
