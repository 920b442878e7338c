"""Masked video: which tubes are compared, with what, and that masks belong to clips."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from avion_dali.config import MaskedVideoConfig, ModelConfig
from avion_dali.contracts import ClipBatch
from avion_dali.device_ops.masks import tube_masks
from avion_dali.device_ops.step_key import StepKey
from avion_dali.models.masked_video import build_masked_video, tube_targets
from avion_dali.objectives.masked_reconstruction import MaskedReconstruction

KEY = StepKey(seed=2, step=9)
TUBES = {"time_slots": 2, "places": 4}  # clips of 4 frames, 32 pixels, patches of 16


def make_batch(samples: list[int], views: int = 1) -> ClipBatch:
    frames = [
        torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(s))
        for s in samples
        for _ in range(views)
    ]
    return ClipBatch(
        frames_BTHWC=torch.stack(frames),
        tokens_BL=None,
        labels_B=None,
        sample_ids=np.array(samples),
        view_ids=np.tile(np.arange(views), len(samples)),
        valid=np.ones(len(samples), dtype=bool),
    )


class Zeros(nn.Module):
    """Predicts zeros for the hidden tubes and keeps the masks."""

    def forward(self, frames_BCTHW: torch.Tensor, is_masked_BN: torch.Tensor) -> torch.Tensor:
        self.is_masked_BN = is_masked_BN
        return torch.zeros(len(frames_BCTHW), int(is_masked_BN[0].sum()), 3 * 2 * 16 * 16)


def make_objective(**config: object) -> MaskedReconstruction:
    return MaskedReconstruction(MaskedVideoConfig(mask_ratio=0.5, **config), normalization="imagenet", **TUBES)


def test_error_of_zeros_is_the_mean_square_of_the_hidden_pixels():
    batch, model = make_batch([3]), Zeros()
    (errors,) = make_objective(normalize_target=False).outputs(model, batch, KEY)
    total = count = 0.0
    for token in np.flatnonzero(model.is_masked_BN[0].numpy()):
        slot, place = divmod(int(token), 4)
        y, x = 16 * (place // 2), 16 * (place % 2)
        pixels = batch.frames_BTHWC[0, 2 * slot : 2 * slot + 2, y : y + 16, x : x + 16].double()
        total, count = total + float((pixels**2).sum()), count + pixels.numel()
    assert count == 4 * 2 * 16 * 16 * 3, "half of the eight tubes are hidden"
    assert float(errors[0]) == pytest.approx(total / count, rel=1e-5)


def test_normalised_targets_have_unit_variance():
    (errors,) = make_objective().outputs(Zeros(), make_batch([1, 2]), KEY)
    # Unbiased deviation over the 512 pixels of a tube and channel: the mean square is 511 / 512.
    assert errors.tolist() == pytest.approx([511 / 512] * 2, abs=1e-4)


def test_perfect_predictions_cost_nothing():
    batch, objective = make_batch([5, 6]), make_objective()
    masks = tube_masks(np.array([5, 6]), **TUBES, ratio=0.5, key=KEY)

    class Oracle(nn.Module):
        def forward(self, frames_BCTHW, is_masked_BN):
            assert torch.equal(is_masked_BN, masks)
            return tube_targets(batch.frames_BTHWC, is_masked_BN, normalize=True)

    loss, report = objective.loss(objective.outputs(Oracle(), batch, KEY))
    assert float(loss) == 0 and report == {}


def test_masks_belong_to_clips_views_and_steps():
    model, objective = Zeros(), make_objective()
    objective.outputs(model, make_batch([11, 4, 7]), KEY)
    together = model.is_masked_BN
    objective.outputs(model, make_batch([7]), KEY)
    assert torch.equal(model.is_masked_BN[0], together[2])
    seen = set()
    for step in range(8):
        objective.outputs(model, make_batch([7]), KEY._replace(step=step))
        seen.add(tuple(model.is_masked_BN[0].tolist()))
    assert len(seen) > 1
    masks = []
    for sample in range(8):
        objective.outputs(model, make_batch([sample], views=2), KEY)
        masks.append(model.is_masked_BN)
    assert any(not torch.equal(*pair) for pair in masks), "views get masks of their own"


def test_the_real_model_fits_the_objective():
    config = ModelConfig(encoder="videomae", size="tiny")
    torch.manual_seed(0)
    model = build_masked_video(config, num_frames=4, frame_size=32, decoder_depth=1)
    assert (model.time_slots, model.places) == (TUBES["time_slots"], TUBES["places"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (errors,) = make_objective().outputs(model, make_batch([0, 1], views=2), KEY)
    assert errors.shape == (4,) and errors.dtype == torch.float32
    assert errors.min() > 0.5
