"""Every objective with every encoder it goes with: it learns, and cutting a batch up does not change the step.

Micro-batches and ranks are exact (up to rounding) for all objectives here. Classification is compared without
mixing: with it a clip's partner lies in its own micro-batch, so the cut decides who is mixed with whom.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from avion_dali.config import (
    AugmentConfig,
    ClassificationConfig,
    MaskedVideoConfig,
    MaxMarginConfig,
    ModelConfig,
    OptimConfig,
)
from avion_dali.contracts import ClipBatch
from avion_dali.data.classes import ClassTable
from avion_dali.device_ops.step_key import StepKey
from avion_dali.engine.accumulate import averages_gradients, coupled_backward
from avion_dali.engine.distributed import Distributed
from avion_dali.engine.optimizers import build_optimizer, parameter_groups
from avion_dali.models.classifier import build_classifier
from avion_dali.models.dual_encoder import build_dual_encoder
from avion_dali.models.masked_video import build_masked_video
from avion_dali.objectives.classification import Classification
from avion_dali.objectives.contrastive import Contrastive
from avion_dali.objectives.masked_reconstruction import MaskedReconstruction
from avion_dali.objectives.max_margin import MaxMargin
from avion_dali.tasks.evaluation import evaluate
from avion_dali.tasks.recognition import ClassScorer

CLIPS, FRAMES, SIDE, CLASSES = 8, 2, 32, 5
KEY = StepKey(seed=0, step=2)
CLIP = {"num_frames": FRAMES, "frame_size": SIDE}
TABLE = ClassTable(tuple("abcde"))
DUAL, CLASSIFY = ("contrastive", "max-margin", "sms"), ("classification",)
PAIRS = [
    *[(encoder, objective) for encoder in ("vit", "timesformer") for objective in DUAL],
    *[(encoder, objective) for encoder in ("vit", "timesformer", "videomae") for objective in CLASSIFY],
    ("videomae", "masked-video"),
]
OBJECTIVES = [("vit", *DUAL), ("vit", *CLASSIFY), ("videomae", "masked-video")]
ONE_EACH = [(encoder, name) for encoder, *names in OBJECTIVES for name in names]


class HalfRelevant:
    """A clip's caption is relevant to it, its neighbours' are half relevant."""

    def relevancy(self, rows: np.ndarray, captions: np.ndarray | None = None) -> np.ndarray:
        distance = np.abs(np.subtract.outer(rows, captions))
        return np.select([distance == 0, distance == 1], [1.0, 0.5], 0.0).astype(np.float32)


def make_case(encoder: str, objective: str, **options: object) -> tuple[nn.Module, object]:
    """A tiny model and its objective; the weights are the same at every call."""
    torch.manual_seed(0)
    config = ModelConfig(encoder=encoder, size="tiny", context_length=8, embed_dim=32, **options)
    if objective == "classification":
        model = build_classifier(config, num_classes=CLASSES, dropout=0.0, **CLIP)
        settings = ClassificationConfig(label_smoothing=0.1)
        return model, Classification(settings, AugmentConfig(), normalization="openai", num_classes=CLASSES)
    if objective == "masked-video":
        masked = build_masked_video(config, decoder_depth=1, **CLIP)
        return masked, MaskedReconstruction(
            MaskedVideoConfig(mask_ratio=0.5),
            normalization="imagenet",
            time_slots=masked.time_slots,
            places=masked.places,
        )
    dual = build_dual_encoder(config, **CLIP)
    if objective == "contrastive":
        return dual, Contrastive("openai")
    if objective == "max-margin":
        return dual, MaxMargin(MaxMarginConfig(), "openai", None)
    graded = MaxMarginConfig(loss="symmetric-multi-similarity", margin=0.6)
    return dual, MaxMargin(graded, "openai", HalfRelevant())


def make_batch(first: int = 0, last: int = CLIPS) -> ClipBatch:
    """Clips `first` to `last` of a fixed global batch."""
    generator = torch.Generator().manual_seed(1)
    frames = torch.randint(0, 256, (CLIPS, FRAMES, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, 48, (CLIPS, 8), generator=generator)
    tokens[:, -1] = 49407
    rows = np.arange(first, last)
    return ClipBatch(
        frames_BTHWC=frames[first:last],
        tokens_BL=tokens[first:last],
        labels_B=torch.arange(CLIPS)[first:last] % CLASSES,
        sample_ids=rows,
        view_ids=np.zeros_like(rows),
        valid=np.ones(len(rows), dtype=bool),
        caption_ids=rows,
    )


def step(
    model: nn.Module, objective: object, batches: list[ClipBatch]
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one step over micro-batches, as the training loop computes them."""
    model.zero_grad()

    def context(micro: int) -> object:
        return averages_gradients(model, last=micro == len(batches) - 1)

    if objective.couples_samples and len(batches) > 1:
        loss, _ = coupled_backward(
            lambda micro: objective.outputs(model, batches[micro], KEY),
            micro_batches=len(batches),
            loss_of=objective.loss,
            backward=lambda loss: loss.backward(),
            context=context,
        )
    else:
        losses = []
        for micro, batch in enumerate(batches):
            with context(micro) if len(batches) > 1 else nullcontext():
                part, _ = objective.loss(objective.outputs(model, batch, KEY))
                (part / len(batches)).backward()
            losses.append(part.detach())
        loss = torch.stack(losses).mean()
    grads = {
        name.removeprefix("module."): p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    return float(loss), grads


def assert_same_step(result: tuple, expected: tuple) -> None:
    assert result[0] == pytest.approx(expected[0], abs=1e-5)
    assert result[1].keys() == expected[1].keys() and expected[1]
    assert max(float(grad.abs().max()) for grad in expected[1].values()) > 1e-3
    for name, grad in expected[1].items():
        torch.testing.assert_close(result[1][name], grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(("encoder", "name"), PAIRS)
def test_three_steps_lower_the_loss(encoder: str, name: str) -> None:
    model, objective = make_case(encoder, name)
    optimizer = build_optimizer(parameter_groups(model, 0.01), OptimConfig())
    batch, losses = make_batch(), []
    for _ in range(4):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 5e-4
        loss, _ = step(model, objective, [batch])
        losses.append(loss)
        optimizer.step()
    assert losses[0] > losses[-1] * 1.01 and np.isfinite(losses).all()


@pytest.mark.parametrize("cuts", [(0, 4, 8), (0, 2, 4, 6, 8)])
@pytest.mark.parametrize(("encoder", "name"), ONE_EACH)
def test_micro_batches_equal_one_large_batch(encoder: str, name: str, cuts: tuple[int, ...]) -> None:
    model, objective = make_case(encoder, name)
    whole = step(model, objective, [make_batch()])
    batches = [make_batch(first, last) for first, last in zip(cuts, cuts[1:], strict=False)]
    assert_same_step(step(model, objective, batches), whole)


def test_mixing_depends_on_the_cut_only_in_who_is_mixed_with_whom() -> None:
    model, _ = make_case("vit", "classification")
    mixing = Classification(
        ClassificationConfig(mixup=0.8), AugmentConfig(), normalization="openai", num_classes=CLASSES
    )
    shares = []
    for batch in (make_batch(), make_batch(0, 4), make_batch(4, 8)):
        _, targets = mixing.outputs(model, batch, KEY)
        shares.append(targets[torch.arange(len(batch)), batch.labels_B])
    # One weight for the step, whichever micro-batch; a clip mixed with its own class keeps all.
    weights = {round(float(share), 5) for share in torch.cat(shares)} - {1.0}
    assert len(weights) == 1


def evaluation_batches(rank: int | None) -> list[ClipBatch]:
    """Rows 0 to 3, row 2 with two clips; on two ranks its clips lie on different ones. None: all of them."""
    shares = [[0, 1, 2], [2, 3]]
    rows = [row for share in (shares if rank is None else [shares[rank]]) for row in share]
    batches = [make_batch(row, row + 1) for row in rows]
    seen: set[int] = set()
    for row, batch in zip(rows, batches, strict=True):
        # The second clip of row 2 shows something else.
        if row == 2 and (rank == 1 or row in seen):
            batch.frames_BTHWC = make_batch(5, 6).frames_BTHWC
        seen.add(row)
    return batches


def evaluated(rank: int | None) -> dict[str, object]:
    model, _ = make_case("vit", "classification")
    result = evaluate(
        model.eval(),
        evaluation_batches(rank),
        ClassScorer(TABLE, normalization="openai"),
        precision="fp32",
        distributed=Distributed(rank=rank or 0, world_size=1 if rank is None else 2),
    )
    ids, labels = torch.from_numpy(result.sample_ids), torch.from_numpy(result.labels)
    return {
        "ids": ids,
        "labels": labels,
        "probabilities": torch.from_numpy(result.probabilities_NK),
        **result.logit_scores,
    }


def run_rank(rank: int, ranks: int, folder: str) -> None:
    """One of the processes of the distributed test; it must be importable, hence at module level."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=timedelta(seconds=30)
    )
    share = CLIPS // ranks
    first, middle, last = rank * share, rank * share + share // 2, (rank + 1) * share
    results: dict[str, object] = {"evaluation": evaluated(rank)}
    for encoder, name in ONE_EACH:
        model, objective = make_case(encoder, name)
        parallel = DistributedDataParallel(model)
        results[f"{name} one"] = step(parallel, objective, [make_batch(first, last)])
        results[f"{name} two"] = step(
            parallel, objective, [make_batch(first, middle), make_batch(middle, last)]
        )
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Results of two processes, started once for all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.start_processes(run_rank, (2, str(folder)), nprocs=2, join=False)
    deadline = time.monotonic() + 100
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("the ranks did not finish")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("way", ["one", "two"])
@pytest.mark.parametrize(("encoder", "name"), ONE_EACH)
def test_two_ranks_equal_one(ranks: list[dict], encoder: str, name: str, way: str) -> None:
    model, objective = make_case(encoder, name)
    expected = step(model, objective, [make_batch()])
    loss = np.mean([results[f"{name} {way}"][0] for results in ranks])
    for results in ranks:
        assert_same_step((loss, results[f"{name} {way}"][1]), expected)


def test_a_rows_clips_on_two_ranks_are_averaged_as_on_one(ranks: list[dict]) -> None:
    expected = evaluated(None)
    assert expected["ids"].tolist() == [0, 1, 2, 3]
    for results in ranks:
        found = results["evaluation"]
        torch.testing.assert_close(found.pop("probabilities"), expected["probabilities"])
        assert all(torch.equal(found.pop(name), expected[name]) for name in ("ids", "labels"))
        assert found == {name: expected[name] for name in found} and "top1" in found
