"""Groups of clips: what a worker makes of one."""

import pickle
from contextlib import closing
from functools import partial
from pathlib import Path

import chunk_folders
import numpy as np
import odd_decoders
import pytest

from avion_dali.contracts import UserError
from avion_dali.data.manifest import Manifest
from avion_dali.data.planner import ClipRules, Planner
from avion_dali.loading.clip_group import ClipGroup, RowFacts, clips_per_group, work_on
from avion_dali.loading.ring import SharedRing
from avion_dali.loading.worker import decode_into

RULES = ClipRules(num_frames=2, frame_size=16)


@pytest.fixture
def planner(tmp_path: Path) -> Planner:
    return Planner(Manifest(chunk_folders.write_random_manifest(tmp_path / "m", num_samples=40)), RULES, seed=3)


def test_a_clip_of_a_group_fails_alone(planner: Planner) -> None:
    clips, task = (36, 37, 38), partial(decode_into, odd_decoders.fail_on_sevens)
    with closing(SharedRing(2, (5, *RULES.clip_shape))) as ring:
        done = work_on(task, ClipGroup(pickle.dumps(planner), 6, clips, ring.place(1, 2), 4))
        painted = ring.frames(1)[:, 0, 0, 0, 0].tolist()
    assert [result is None for result in done.results] == [False, True, False]
    assert done.failures.keys() == {1} and done.failures[1].kind == "missing"
    assert painted == [[0, 0, 0], [0, 0, 0], [0, 36, 6], [0, 0, 0], [0, 38, 6]]
    requests = [planner.plan(clip, 6) for clip in clips]
    np.testing.assert_array_equal(done.facts_RF, RowFacts.of(requests, 4).values_RF)
    assert done.facts_RF[:, 0].tolist() == list(clips)
    assert done.facts_RF[:, 3:].tolist() == [[49406, 3, 49407, 0]] * 3


def test_facts_without_texts_labels_and_captions(planner: Planner) -> None:
    facts = RowFacts.of([planner.plan(clip, 0) for clip in (4, 2)], 0)
    assert facts.sample_ids.tolist() == [4, 2]
    assert (facts.tokens, facts.labels, facts.caption_ids) == (None, None, None)


def test_a_worker_refuses_a_manifest_that_was_replaced(planner: Planner) -> None:
    stored = pickle.dumps(planner)
    assert pickle.loads(stored).plan(5, 2) == planner.plan(5, 2)
    chunk_folders.write_random_manifest(planner.manifest.folder, num_samples=41)
    with pytest.raises(UserError, match="was built anew while it was in use"):
        pickle.loads(stored)


@pytest.mark.parametrize(("ahead", "workers", "clips"), [(3, 8, 1), (192, 16, 4), (768, 64, 4), (768, 2, 8)])
def test_every_worker_has_groups_waiting(ahead: int, workers: int, clips: int) -> None:
    assert clips_per_group(ahead, workers) == clips
