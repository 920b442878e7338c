"""What a batch carries of its requests besides frames: tokens, labels, captions, sample and view ids."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from chunk_folders import chunk_row

from avion_dali.contracts import ClipBatch, ClipRequest
from avion_dali.data.classes import CaptionTable, ClassTable
from avion_dali.data.manifest import Manifest, Sample, write_manifest
from avion_dali.data.order import BatchSchedule
from avion_dali.data.planner import ClipRules, Planner
from avion_dali.loading.clip_loader import ClipLoader, LoaderSettings
from avion_dali.loading.frames_strategy import FramesStrategy

RULES = ClipRules(num_frames=2, frame_size=16, training=True)


class InstantPool:
    """A pool that does tasks at once, in this process."""

    workers = 1

    def schedule(self, task: Callable, *arguments: object) -> Future:
        future: Future = Future()
        future.set_result(task(*arguments))
        return future

    def is_foreign(self) -> bool:
        return False

    def require_own_process(self) -> None:
        """It has none."""


def leave_as_it_is(request: ClipRequest, frames_VTHWC: np.ndarray) -> None:
    """A decoder that does nothing."""


def manifest_of(folder: Path, labels: list[int], *, graded: bool = False) -> Manifest:
    samples = [Sample(0, 1, i, i + 1.0, ("t",), ((1, i + 2, 9),), label=k) for i, k in enumerate(labels)]
    grades = np.eye(len(labels), dtype=np.float32)
    names = tuple(f"caption {i}" for i in range(len(labels)))
    captions = (
        CaptionTable(names, tuple((1, 50 + i, 9) for i in range(len(labels))), grades) if graded else None
    )
    write_manifest(
        folder,
        chunk_root="/chunks",
        chunks=[chunk_row("v", 0, size=(32, 32))],
        samples=samples,
        captions=captions,
        classes=ClassTable(("a", "b", "c")),
    )
    return Manifest(folder)


def batches_of(
    manifest: Manifest,
    rules: ClipRules,
    *,
    micro_batch: int = 4,
    context_length: int = 4,
    cut_texts: bool = False,
) -> list[ClipBatch]:
    schedule = BatchSchedule(
        manifest.num_samples,
        global_batch=micro_batch,
        micro_batch=micro_batch,
        training=rules.training,
        clips_per_sample=rules.clips_per_row,
    )
    settings = LoaderSettings(torch.device("cpu"), context_length=context_length, cut_texts=cut_texts)
    planner, pool, strategy = Planner(manifest, rules, seed=0), InstantPool(), FramesStrategy(leave_as_it_is)
    with ClipLoader(planner, schedule, pool=pool, strategy=strategy, settings=settings) as loader:
        return list(loader)


def test_labels_follow_their_rows(tmp_path: Path) -> None:
    labels = [2, 0, 1, -1]
    (batch,) = batches_of(manifest_of(tmp_path, labels), RULES)
    assert batch.labels_B.dtype == torch.int64
    assert batch.labels_B.tolist() == [labels[i] for i in batch.sample_ids.tolist()]
    assert batch.caption_ids is None


def test_without_labels_there_are_none(tmp_path: Path) -> None:
    (batch,) = batches_of(manifest_of(tmp_path, [-1] * 4), RULES)
    assert batch.labels_B is None


def test_caption_ids_name_the_texts_that_were_drawn(tmp_path: Path) -> None:
    (batch,) = batches_of(manifest_of(tmp_path, [-1] * 4, graded=True), replace(RULES, text="relevant"))
    assert batch.caption_ids.dtype == np.int64
    assert batch.caption_ids.tolist() == batch.sample_ids.tolist()  # each row's only positive is its own
    assert batch.tokens_BL[:, 1].tolist() == [50 + i for i in batch.caption_ids.tolist()]


@pytest.mark.parametrize(("cut", "length"), [(False, 40), (True, 16)])
def test_texts_are_cut_to_the_longest_of_the_batch_if_asked(tmp_path: Path, cut: bool, length: int) -> None:
    manifest = manifest_of(tmp_path, [-1] * 4, graded=True)
    (batch,) = batches_of(manifest, RULES, context_length=40, cut_texts=cut)
    (short,) = batches_of(manifest, RULES)
    assert batch.tokens_BL.shape == (4, length)
    assert torch.equal(batch.tokens_BL[:, :4], short.tokens_BL) and (batch.tokens_BL[:, 4:] == 0).all()


@pytest.mark.parametrize("repeats", [1, 3])
def test_views_of_a_clip_are_neighbours(tmp_path: Path, repeats: int) -> None:
    (batch,) = batches_of(manifest_of(tmp_path, [0] * 4), replace(RULES, repeats=repeats))
    assert batch.frames_BTHWC.shape == (4 * repeats, 2, 16, 16, 3)
    assert batch.view_ids.tolist() == list(range(repeats)) * 4


def test_several_evaluation_clips_carry_the_same_sample_id(tmp_path: Path) -> None:
    rules = replace(RULES, training=False, eval_clips=3, eval_crops=3)
    batches = batches_of(manifest_of(tmp_path, [2, 1, 0]), rules)
    assert [len(batch) for batch in batches] == [4, 4, 1]
    ids = np.concatenate([batch.sample_ids for batch in batches])
    assert ids.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert torch.cat([batch.labels_B for batch in batches]).tolist() == [2, 2, 2, 1, 1, 1, 0, 0, 0]
    assert batches[2].view_ids.tolist() == [0, 1, 2]
