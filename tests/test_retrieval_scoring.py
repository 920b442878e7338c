"""Evaluation: captions are unique, relevancy is graded, unreadable clips are left out and counted."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from avion_dali.contracts import ChunkRef, ClipBatch, UserError
from avion_dali.data.classes import CaptionTable
from avion_dali.data.manifest import Chunk, Manifest, Sample, write_manifest
from avion_dali.engine.distributed import Distributed
from avion_dali.tasks import evaluation
from avion_dali.tasks.evaluation import freeze_first_frame
from avion_dali.tasks.retrieval_scoring import RetrievalScorer, build_gallery

ROWS = [
    ("cut the carrot", "cut", ("carrot",)),
    ("wash the knife", "wash", ("knife",)),
    ("cut the carrot", "cut", ("carrot",)),
    ("cut carrot with knife", "cut", ("carrot", "knife")),
]


def manifest_of(
    folder: Path, rows: list[tuple[str, str, tuple[str, ...]]], captions: CaptionTable | None = None
) -> Manifest:
    ref = ChunkRef(str(folder / "a" / "0.mp4"), 1, 900, 64, 48)
    samples = [
        Sample(
            0, 1, i, i + 1.0, (text,), ((1, 10 + sorted({r[0] for r in rows}).index(text), 99),), verb, nouns
        )
        for i, (text, verb, nouns) in enumerate(rows)
    ]
    write_manifest(
        folder / "m",
        chunk_root=folder,
        chunks=[Chunk(ref, "a", 0.0, Fraction(30), "h264")],
        samples=samples,
        captions=captions,
    )
    return Manifest(folder / "m")


class Lookup(nn.Module):
    """Video vector: one-hot of the first pixel; text vector: one-hot of the second token."""

    def __init__(self) -> None:
        super().__init__()
        self.textual = nn.Module()
        self.textual.context_length = 4

    def encode_video(self, frames_BCTHW: torch.Tensor) -> torch.Tensor:
        levels = (frames_BCTHW[:, 0, 0, 0, 0] * 68.5005327 + 122.7709383).round().long()
        return torch.eye(8)[levels]

    def encode_text(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        return torch.eye(8)[tokens_BL[:, 1] - 10]


def batch_of(ids: list[int], levels: list[int], valid: list[bool]) -> ClipBatch:
    frames = torch.zeros(len(ids), 2, 16, 16, 3, dtype=torch.uint8)
    frames[:, 0] = torch.tensor(levels, dtype=torch.uint8)[:, None, None, None]
    rows = np.zeros(len(ids), dtype=np.int64)
    return ClipBatch(frames, None, None, np.array(ids), rows, np.array(valid))


def evaluate(manifest: Manifest, batches: list[ClipBatch], **options: object) -> object:
    return evaluation.evaluate(
        Lookup(),
        batches,
        RetrievalScorer(build_gallery(manifest), normalization="openai"),
        precision="fp32",
        distributed=Distributed(),
        **options,
    )


def test_captions_are_unique_and_graded_by_classes(tmp_path: Path) -> None:
    gallery = build_gallery(manifest_of(tmp_path, ROWS))
    assert gallery.texts == ("cut the carrot", "wash the knife", "cut carrot with knife")
    expected = [[1, 0, 0.75], [0, 1, 0.25], [1, 0, 0.75], [0.75, 0.25, 1]]
    np.testing.assert_allclose(gallery.relevancy_VT, expected)


def test_without_classes_only_the_same_text_is_relevant(tmp_path: Path) -> None:
    rows = [(text, "", ()) for text, _, _ in ROWS]
    gallery = build_gallery(manifest_of(tmp_path, rows))
    np.testing.assert_array_equal(gallery.relevancy_VT, [[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1]])


def test_verbs_alone_do_not_make_grades(tmp_path: Path) -> None:
    """Two empty noun sets are equal: graded without nouns, every wrong pair would be half right."""
    rows = [(text, verb, ()) for text, verb, _ in ROWS]
    gallery = build_gallery(manifest_of(tmp_path, rows))
    assert set(np.unique(gallery.relevancy_VT)) == {0.0, 1.0}


def test_an_empty_share_of_a_rank_is_passed_over(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, ROWS)
    empty = ClipBatch(
        torch.zeros(0, 2, 16, 16, 3, dtype=torch.uint8), None, None, *(np.zeros(0, int),) * 2, np.zeros(0, bool)
    )
    result = evaluate(manifest, [batch_of([0, 1, 2, 3], [1, 2, 1, 0], [True] * 4), empty])
    assert result.metrics()["clips"] == 4


def test_a_perfect_model_scores_one_in_any_order_of_batches(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, ROWS)
    # Sorted texts: "cut carrot with knife" 0, "cut the carrot" 1, "wash the knife" 2.
    batches = [batch_of([3, 1], [0, 2], [True, True]), batch_of([0, 2], [1, 1], [True, True])]
    result = evaluate(manifest, batches)
    assert result.sample_ids.tolist() == [0, 1, 2, 3]
    assert result.metrics()["map_avg"] == pytest.approx(1)
    assert result.metrics()["clips"] == 4


def test_unreadable_clips_are_left_out_and_counted(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, ROWS)
    result = evaluate(manifest, [batch_of([0, 1, 2, 3], [1, 7, 1, 0], [True, False, True, True])])
    assert result.sample_ids.tolist() == [0, 2, 3]
    assert result.metrics()["unreadable"] == 1
    assert all(isinstance(result.metrics()[name], int) for name in ("clips", "unreadable"))
    assert result.metrics()["map_v2t"] == pytest.approx(1)
    with pytest.raises(UserError, match="none of the 2"):
        evaluate(manifest, [batch_of([0, 1], [1, 2], [False, False])])


def test_frozen_frames_repeat_the_first_one(tmp_path: Path) -> None:
    frames = torch.arange(2 * 3 * 4).reshape(2, 3, 1, 4, 1).expand(2, 3, 2, 4, 3).to(torch.uint8)
    frozen = freeze_first_frame(frames)
    for t in range(3):
        torch.testing.assert_close(frozen[:, t], frames[:, 0])


def test_clips_of_a_row_are_averaged_wherever_they_are(tmp_path: Path) -> None:
    """Two clips of two crops each say 0, 0, 0 and 1 of row 3: the mean is nearest to text 0."""
    manifest = manifest_of(tmp_path, ROWS)
    views = ClipBatch(
        batch_of([3] * 4, [0, 1, 1, 2], [True] * 4).frames_BTHWC,
        None,
        None,
        np.array([3, 0]),
        np.array([0, 1, 0, 1]),
        np.array([True, True]),
    )
    other = ClipBatch(
        batch_of([3] * 4, [0, 0, 2, 2], [True] * 4).frames_BTHWC,
        None,
        None,
        np.array([3, 1]),
        np.array([0, 1, 0, 1]),
        np.array([True, True]),
    )
    result = evaluate(manifest, [views, batch_of([2], [1], [True]), other])
    assert result.sample_ids.tolist() == [0, 1, 2, 3]
    # Texts 1, 2, 0 in order of appearance. Row 3: three views of 0 and one of 1; row 0: one of 1 and one of 2.
    expected = [[2**-0.5, 2**-0.5, 0], [0, 1, 0], [1, 0, 0], [10**-0.5, 0, 3 * 10**-0.5]]
    np.testing.assert_allclose(result.similarity_VT, expected, atol=1e-6)


def test_a_row_is_scored_by_the_clips_that_could_be_read(tmp_path: Path) -> None:
    result = evaluate(manifest_of(tmp_path, ROWS), [batch_of([0, 0, 1], [7, 1, 2], [False, True, False])])
    assert result.sample_ids.tolist() == [0] and result.unreadable == 2
    np.testing.assert_allclose(result.similarity_VT, [[1, 0, 0]], atol=1e-6)


def test_stored_captions_and_grades_are_the_gallery(tmp_path: Path) -> None:
    """EPIC-KITCHENS-100's protocol: clips against given captions and a given relevancy matrix."""
    grades = np.array([[1, 0.25], [0, 1], [1, 0], [0.5, 0.75]], dtype=np.float32)
    captions = CaptionTable(("cut the carrot", "wash the knife"), ((1, 11, 99), (1, 12, 99)), grades)
    gallery_manifest = manifest_of(tmp_path, ROWS, captions)
    result = evaluate(gallery_manifest, [batch_of([0, 1, 2, 3], [1, 2, 1, 0], [True, True, True, False])])
    assert result.texts == ("cut the carrot", "wash the knife")
    np.testing.assert_array_equal(result.relevancy_VT, grades[:3])
    np.testing.assert_allclose(result.similarity_VT, [[1, 0], [0, 1], [1, 0]], atol=1e-6)
    assert result.metrics()["map_avg"] == pytest.approx(1)
