"""RandAugment and colour jitter against timm's operations on pictures, and the clip as their unit."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from avion_dali.config import AugmentConfig
from avion_dali.device_ops import augment
from avion_dali.device_ops.augment import OPERATIONS, augment_frames
from avion_dali.device_ops.step_key import StepKey

timm_ops = pytest.importorskip("timm.data.auto_augment")

KEY = StepKey(seed=4, step=11)
RAND = AugmentConfig(rand_augment_ops=4)
JITTER = AugmentConfig(color_jitter=0.3)
FULL = AugmentConfig(color_jitter=0.3, rand_augment_ops=4)
# Our names and timm's. Bicubic and bilinear pictures are compared where both were told to be bilinear.
TIMM_NAMES = {
    "auto-contrast": "AutoContrast",
    "equalize": "Equalize",
    "invert": "Invert",
    "rotate": "Rotate",
    "posterize": "PosterizeIncreasing",
    "solarize": "SolarizeIncreasing",
    "saturation": "ColorIncreasing",
    "contrast": "ContrastIncreasing",
    "brightness": "BrightnessIncreasing",
    "sharpness": "SharpnessIncreasing",
    "shear-x": "ShearX",
    "shear-y": "ShearY",
    "shift-x": "TranslateXRel",
    "shift-y": "TranslateYRel",
}


GEOMETRIC = ("rotate", "shear-x", "shear-y", "shift-x", "shift-y")


def smooth_clip(frames: int = 2, side: int = 48) -> torch.Tensor:
    """A clip (T, H, W, 3) of soft colour waves, different in each frame."""
    y, x = np.mgrid[:side, :side] / side
    waves = [
        [127 + 90 * np.sin(5 * x * (c + 1) + 3 * y + t) * np.cos(4 * y - c) for c in range(3)]
        for t in range(frames)
    ]
    return torch.from_numpy(np.array(waves).transpose(0, 2, 3, 1).round().astype(np.uint8))


def noisy_clip(frames: int = 2, side: int = 24) -> torch.Tensor:
    """A clip (T, H, W, 3) of noise around a colour, so that statistics and edges matter."""
    noise = np.random.default_rng(0).normal((90, 120, 160), 35, (frames, side, side, 3))
    return torch.from_numpy(noise.clip(0, 255).astype(np.uint8))


def batch(clips: int = 6) -> torch.Tensor:
    shape = (clips, 2, 16, 16, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def by_timm(name: str, frame: np.ndarray, strength: float, sign: float, monkeypatch) -> np.ndarray:
    """One frame through timm's operation at a level, the sign forced."""
    monkeypatch.setattr(timm_ops.random, "random", lambda: 0.9 if sign < 0 else 0.1)
    level_to_arg = timm_ops.LEVEL_TO_ARG[name]
    arguments = level_to_arg(10 * strength, {"translate_pct": 0.45}) if level_to_arg else ()
    options = {"fillcolor": (124, 116, 104), "resample": Image.BILINEAR}
    return np.asarray(timm_ops.NAME_TO_OP[name](Image.fromarray(frame), *arguments, **options))


def test_the_operations_are_timms_but_one():
    theirs = set(timm_ops._RAND_INCREASING_TRANSFORMS)
    assert set(OPERATIONS) == set(TIMM_NAMES)
    assert set(TIMM_NAMES.values()) == theirs - {"SolarizeAdd"}


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("strength", [0.3, 0.7, 0.9])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_do_to_a_frame_what_timm_does(name, strength, sign, monkeypatch):
    clip_THWC = smooth_clip() if name in GEOMETRIC else noisy_clip()
    ours = OPERATIONS[name](clip_THWC.permute(0, 3, 1, 2), strength, sign).permute(0, 2, 3, 1).numpy()
    # Signs are drawn evenly, so it does not matter which direction is called positive.
    distances = []
    for timm_sign in (1.0, -1.0):
        theirs = [
            by_timm(TIMM_NAMES[name], frame, strength, timm_sign, monkeypatch) for frame in clip_THWC.numpy()
        ]
        distances.append(np.abs(ours.astype(int) - np.stack(theirs)))
    # Torchvision blends uncovered borders with the picture, PIL cuts: there they differ, within they do not.
    assert min(np.quantile(distance, 0.75) for distance in distances) <= 1
    assert name in GEOMETRIC or min(distance.max() for distance in distances) <= 2


@pytest.mark.parametrize("name", [n for n in OPERATIONS if n not in ("auto-contrast", "equalize", "invert")])
def test_strength_zero_changes_nothing_or_little(name):
    frames_TCHW = smooth_clip().permute(0, 3, 1, 2)
    changed = OPERATIONS[name](frames_TCHW, 0.0, 1.0)
    assert changed.dtype == torch.uint8
    if name == "posterize":
        assert set((changed % 16).unique().tolist()) == {0}  # the four upper bits, as in timm
    else:
        assert (changed.int() - frames_TCHW.int()).abs().max() <= 1


def test_posterising_leaves_a_bit_where_timm_leaves_none():
    changed = OPERATIONS["posterize"](noisy_clip().permute(0, 3, 1, 2), 1.0, 1.0)
    assert set(changed.unique().tolist()) == {0, 128}


def test_directions_are_opposite():
    frames_TCHW = smooth_clip().permute(0, 3, 1, 2)
    for name in ("rotate", "shear-x", "shear-y", "shift-x", "shift-y", "brightness", "saturation"):
        assert not torch.equal(
            OPERATIONS[name](frames_TCHW, 0.5, 1.0), OPERATIONS[name](frames_TCHW, 0.5, -1.0)
        )


@pytest.mark.parametrize("config", [RAND, JITTER, FULL])
def test_a_clip_is_augmented_alike_in_any_batch(config):
    frames, ids = batch(), np.array([3, 1, 4, 15, 92, 65])
    before = frames.clone()
    whole = augment_frames(frames, config, KEY, ids)
    assert whole.shape == frames.shape
    assert whole.dtype == torch.uint8
    assert torch.equal(frames, before)
    assert not torch.equal(whole, frames)
    parts = [augment_frames(frames[rows], config, KEY, ids[rows]) for rows in (slice(0, 2), slice(2, 6))]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(augment_frames(frames, config, StepKey(4, 12), ids), whole)
    same_clips = augment_frames(frames[:1].expand(6, -1, -1, -1, -1), config, KEY, ids)
    assert len({clip.numpy().tobytes() for clip in same_clips}) > 3


def test_all_frames_of_a_clip_get_the_same():
    still = smooth_clip(frames=1).expand(30, 4, -1, -1, -1)
    augmented = augment_frames(still, FULL, KEY, np.arange(30))
    assert (augmented == augmented[:, :1]).all()


def test_nothing_to_do_returns_the_same_tensor():
    frames = batch()
    assert augment_frames(frames, AugmentConfig(erasing_probability=0.5), KEY, np.arange(6)) is frames


def test_jitter_factors_are_uniform_and_in_any_order(monkeypatch):
    factors: dict[str, list[float]] = {"brightness": [], "contrast": [], "saturation": []}
    orders = Counter()
    done: list[str] = []

    def record(name):
        def adjust(frames, factor):
            factors[name].append(factor)
            done.append(name)
            return frames

        return adjust

    for name in factors:
        monkeypatch.setattr(augment.functional, f"adjust_{name}", record(name))
    for step in range(900):
        done.clear()
        augment_frames(batch(1), JITTER, StepKey(0, step), np.array([0]))
        orders[tuple(done)] += 1
    assert len(orders) == 6
    assert min(orders.values()) > 100
    for drawn in factors.values():
        assert 0.7 <= min(drawn) < 0.71
        assert 1.29 < max(drawn) <= 1.3
        assert abs(np.mean(drawn) - 1) < 0.03


def test_operations_are_drawn_evenly_half_of_them_done_at_magnitudes_around_seven(monkeypatch):
    done: list[tuple[str, float, float]] = []

    def recording(name):
        def operation(frames, strength, sign):
            done.append((name, strength, sign))
            return frames

        return operation

    monkeypatch.setattr(augment, "OPERATIONS", {name: recording(name) for name in OPERATIONS})
    clips = 2000
    augment_frames(torch.zeros(clips, 1, 1, 1, 3, dtype=torch.uint8), RAND, KEY, np.arange(clips))
    names, strengths, signs = zip(*done, strict=True)
    assert abs(len(done) / (4 * clips) - 0.5) < 0.03
    counts = Counter(names)
    assert set(counts) == set(OPERATIONS)
    assert max(counts.values()) < 1.35 * min(counts.values())
    assert np.mean(strengths) == pytest.approx(0.7, abs=0.005)
    assert np.std(strengths) == pytest.approx(0.05, abs=0.004)
    assert np.mean(signs) == pytest.approx(0, abs=0.08)
    assert set(signs) == {1.0, -1.0}


def test_global_random_numbers_are_not_touched():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    augment_frames(batch(), FULL, KEY, np.arange(6))
    assert torch.equal(torch.rand(3), expected)


def test_an_id_a_clip_is_needed():
    with pytest.raises(ValueError, match="expected one id per clip"):
        augment_frames(batch(), FULL, KEY, np.arange(5))
