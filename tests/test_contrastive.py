import math
import socket
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from avion_dali.config import AugmentConfig
from avion_dali.contracts import ClipBatch, UserError
from avion_dali.device_ops.step_key import StepKey
from avion_dali.models.dual_encoder import DualEncoder
from avion_dali.models.text_tower import TextTower, TextTowerConfig
from avion_dali.models.vit import VideoTower, VideoTowerConfig
from avion_dali.objectives.contrastive import Contrastive, info_nce
from avion_dali.objectives.gather import gather_with_grad, world_size

CLIPS = 8
KEY = StepKey(seed=0, step=5)
VIDEO = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
TEXT = torch.tensor([[0.8, 0.6], [0.0, 1.0], [0.6, -0.8]])


def make_model() -> DualEncoder:
    torch.manual_seed(0)
    visual = VideoTower(
        VideoTowerConfig(image_size=16, patch_size=8, num_frames=2, width=32, layers=2, heads=2, embed_dim=16)
    )
    text = TextTowerConfig(context_length=8, vocab_size=50, width=32, layers=1, heads=2, embed_dim=16)
    model = DualEncoder(visual, TextTower(text), train_logit_scale=True)
    with torch.no_grad():
        visual.temporal_embedding.normal_(std=0.1)
    return model


def make_batch(first: int = 0, last: int = CLIPS) -> ClipBatch:
    """Clips `first` to `last` of a fixed global batch."""
    generator = torch.Generator().manual_seed(1)
    frames = torch.randint(0, 256, (CLIPS, 2, 16, 16, 3), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, 48, (CLIPS, 8), generator=generator)
    tokens[:, -1] = 49
    rows = np.arange(first, last)
    return ClipBatch(
        frames_BTHWC=frames[first:last],
        tokens_BL=tokens[first:last],
        labels_B=None,
        sample_ids=rows,
        view_ids=np.zeros_like(rows),
        valid=np.ones(len(rows), dtype=bool),
    )


def step(
    model: nn.Module, batches: list[ClipBatch], **options: bool
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """One training step without an optimizer: report (with the loss) and the parameters' gradients."""
    objective = Contrastive("openai", **options)
    model.zero_grad()
    if len(batches) == 1:
        loss, report = objective.loss(objective.outputs(model, batches[0], KEY))
        loss.backward()
    else:
        loss, report = cached_feature_step(objective, model, batches)
    grads = {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()}
    return {**report, "loss": loss.detach()}, grads


def cached_feature_step(objective, model, batches):
    with torch.no_grad():
        parts = [objective.outputs(model, batch, KEY) for batch in batches]
    leaves = tuple(torch.cat(rows).requires_grad_() for rows in zip(*parts, strict=True))
    loss, report = objective.loss(leaves)
    loss.backward()
    sizes = [len(batch) for batch in batches]
    grads = zip(*(leaf.grad.split(sizes) for leaf in leaves), strict=True)
    for i, (batch, rows) in enumerate(zip(batches, grads, strict=True)):
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = i == len(batches) - 1  # what `no_sync` sets
        torch.autograd.backward(objective.outputs(model, batch, KEY), rows)
    return loss, report


def run_rank(rank: int, ranks: int, folder: str) -> None:
    """One of the processes of the distributed test; it must be importable, hence at module level."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=timedelta(seconds=20)
    )
    model = DistributedDataParallel(make_model())
    share = CLIPS // ranks
    mine, half = rank * share, rank * share + share // 2
    results = {
        "one": step(model, [make_batch(mine, mine + share)]),
        "cached": step(model, [make_batch(mine, half), make_batch(half, mine + share)]),
        "local": step(model, [make_batch(mine, mine + share)], local_loss=True),
        "local cached": step(model, [make_batch(mine, half), make_batch(half, mine + share)], local_loss=True),
    }
    x = torch.full((2, 3), float(rank), requires_grad=True)
    gathered = gather_with_grad(x)
    weights = torch.arange(gathered.numel(), dtype=torch.float32).reshape(gathered.shape)
    (gathered * weights * (rank + 1)).sum().backward()
    results["gather"] = (gathered.detach(), x.grad)
    for name, objective, rows in (
        ("unequal", Contrastive("openai"), 2 + rank),
        ("changed", Contrastive("openai"), 2),
    ):
        rows_BD, scale_B = torch.ones(rows, 2), torch.ones(rows)
        try:
            objective.loss((rows_BD, rows_BD, scale_B))
            objective.loss((rows_BD[1:], rows_BD[1:], scale_B[1:]))
        except UserError as error:
            results[name] = str(error)
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Results of two processes, started once for all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.start_processes(run_rank, (2, str(folder)), nprocs=2, join=False)
    deadline = time.monotonic() + 90
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail(f"the ranks did not finish on {socket.gethostname()}")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def single() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The same step in one process on the whole batch, by the plain formula."""
    model, batch = make_model(), make_batch()
    video, text, _ = Contrastive("openai").outputs(model, batch, KEY)
    logits = model.logit_scale.exp() * video @ text.t()
    log_p = logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()
    loss = -log_p.mean() / 2
    loss.backward()
    accuracy = sum(int(row.argmax()) == i for i, row in enumerate(logits)) / CLIPS
    report = {"loss": loss.detach(), "accuracy": torch.tensor(accuracy), "logit_scale": torch.tensor(1 / 0.07)}
    return report, {name: p.grad for name, p in model.named_parameters()}


def assert_same_step(result, expected) -> None:
    (report, grads), (expected_report, expected_grads) = result, expected
    for name, value in expected_report.items():
        assert torch.allclose(report[name], value, atol=1e-5), name
    assert grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        # Keys' biases cancel in the softmax over keys, so only their parts of a tensor are near zero.
        assert grad.abs().max() > 1e-4, f"{name}: a zero gradient would prove nothing"
        assert torch.allclose(grads[name], grad, atol=1e-5, rtol=1e-4), name


@pytest.mark.parametrize(("scale", "loss"), [(1 / 0.07, 8.909475), (1.0, 1.355642)])
def test_loss_vectors(scale, loss):
    value, accuracy = info_nce(VIDEO, TEXT, scale=torch.tensor(scale))
    assert float(value) == pytest.approx(loss, abs=1e-5)
    assert float(accuracy) == pytest.approx(1 / 3)


def test_loss_of_indistinguishable_pairs_is_the_log_of_their_number():
    same = torch.ones(5, 1)
    assert float(info_nce(same, same, scale=torch.tensor(50.0))[0]) == pytest.approx(math.log(5), abs=1e-5)


def test_loss_is_float32_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, _ = info_nce(VIDEO, TEXT, scale=torch.tensor(1 / 0.07))
    assert value.dtype == torch.float32 and float(value) == pytest.approx(8.909475, abs=1e-5)


def test_single_process_needs_no_process_group(single):
    x = torch.ones(2, 2)
    assert world_size() == 1 and gather_with_grad(x) is x
    assert_same_step(step(make_model(), [make_batch()]), single)


@pytest.mark.parametrize("cuts", [[0, 4, 8], [0, 2, 4, 6, 8], [0, 5, 8]])
def test_cached_features_equal_the_large_batch(single, cuts):
    batches = [make_batch(first, last) for first, last in zip(cuts, cuts[1:], strict=False)]
    assert_same_step(step(make_model(), batches), single)


@pytest.mark.parametrize("way", ["one", "cached"])
def test_every_rank_gets_the_loss_and_gradient_of_the_global_batch(ranks, single, way):
    for results in ranks:
        assert_same_step(results[way], single)


@pytest.mark.parametrize("way", ["local", "local cached"])
def test_local_losses_average_to_the_global_one_with_its_gradient(ranks, single, way):
    (first, first_grads), (second, second_grads) = (results[way] for results in ranks)
    assert abs(float(first["loss"] - second["loss"])) > 1e-3, "each rank scores clips of its own"
    mean = {name: (first[name] + second[name]) / 2 for name in first}
    for grads in (first_grads, second_grads):
        assert_same_step((mean, grads), single)


def test_gather_stacks_in_rank_order_and_sums_gradients(ranks):
    for rank, results in enumerate(ranks):
        gathered, grad = results["gather"]
        assert gathered[:, 0].tolist() == [0.0, 0.0, 1.0, 1.0]
        # Each rank weighted the elements 0..11 by (rank + 1): together by 3.
        expected = 3.0 * torch.arange(12.0).reshape(4, 3)[2 * rank : 2 * rank + 2]
        assert torch.equal(grad, expected)


def test_unequal_or_changing_numbers_of_clips_are_refused(ranks):
    for results in ranks:
        assert "[2, 3] clips" in results["unequal"]
        assert "holds 1 clips in this step and held 2 before" in results["changed"]


def test_outputs_take_the_precision_of_autocast():
    seen = []
    model = make_model()
    model.visual.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    objective = Contrastive("openai")
    outputs = objective.outputs(model, make_batch(), KEY)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = objective.outputs(model, make_batch(), KEY)
    assert seen == [torch.float32, torch.bfloat16]
    assert all(len(rows) == CLIPS and rows.dtype == torch.float32 for rows in (*outputs, *half))
    assert torch.allclose(outputs[0], half[0], atol=0.05)


def test_normalization_is_applied():
    outputs = [
        Contrastive(name).outputs(make_model(), make_batch(), KEY)[0] for name in ("openai", "openai-avion")
    ]
    assert not torch.allclose(*outputs, atol=1e-4)


def test_batch_without_texts_or_with_views_is_refused():
    batch = make_batch()
    batch.tokens_BL = None
    with pytest.raises(UserError, match="needs texts"):
        Contrastive("openai").outputs(make_model(), batch, KEY)
    views = make_batch()
    views.sample_ids = views.sample_ids[:4]  # of which each then has two views
    with pytest.raises(UserError, match=r"one view per clip.*data\.repeats"):
        Contrastive("openai").outputs(make_model(), views, KEY)


def test_augmentation_changes_the_clips_and_is_repeated_by_its_key():
    objective, model = Contrastive("openai", augment=AugmentConfig(color_jitter=0.5)), make_model().eval()
    whole = objective.outputs(model, make_batch(), KEY)[0]
    halves = [objective.outputs(model, make_batch(*span), KEY)[0] for span in ((0, 3), (3, CLIPS))]
    assert torch.allclose(whole, torch.cat(halves), atol=1e-6)
    plain = Contrastive("openai").outputs(model, make_batch(), KEY)[0]
    other = objective.outputs(model, make_batch(), KEY._replace(step=6))[0]
    assert not torch.allclose(whole, plain, atol=1e-4) and not torch.allclose(whole, other, atol=1e-4)
