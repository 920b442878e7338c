"""Mixup and CutMix: the label's share is the pixels' share, in every frame."""

import numpy as np
import pytest
import torch

from avion_dali.config import ClassificationConfig
from avion_dali.device_ops import mixing
from avion_dali.device_ops.mixing import mix_clips, smooth_targets
from avion_dali.device_ops.step_key import StepKey

CUTMIX = ClassificationConfig(cutmix=1.0)
MIXUP = ClassificationConfig(mixup=0.8)
BOTH = ClassificationConfig(mixup=0.8, cutmix=1.0, label_smoothing=0.1)
KEY = StepKey(seed=0, step=5)


def constant_clips(values: list[float], size: tuple[int, int, int] = (2, 12, 16)) -> torch.Tensor:
    """Clips (B, 3, T, H, W) that show one value each."""
    return torch.tensor(values).view(-1, 1, 1, 1, 1).expand(-1, 3, *size).contiguous()


class FixedGenerator:
    """Stands in for the step's generator: mixes, by Mixup, with a weight of 0.7."""

    def random(self) -> float:
        return 0.9

    def beta(self, _a: float, _b: float) -> float:
        return 0.7


def test_published_targets(monkeypatch):
    monkeypatch.setattr(mixing, "step_generator", lambda *_: FixedGenerator())
    frames = constant_clips([1.0, 2.0])
    mixed, targets = mix_clips(frames, torch.tensor([0, 2]), num_classes=4, config=BOTH, key=KEY)
    expected = torch.tensor([[0.655, 0.025, 0.295, 0.025], [0.295, 0.025, 0.655, 0.025]])
    torch.testing.assert_close(targets, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(mixed, constant_clips([1.3, 1.7]))


def test_labels_weigh_as_much_as_pixels_in_2000_draws():
    """Clip 0 shows 1 and clip 1 shows 0: the mean of a mixed clip is its share of clip 0."""
    frames, labels = constant_clips([1.0, 0.0], (2, 48, 64)), torch.tensor([0, 1])
    shares = []
    for step in range(2000):
        mixed, targets = mix_clips(frames, labels, num_classes=2, config=CUTMIX, key=StepKey(0, step))
        assert (mixed == mixed[:, :1, :1]).all()  # the same box in all frames and channels
        share = mixed[0, 0, 0].double().mean()
        assert abs(share - targets[0, 0]) < 1e-6
        assert abs(1 - mixed[1, 0, 0].double().mean() - targets[1, 1]) < 1e-6
        shares.append(float(share))
    # The weights really vary: boxes of every size, and few that replace nothing.
    assert np.mean(np.array(shares) == 1) < 0.05
    assert min(shares) < 0.2
    # A side of s frames, s^2 uniform, about a uniform centre leaves s - s^2 / 4 of it inside.
    assert np.mean(shares) == pytest.approx(1 - 77 / 240, abs=0.03)


def test_what_is_pasted_is_a_box_of_the_partner():
    frames = torch.randn(4, 3, 2, 12, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(4)
    for step in range(20):
        mixed, targets = mix_clips(frames, labels, num_classes=4, config=CUTMIX, key=StepKey(9, step))
        pasted_BHW = (mixed != frames).all(dim=2).all(dim=1)
        assert (pasted_BHW == pasted_BHW[:1]).all()
        rows, columns = pasted_BHW[0].any(dim=1), pasted_BHW[0].any(dim=0)
        assert torch.equal(pasted_BHW[0], rows[:, None] & columns)
        assert torch.equal(mixed[..., pasted_BHW[0]], frames.flip(0)[..., pasted_BHW[0]])
        assert torch.equal(mixed[..., ~pasted_BHW[0]], frames[..., ~pasted_BHW[0]])
        assert targets[1, 2] == pytest.approx(float(pasted_BHW.float().mean()), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixup_averages_with_the_reversed_batch(dtype):
    frames = torch.randn(5, 3, 2, 4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels = torch.tensor([4, 3, 2, 1, 0])
    mixed, targets = mix_clips(frames, labels, num_classes=5, config=MIXUP, key=KEY)
    share = float(targets[0, 4])
    assert 0 < share < 1
    expected = share * frames.float() + (1 - share) * frames.float().flip(0)
    assert mixed.dtype == dtype
    torch.testing.assert_close(mixed.float(), expected, atol=1e-5 if dtype == torch.float32 else 0.03, rtol=0)
    assert targets[2].tolist() == pytest.approx([0, 0, 1, 0, 0], abs=1e-6)  # the middle is its own partner


def test_every_micro_batch_of_a_step_has_the_same_weight():
    first, second = (constant_clips([a, b]) for a, b in ((1.0, 0.0), (3.0, 5.0)))
    labels = torch.tensor([0, 1])
    for step in range(10):
        key = StepKey(2, step)
        found = [mix_clips(f, labels, num_classes=2, config=BOTH, key=key)[1] for f in (first, second)]
        assert torch.equal(*found)


def test_chances_are_kept():
    frames, labels = constant_clips([1.0, 0.0], (1, 8, 8)), torch.tensor([0, 1])
    config = ClassificationConfig(mixup=0.8, cutmix=1.0, mix_probability=0.6, switch_probability=0.25)
    kinds = []
    for step in range(1500):
        mixed, _ = mix_clips(frames, labels, num_classes=2, config=config, key=StepKey(0, step))
        if mixed is frames:
            kinds.append("none")
        else:
            kinds.append("cutmix" if set(mixed.unique().tolist()) <= {0.0, 1.0} else "mixup")
    assert abs(kinds.count("none") / 1500 - 0.4) < 0.06
    assert abs(kinds.count("cutmix") / 1500 - 0.15) < 0.05


@pytest.mark.parametrize("config", [ClassificationConfig(label_smoothing=0.1), ClassificationConfig()])
def test_without_mixing_only_targets_are_smoothed(config):
    frames = constant_clips([1.0, 2.0, 3.0])
    mixed, targets = mix_clips(frames, torch.tensor([1, 0, 3]), num_classes=4, config=config, key=KEY)
    assert mixed is frames
    assert targets.dtype == torch.float32
    off = config.label_smoothing / 4
    assert targets[0].tolist() == pytest.approx([off, 1 - config.label_smoothing + off, off, off])


def test_smoothed_targets_are_those_of_torch():
    labels, logits = torch.tensor([2, 0, 1]), torch.randn(3, 5)
    targets = smooth_targets(labels, num_classes=5, smoothing=0.2)
    ours = torch.nn.functional.cross_entropy(logits, targets)
    theirs = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.2)
    torch.testing.assert_close(ours, theirs)


def test_clips_and_labels_must_fit():
    with pytest.raises(ValueError, match="expected one label per clip"):
        mix_clips(constant_clips([0.0, 1.0]), torch.tensor([1]), num_classes=2, config=BOTH, key=KEY)
