"""What only a CUDA device can show; see the `gpu` mark in pyproject.toml."""

from pathlib import Path

import numpy as np
import pytest
import torch

from avion_dali.config import ModelConfig
from avion_dali.contracts import ClipBatch
from avion_dali.engine.precision import autocast, resolve_precision
from avion_dali.loading.ring import SharedRing
from avion_dali.loading.transfer import DeviceCopier
from avion_dali.models.dual_encoder import build_dual_encoder
from avion_dali.objectives.contrastive import Contrastive

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def test_copies_from_the_ring_are_whole_and_slots_can_be_reused() -> None:
    ring = SharedRing(2, (4, 1, 2, 64, 64, 3))
    copier = DeviceCopier(ring, CUDA)
    kept = []
    for turn in range(20):
        slot = turn % 2
        copier.wait_until_free(slot)
        ring.frames(slot)[:] = turn
        kept.append(copier.copy(slot, 4))
    for turn, frames in enumerate(kept):
        assert frames.device.type == "cuda"
        assert (frames == turn).all()
    copier.close()
    ring.close()


def test_a_step_on_the_gpu_agrees_with_the_cpu(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_dual_encoder(ModelConfig(size="tiny", context_length=8), num_frames=2, frame_size=32)
    frames = torch.randint(0, 256, (6, 2, 32, 32, 3), dtype=torch.uint8)
    tokens = torch.randint(1, 49_000, (6, 8))
    tokens[:, -1] = 49_407
    rows = np.arange(6)

    def loss_on(device: torch.device, precision: str) -> float:
        batch = ClipBatch(frames.to(device), tokens.to(device), None, rows, 0 * rows, rows >= 0)
        objective = Contrastive("openai")
        with autocast(precision, device):
            return float(objective.loss(objective.outputs(model.to(device), batch))[0])

    exact = loss_on(torch.device("cpu"), "fp32")
    assert loss_on(CUDA, "fp32") == pytest.approx(exact, rel=1e-3)
    assert loss_on(CUDA, resolve_precision("auto", CUDA)) == pytest.approx(exact, rel=5e-2)
