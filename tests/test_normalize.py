import numpy as np
import pytest
import torch

from avion_dali.device_ops.normalize import PIXEL_STATISTICS, normalize_frames

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
def frames() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 5, 7, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("normalization", PIXEL_STATISTICS)
def test_each_channel_is_centred_and_scaled(frames, normalization):
    mean, std = (np.array(values) for values in PIXEL_STATISTICS[normalization])
    expected = ((frames.numpy().astype(np.float64) - mean) / std).transpose(0, 4, 1, 2, 3)
    result = normalize_frames(frames, normalization)
    assert result.dtype == torch.float32 and result.shape == (2, 3, 3, 5, 7)
    assert np.abs(result.numpy() - expected).max() < 2e-6


def test_constants():
    openai = PIXEL_STATISTICS["openai"]
    assert openai.mean == pytest.approx([255 * value for value in CLIP_MEAN], rel=1e-6)
    assert openai.std == pytest.approx([255 * value for value in CLIP_STD], rel=1e-6)
    avion = PIXEL_STATISTICS["openai-avion"]
    assert avion.mean[0] == pytest.approx(108.3272985, abs=1e-9)
    assert avion.mean[1:] == openai.mean[1:] and avion.std == openai.std
    assert PIXEL_STATISTICS["imagenet"].mean == pytest.approx([255 * v for v in (0.485, 0.456, 0.406)])
    assert PIXEL_STATISTICS["imagenet"].std == pytest.approx([255 * v for v in (0.229, 0.224, 0.225)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_rounded_float32_result(frames, dtype):
    assert torch.equal(
        normalize_frames(frames, "openai", dtype=dtype), normalize_frames(frames, "openai").to(dtype)
    )


def test_result_lies_channel_last_and_the_input_stays(frames):
    before = frames.clone()
    assert normalize_frames(frames, "openai").permute(0, 2, 3, 4, 1).is_contiguous()
    assert torch.equal(frames, before)


def test_views_that_are_not_contiguous_work(frames):
    flipped = frames.transpose(2, 3)
    expected = normalize_frames(flipped.contiguous(), "imagenet")
    assert torch.equal(normalize_frames(flipped, "imagenet"), expected)


@pytest.mark.parametrize(
    "bad",
    [
        torch.zeros(1, 2, 4, 4, 3),
        torch.zeros(1, 3, 2, 4, 4, dtype=torch.uint8),
        torch.zeros(4, dtype=torch.uint8),
    ],
)
def test_anything_but_uint8_rgb_is_refused(bad):
    with pytest.raises(ValueError, match="uint8"):
        normalize_frames(bad, "openai")
