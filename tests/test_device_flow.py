"""Whole training steps on a GPU that exists on paper only, see `paper_gpu`.

A step must neither mix devices nor make the host wait for the GPU. What it may read is what `HostCopy` brings:
the numbers of the loss guard and of log rows, a step later. The known exceptions are tested as such below.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from paper_gpu import GPU, PaperGpu, WaitsForGpuError, paper_gpu  # noqa: F401
from test_objectives_train import CLASSES, PAIRS, make_batch, make_case
from toy_training import ToyStats

from avion_dali.config import AugmentConfig, ClassificationConfig, OptimConfig, RunConfig
from avion_dali.contracts import ClipBatch
from avion_dali.engine import loop as loop_module
from avion_dali.engine.distributed import Distributed
from avion_dali.engine.loop import TrainLoop
from avion_dali.engine.loop_settings import LoopSettings
from avion_dali.engine.optimizers import build_optimizer, parameter_groups
from avion_dali.engine.run_log import LOG_NAME, read_rows
from avion_dali.models.presets import PRESETS, Preset
from avion_dali.objectives.classification import Classification

ONE_BLOCK = Preset(64, 16, 192, 1, 3, 128, 1, 4)
CLIPS = 4
# SMS looks relevancies up on the CPU, see `MaxMargin`.
PAIRS_ON_GPU = [(encoder, name) for encoder, name in PAIRS if name != "sms"]
# Precision, micro-batches, recomputed blocks; for every encoder and objective.
WAYS = [("fp32", 1, 1), ("bf16", 2, 1), ("fp16", 2, 0)]


@dataclass
class PaperLoader:
    """Batches that are on the GPU already."""

    gpu: PaperGpu
    accum_steps: int = 1
    steps_per_epoch: int = 2
    stats: ToyStats = field(default_factory=ToyStats)

    def batches(self, first_step: int, last_step: int) -> Iterator[ClipBatch]:
        for _ in range((last_step - first_step) * self.accum_steps):
            batch = make_batch(0, CLIPS)
            with self.gpu.waiting_allowed():
                on_gpu = {n: getattr(batch, n).to(GPU) for n in ("frames_BTHWC", "tokens_BL", "labels_B")}
            yield replace(batch, **on_gpu)

    def close(self) -> None: ...


def make_loop(
    gpu: PaperGpu,
    case: tuple[str, str],
    *,
    folder: Path = Path("none"),
    way: tuple[int, int] = (1, 0),
    objective: Any = None,
    optim: dict[str, Any] | None = None,
    **run: Any,
) -> TrainLoop:
    """A loop with everything that works on the GPU: clipping, averages of weights, and spikes."""
    accum_steps, checkpoint_every = way
    with gpu.waiting_allowed():
        with torch.device("meta"):
            model, own = make_case(*case, checkpoint_every=checkpoint_every, drop_path=0.1)
        gpu.to_gpu(model)
        rates = OptimConfig(
            **{"global_batch": CLIPS, "epochs": 1, "clip_grad_norm": 1.0, "ema_decay": 0.9} | (optim or {})
        )
        return TrainLoop(
            model,
            build_optimizer(parameter_groups(model, 0.1), rates),
            objective=objective or own,
            loader=PaperLoader(gpu, accum_steps),
            settings=LoopSettings(folder, rates, RunConfig(spike_factor=4.0, **run), tensorboard=False),
            distributed=Distributed(device=GPU),
        )


@pytest.fixture(autouse=True)
def one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "tiny", ONE_BLOCK)


@pytest.mark.parametrize(("precision", "accum_steps", "checkpoint_every"), WAYS)
@pytest.mark.parametrize(("encoder", "name"), PAIRS_ON_GPU)
def test_a_step_stays_on_the_gpu(
    gpu: PaperGpu, encoder: str, name: str, precision: str, accum_steps: int, checkpoint_every: int
) -> None:
    way = accum_steps, checkpoint_every
    loop = make_loop(gpu, (encoder, name), way=way, precision=precision)
    (numbers,) = loop.steps(0, 1)
    assert {number.device for number in numbers.values()} == {GPU}
    for parameter in loop.parameters:
        assert parameter.device == GPU and parameter.dtype == torch.float32
        assert parameter.grad is None or parameter.grad.dtype == torch.float32
    assert sum(parameter.grad is not None for parameter in loop.parameters) > 10


def test_lion_stays_on_the_gpu(gpu: PaperGpu) -> None:
    """The fused kernel of SGD cannot be run on paper."""
    loop = make_loop(gpu, ("vit", "classification"), optim={"optimizer": "lion"}, precision="bf16")
    assert len(list(loop.steps(0, 2))) == 2


def test_augmentation_and_mixing_stay_on_the_gpu(gpu: PaperGpu) -> None:
    for mixing in ({"mixup": 0.8}, {"cutmix": 1.0}):
        augmented = Classification(
            ClassificationConfig(label_smoothing=0.1, **mixing),
            AugmentConfig(color_jitter=0.4),
            normalization="openai",
            num_classes=CLASSES,
        )
        loop = make_loop(gpu, ("vit", "classification"), objective=augmented)
        assert len(list(loop.steps(0, 1))) == 1


def test_log_rows_do_not_wait_and_are_written_a_step_later(
    gpu: PaperGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = make_loop(gpu, ("vit", "classification"), folder=tmp_path, precision="fp16", log_every=1)
    written: list[int] = []

    def count() -> None:
        written.append(sum(row["kind"] == "train" for row in read_rows(tmp_path / LOG_NAME)))

    loop.after_step = count
    loop.checkpointer.save_latest = lambda: None  # saving waits, and excludes its time
    monkeypatch.setattr(loop_module, "sum_over_ranks", lambda number, device: number)  # at the end of the run
    loop.run()
    assert written == [0, 0]  # the row of the first step is written after the second
    rows = [row for row in read_rows(tmp_path / LOG_NAME) if row["kind"] == "train"]
    assert [row["step"] for row in rows] == [1, 2]
    assert {"gpu_idle_share", "loss_scale", "loss"} <= rows[0].keys() and "energy_j" not in rows[0]


def test_what_reads_numbers_in_a_step_says_so(gpu: PaperGpu) -> None:
    """The exceptions: relevancies of SMS, skipped spikes, and Lion's decision about an fp16 step."""
    exceptions = [
        make_loop(gpu, ("vit", "sms")),
        make_loop(gpu, ("vit", "classification"), on_spike="skip"),
        make_loop(gpu, ("vit", "classification"), optim={"optimizer": "lion"}, precision="fp16"),
    ]
    for loop in exceptions:
        with pytest.raises(WaitsForGpuError):
            list(loop.steps(0, 1))


class Careless(Classification):
    """Does `todo` in a step."""

    todo: Any = None

    def loss(self, outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, report = super().loss(outputs)
        self.todo(loss)
        return loss, report


CARELESS = {
    "item": lambda loss: loss.item(),
    "float": float,
    "bool": lambda loss: bool(loss > 1),
    "tolist": lambda loss: loss.detach().tolist(),
    "cpu": lambda loss: loss.cpu(),
    "numpy": lambda loss: loss.detach().numpy(),
    "constant": lambda loss: loss + torch.tensor([1.0, 2.0], device=loss.device),
    "other device": lambda loss: loss + torch.ones(2),
    "indices": lambda loss: (loss[None] > 1).nonzero(),
}


def test_what_is_wrong_is_found(gpu: PaperGpu) -> None:
    settings = {"normalization": "openai", "num_classes": CLASSES}
    careless, found = Careless(ClassificationConfig(), AugmentConfig(), **settings), {}
    loop = make_loop(gpu, ("vit", "classification"), objective=careless)
    for name, careless.todo in CARELESS.items():
        try:
            list(loop.steps(0, 1))
        except RuntimeError as error:
            found[name] = error
    careless.todo = lambda loss: None
    assert len(list(loop.steps(0, 1))) == 1
    assert found.keys() == CARELESS.keys()
    assert re.search("two (different )?devices", str(found["other device"]))
    assert isinstance(found["cpu"], WaitsForGpuError) and isinstance(found["item"], WaitsForGpuError)
