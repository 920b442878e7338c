"""Random erasing: the box's size, its noise, and that nothing else changes."""

import numpy as np
import pytest
import torch

from avion_dali.device_ops.erasing import erase_boxes
from avion_dali.device_ops.step_key import StepKey

KEY = StepKey(seed=1, step=2)
SIDE = 64


def zeros(clips: int, frames: int = 2, height: int = SIDE, width: int = SIDE) -> torch.Tensor:
    return torch.zeros(clips, 3, frames, height, width)


def boxes(erased_BCTHW: torch.Tensor) -> list[tuple[int, int, int, int]]:
    """Top, left, height and width of what is not zero in each clip that has such."""
    found = []
    for changed_HW in (erased_BCTHW != 0).any(dim=2).any(dim=1):
        rows, columns = torch.where(changed_HW)
        if len(rows):
            top, left = int(rows.min()), int(columns.min())
            found.append((top, left, int(rows.max()) - top + 1, int(columns.max()) - left + 1))
    return found


def test_a_full_box_through_all_frames_and_channels():
    erased = erase_boxes(zeros(20, frames=3), 1.0, key=KEY, clip_ids=np.arange(20))
    for clip, (top, left, height, width) in zip(erased, boxes(erased), strict=True):
        assert (clip[:, :, top : top + height, left : left + width] != 0).all()
        assert int((clip != 0).sum()) == 3 * 3 * height * width


def test_sizes_are_the_published_ones():
    found = boxes(erase_boxes(zeros(1500, frames=1), 1.0, key=KEY, clip_ids=np.arange(1500)))
    areas = np.array([height * width / SIDE**2 for _, _, height, width in found])
    aspects = np.array([height / width for _, _, height, width in found])
    assert len(found) == 1500
    assert 0.015 < areas.min() < 0.03  # rounding to whole pixels moves the ends
    assert 0.32 < areas.max() < 0.345
    # Uniform but for tall and wide boxes that do not fit and are drawn again.
    assert abs(areas.mean() - 0.1767) < 0.01
    assert 0.25 < aspects.min() < 0.34
    assert 3.0 < aspects.max() < 4.0
    assert abs(np.log(aspects).mean()) < 0.1
    tops = np.array([top / (SIDE - height) for top, _, height, _ in found])
    lefts = np.array([left / (SIDE - width) for _, left, _, width in found])
    for starts in (tops, lefts):
        assert starts.min() == 0
        assert starts.max() == 1
        assert abs(starts.mean() - 0.5) < 0.05


def test_the_chance_is_kept():
    count = len(
        boxes(erase_boxes(zeros(2000, frames=1, height=16, width=16), 0.25, key=KEY, clip_ids=np.arange(2000)))
    )
    assert abs(count / 2000 - 0.25) < 5 * (0.25 * 0.75 / 2000) ** 0.5


def test_noise_is_normal_and_of_each_pixel_its_own():
    clip = erase_boxes(zeros(1, frames=64), 1.0, key=KEY, clip_ids=np.array([3]))[0]
    noise = clip[clip != 0].double()
    assert len(noise) > 10_000
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05
    assert len(noise.unique()) > 0.99 * len(noise)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_clip_is_erased_alike_in_any_batch(dtype):
    frames = torch.randn(6, 3, 2, 24, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    ids = np.array([4, 8, 15, 16, 23, 42])
    before = frames.clone()
    whole = erase_boxes(frames, 0.7, key=KEY, clip_ids=ids)
    assert whole.dtype == dtype
    assert torch.equal(frames, before)
    assert 0 < int((whole != frames).flatten(1).any(dim=1).sum()) < 6
    parts = [erase_boxes(frames[rows], 0.7, key=KEY, clip_ids=ids[rows]) for rows in (slice(0, 1), slice(1, 6))]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(erase_boxes(frames, 0.7, key=StepKey(1, 3), clip_ids=ids), whole)


def test_nothing_to_do_returns_the_same_tensor():
    frames = zeros(3)
    assert erase_boxes(frames, 0.0, key=KEY, clip_ids=np.arange(3)) is frames


def test_global_random_numbers_are_not_touched():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    erase_boxes(zeros(4), 1.0, key=KEY, clip_ids=np.arange(4))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("bad", [zeros(2).byte(), zeros(3)])
def test_bytes_and_missing_ids_are_refused(bad):
    with pytest.raises(ValueError, match="floating-point frames and one id per clip"):
        erase_boxes(bad, 0.5, key=KEY, clip_ids=np.arange(2))
