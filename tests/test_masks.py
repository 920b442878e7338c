"""Tube masks: how many, the same in all time slots, and a function of (seed, step, clip) alone."""

import numpy as np
import pytest
import torch

from avion_dali.contracts import UserError
from avion_dali.device_ops.masks import tube_masks
from avion_dali.device_ops.step_key import StepKey

KEY = StepKey(seed=3, step=17)
CLIPS = np.array([5, 900, 2**40, 6], dtype=np.int64)


def masks(clip_ids: np.ndarray = CLIPS, key: StepKey = KEY, **changes: float) -> torch.Tensor:
    settings = {"time_slots": 8, "places": 196, "ratio": 0.9, **changes}
    return tube_masks(clip_ids, key=key, **settings)


def test_the_published_setting_hides_1408_of_1568_tokens():
    found = masks()
    assert found.shape == (4, 1568)
    assert found.dtype == torch.bool
    assert found.device.type == "cpu"
    assert found.sum(dim=1).tolist() == [1408] * 4  # int(0.9 * 196) = 176 places in 8 time slots


def test_all_time_slots_hide_the_same_places():
    slots_BTP = masks().view(4, 8, 196)
    assert (slots_BTP == slots_BTP[:, :1]).all()
    assert len({tuple(row) for row in slots_BTP[:, 0].tolist()}) == 4  # but each clip its own


@pytest.mark.parametrize(("ratio", "hidden"), [(0.5, 4), (0.75, 6), (0.9, 8), (0.12, 1), (0.99, 8)])
def test_the_number_hidden_is_rounded_down(ratio, hidden):
    assert masks(time_slots=1, places=9, ratio=ratio).sum(dim=1).tolist() == [hidden] * 4


def test_a_clip_has_its_mask_in_any_layout():
    whole = masks()
    assert torch.equal(torch.cat([masks(CLIPS[:1]), masks(CLIPS[1:])]), whole)
    order = [2, 0, 3, 1]
    assert torch.equal(masks(CLIPS[order]), whole[order])
    assert torch.equal(masks(), whole)


def test_every_step_and_seed_hides_others():
    for key in (StepKey(3, 18), StepKey(4, 17)):
        assert (masks(key=key) != masks()).any(dim=1).all()


def test_all_places_are_hidden_equally_often():
    clips = np.arange(4000)
    hidden_P = masks(clips, time_slots=1, places=16, ratio=0.75).double().mean(dim=0)
    assert abs(hidden_P - 0.75).max() < 5 * (0.75 * 0.25 / len(clips)) ** 0.5


@pytest.mark.parametrize(("places", "ratio"), [(9, 0.1), (4, 0.2), (1, 0.9)])
def test_hiding_nothing_is_refused(places, ratio):
    with pytest.raises(UserError, match="mask_ratio"):
        masks(places=places, ratio=ratio)
