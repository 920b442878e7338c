"""Recognition and masked evaluation: averages over views, what is left out, and what the metrics are called."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_masked_objective import TUBES, Zeros
from test_masked_objective import make_batch as masked_batch
from torch import nn

from avion_dali.config import MaskedVideoConfig
from avion_dali.contracts import ClipBatch, UserError
from avion_dali.data.classes import ClassTable
from avion_dali.device_ops.normalize import PIXEL_STATISTICS
from avion_dali.engine.distributed import Distributed
from avion_dali.objectives.masked_reconstruction import MaskedReconstruction
from avion_dali.tasks import evaluation
from avion_dali.tasks.masked_pretraining import ReconstructionScorer
from avion_dali.tasks.recognition import ClassResult, ClassScorer

CLASSES = ClassTable(("cut carrot", "cut knife", "wash carrot"), verbs=(0, 0, 4), nouns=(2, 7, 2))


class PixelLogits(nn.Module):
    """Logits are the first pixels of the red channel, in tenths of a level."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, frames_BCTHW: torch.Tensor) -> torch.Tensor:
        mean, std = PIXEL_STATISTICS["imagenet"]
        return ((frames_BCTHW[:, 0, 0, 0, : self.classes] * std[0] + mean[0]) / 10).round(decimals=3)


def batch_of(
    ids: list[int], logits: list[list[float]], labels: list[int], *, valid: list[bool] | None = None
) -> ClipBatch:
    """Clips whose pixels encode logits; more logits than ids are views."""
    views = len(logits) // max(len(ids), 1)
    frames = torch.zeros(len(logits), 2, 16, 16, 3, dtype=torch.uint8)
    if logits:
        frames[:, 0, 0, :3] = (torch.tensor(logits) * 10).to(torch.uint8)[..., None]
    return ClipBatch(
        frames,
        None,
        torch.tensor(labels, dtype=torch.int64),
        np.array(ids, dtype=np.int64),
        np.tile(np.arange(views), len(ids)),
        np.array(valid or [True] * len(ids), dtype=bool),
    )


def evaluate(batches: list[ClipBatch], model: nn.Module | None = None) -> ClassResult:
    return evaluation.evaluate(
        model or PixelLogits(),
        batches,
        ClassScorer(CLASSES, normalization="imagenet"),
        precision="fp32",
        distributed=Distributed(),
    )


def softmax(rows: list[list[float]]) -> np.ndarray:
    exponentials = np.exp(np.array(rows))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def test_one_view_gives_the_models_own_probabilities():
    logits = [[3.0, 1.0, 0.0], [0.0, 1.0, 2.5]]
    result = evaluate([batch_of([5, 2], logits, [0, 1])])
    assert result.sample_ids.tolist() == [2, 5] and result.labels.tolist() == [1, 0]
    np.testing.assert_allclose(result.probabilities_NK, softmax(logits)[::-1], atol=1e-6)
    assert result.scores == result.logit_scores
    metrics = result.metrics()
    assert metrics["top1"] == metrics["top1_of_mean_logits"] == 0.5
    assert (metrics["verb_top1"], metrics["noun_top1"]) == (0.5, 0.5)
    assert (metrics["mean_class"], metrics["clips"], metrics["unreadable"]) == (0.5, 2, 0)
    names = {"top1", "top5", "mean_class", "verb_top1", "noun_top1", "clips", "unreadable"}
    assert set(metrics) == names | {"top1_of_mean_logits", "top5_of_mean_logits"}


def test_views_and_clips_are_averaged_both_ways():
    """One confident view against two lukewarm ones: means of probabilities and of logits disagree."""
    logits = [[0.0, 9.0, 0.0], [2.0, 0.0, 0.0], [2.0, 0.0, 0.0], [2.0, 0.0, 0.0]]
    # Two clips of two crops, in different batches.
    result = evaluate([batch_of([8], logits[:2], [0]), batch_of([8], logits[2:], [0])])
    mean = softmax(logits).mean(axis=0)
    np.testing.assert_allclose(result.probabilities_NK, [mean], atol=1e-6)
    assert mean.argmax() == 0 and np.mean(logits, axis=0).argmax() == 1
    assert result.metrics()["top1"] == 1 and result.metrics()["top1_of_mean_logits"] == 0
    assert result.metrics()["clips"] == 1 and isinstance(result.metrics()["clips"], int)


def test_verbs_and_nouns_come_from_summed_probabilities():
    result = evaluate([batch_of([0], [[1.0, 1.0, 1.4]], [0])])
    assert result.metrics()["top1"] == 0, "the best action is wash carrot"
    assert result.metrics()["verb_top1"] == 1, "but cutting is more likely than washing"


def test_unreadable_clips_are_left_out_and_counted():
    good, bad = [5.0, 0.0, 0.0], [0.0, 9.0, 0.0]
    batches = [
        batch_of([0, 1], [good, bad], [0, 0], valid=[True, False]),
        batch_of([0], [bad], [0], valid=[False]),
        batch_of([], [], []),
    ]
    result = evaluate(batches)
    assert result.sample_ids.tolist() == [0] and result.metrics()["unreadable"] == 2
    np.testing.assert_allclose(result.probabilities_NK, softmax([good]), atol=1e-6)
    with pytest.raises(UserError, match="none of the 1"):
        evaluate([batch_of([0], [good], [0], valid=[False])])


def test_classes_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="the model has 2 classes, the manifest has 3"):
        evaluate([batch_of([0], [[1.0, 0.0, 0.0]], [0])], PixelLogits(classes=2))
    with pytest.raises(UserError, match="class of the training manifest"):
        evaluate([batch_of([0], [[1.0, 0.0, 0.0]], [-1])])


def test_masked_evaluation_is_the_mean_over_clips_and_repeats():
    objective = MaskedReconstruction(
        MaskedVideoConfig(mask_ratio=0.5, normalize_target=False), normalization="imagenet", **TUBES
    )

    def run(batches: list[ClipBatch]) -> dict[str, float]:
        scorer = ReconstructionScorer(objective)
        result = evaluation.evaluate(Zeros(), batches, scorer, precision="fp32", distributed=Distributed())
        return result.metrics()

    together = run([masked_batch([0, 1, 2])])
    assert together == run([masked_batch([2, 0]), masked_batch([1])])
    assert together["loss"] == -together["reconstruction"] > 0 and together["clips"] == 3
    damaged = masked_batch([1, 2])
    damaged.valid[0] = False
    part = run([masked_batch([0]), damaged])
    assert part["unreadable"] == 1 and part["clips"] == 2 and part["loss"] != together["loss"]
    damaged.valid[:] = False
    with pytest.raises(UserError, match="none of the 2"):
        run([damaged])
