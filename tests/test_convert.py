import json
import math
from pathlib import Path

import pytest
import torch

from avion_dali.contracts import UserError
from avion_dali.models.convert import remap_avion_keys, resize_temporal_embedding
from avion_dali.models.dual_encoder import DualEncoder
from avion_dali.models.text import TextTowerConfig, build_text_tower
from avion_dali.models.vit import VideoTower, VideoTowerConfig

GOLDEN = json.loads((Path(__file__).parent / "golden_clip_tiny.json").read_text())


def fill(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """The deterministic weights that the golden outputs were computed with."""
    weights = {}
    for key, shape in shapes.items():
        if key == "logit_scale":
            weights[key] = torch.tensor(math.log(1 / 0.07))
            continue
        base = 1.0 if len(shape) == 1 and key.endswith(".weight") else 0.0
        index = torch.arange(math.prod(shape), dtype=torch.float64)
        values = base + 0.05 * torch.sin(0.7 * index + sum(key.encode()) % 97)
        weights[key] = values.float().reshape(shape)
    return weights


def make_model() -> DualEncoder:
    visual = VideoTower(
        VideoTowerConfig(image_size=32, patch_size=8, num_frames=4, width=64, layers=2, heads=4, embed_dim=16)
    )
    text = TextTowerConfig(context_length=12, vocab_size=100, width=32, layers=2, heads=4, embed_dim=16)
    return DualEncoder(visual, build_text_tower(text)).eval()


@pytest.mark.parametrize("data_parallel", [False, True])
@pytest.mark.parametrize("style", ["clip_tiny_fast_flash", "clip_tiny_conv_mha"])
def test_golden_vectors_of_both_styles(style, data_parallel):
    golden = GOLDEN[style]
    weights = fill(golden["state_dict"])
    if data_parallel:
        weights = {f"module.{key}": weight for key, weight in weights.items()}
    model = make_model()
    model.load_state_dict(remap_avion_keys(weights), strict=True)
    frames = torch.sin(0.013 * torch.arange(2 * 3 * 4 * 32 * 32, dtype=torch.float64)).float()
    frames = frames.reshape(2, 3, 4, 32, 32)
    tokens = torch.zeros(2, 12, dtype=torch.int64)
    tokens[0, :5] = torch.tensor([98, 5, 7, 9, 99])
    tokens[1, :8] = torch.tensor([98, 11, 3, 4, 5, 6, 7, 99])
    with torch.no_grad():
        video, text, scale = model(frames, tokens)
        raw_video, raw_text = model.visual(frames), model.textual(tokens)
    for ours, name in (
        (raw_video, "encode_image"),
        (raw_text, "encode_text"),
        (video, "norm_image"),
        (text, "norm_text"),
    ):
        expected = torch.tensor(golden[name]).reshape(2, 16)
        assert (ours - expected).abs().max() < 1e-4, name
    assert float(scale[0]) == pytest.approx(golden["logit_scale"], rel=1e-6)


def test_remap_leaves_our_own_names_alone_and_shares_memory():
    weights = make_model().state_dict()
    remapped = remap_avion_keys(weights)
    assert list(remapped) == list(weights)
    assert all(remapped[key].data_ptr() == weights[key].data_ptr() for key in weights)


def test_remap_reads_a_bare_video_tower():
    remapped = remap_avion_keys({"conv1.weight": torch.arange(2.0 * 12).reshape(2, 12)})
    assert remapped["conv1.weight"].shape == (2, 3, 2, 2)
    assert torch.equal(remapped["conv1.weight"][0, 1].flatten(), torch.arange(4.0, 8.0))


def test_remap_refuses_mixed_styles_and_odd_patches():
    block = "visual.transformer.resblocks.0.mlp."
    with pytest.raises(UserError, match="mixes two styles"):
        remap_avion_keys({f"{block}fc1.bias": torch.zeros(1), f"{block}c_fc.bias": torch.zeros(1)})
    with pytest.raises(UserError, match="square RGB patches"):
        remap_avion_keys({"visual.conv1.weight": torch.zeros(4, 3 * 6)})


def test_growing_frame_positions_interpolates_between_centres():
    grown = resize_temporal_embedding(torch.arange(4.0)[:, None].expand(4, 2), 16)
    row = [0, 0, 0.125, 0.375, 0.625, 0.875, 1.125, 1.375, 1.625, 1.875, 2.125, 2.375, 2.625, 2.875, 3, 3]
    assert torch.allclose(grown, torch.tensor(row)[:, None].expand(16, 2), atol=1e-6)


def test_shrinking_frame_positions_keeps_the_span_or_cuts():
    rows = torch.arange(16.0)[:, None]
    assert resize_temporal_embedding(rows, 4).flatten().tolist() == [1.5, 5.5, 9.5, 13.5]
    assert resize_temporal_embedding(rows, 4, shrink="truncate").flatten().tolist() == [0, 1, 2, 3]
    assert resize_temporal_embedding(rows, 16) is rows
    assert resize_temporal_embedding(rows.half(), 8).dtype == torch.float16


@pytest.mark.parametrize(("shape", "frames"), [((4,), 2), ((4, 2), 0)])
def test_unusable_frame_positions_are_refused(shape, frames):
    with pytest.raises(ValueError, match="cannot fit"):
        resize_temporal_embedding(torch.zeros(shape), frames)
