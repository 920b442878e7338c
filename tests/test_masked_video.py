import dataclasses
import math

import pytest
import torch
from golden_fill import TOWERS, close, fill_model, videomae_flash_name, wave

from avion_dali.config import ModelConfig
from avion_dali.contracts import UserError
from avion_dali.models.blocks import VideoTowerConfig
from avion_dali.models.masked_video import MaskedVideo, build_masked_video, split_tubes, tube_targets
from avion_dali.models.positions import sincos_positions

SMALL = VideoTowerConfig(image_size=16, patch_size=4, num_frames=4, width=32, layers=2, heads=4, embed_dim=None)
GOLDEN = TOWERS["videomae_pretrain_tiny"]


def make_model(**changes: object) -> MaskedVideo:
    torch.manual_seed(0)
    return MaskedVideo(dataclasses.replace(SMALL, **changes), decoder_depth=2)


def make_inputs(clips: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips, and masks that hide other tubes in each: 2 time slots of 16 places, 12 places hidden."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.rand(clips, 16, generator=generator).argsort(dim=1) < 12
    return torch.randn(clips, 3, 4, 16, 16, generator=generator), hidden.repeat(1, 2)


def test_golden_vectors():
    config = VideoTowerConfig(32, 16, 16, 48, 2, 4, None)
    model = fill_model(MaskedVideo(config, decoder_depth=1), videomae_flash_name)
    frames = wave(1, 3, 16, 32, 32)
    masks = torch.tensor([[True, False, True, True]]).repeat(1, 8)
    predicted = model(frames, masks).detach()
    assert list(predicted.shape) == GOLDEN["out_shape"]
    assert close(predicted.flatten()[:8], GOLDEN["out_first8"])
    assert close(predicted.flatten()[-8:], GOLDEN["out_last8"])
    assert float(predicted.mean()) == pytest.approx(GOLDEN["out_mean"], abs=1e-6)
    assert float(predicted.std()) == pytest.approx(GOLDEN["out_std"], rel=1e-5)
    targets = tube_targets(255 * frames.permute(0, 2, 3, 4, 1), masks, normalize=True)
    assert close(targets.flatten()[:8], GOLDEN["target_first8"])
    assert close(targets.flatten()[-4:], GOLDEN["target_last4"])
    error = float((predicted - targets).square().mean())
    assert error == pytest.approx(GOLDEN["mse_vs_output"], abs=1e-5)


def written_targets(frames: torch.Tensor, masks: torch.Tensor, *, normalize: bool) -> list[torch.Tensor]:
    """Tube by tube, as the paper says it; tubes of 2 x 4 x 4."""
    targets = []
    for clip, mask in zip(frames, masks, strict=True):
        for token in mask.nonzero().flatten().tolist():
            slot, row, column = token // 16, token % 16 // 4, token % 4
            tube = clip[2 * slot : 2 * slot + 2, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].double()
            if normalize:
                pixels = tube.reshape(32, 3)
                deviation = pixels.sub(pixels.mean(0)).square().sum(0).div(31).sqrt()
                tube = (tube - pixels.mean(0)) / (deviation + 1e-6)
            targets.append(tube.flatten())
    return targets


@pytest.mark.parametrize("normalize", [True, False])
def test_targets_are_the_hidden_tubes(normalize):
    _, masks = make_inputs()
    frames = torch.randint(0, 256, (3, 4, 16, 16, 3), generator=torch.Generator().manual_seed(1)).byte()
    targets = tube_targets(frames, masks, normalize=normalize)
    assert targets.shape == (3, 24, 96) and targets.dtype == torch.float32
    expected = torch.stack(written_targets(frames, masks, normalize=normalize)).float()
    assert torch.allclose(targets.flatten(0, 1), expected, atol=1e-4)


def test_a_flat_tube_has_a_finite_target():
    _, masks = make_inputs()
    assert (tube_targets(torch.full((3, 4, 16, 16, 3), 77).byte(), masks, normalize=True) == 0).all()


def test_predictions_do_not_see_hidden_pixels():
    model, (frames, masks) = make_model(), make_inputs()
    before = model(frames, masks)
    assert before.shape == (3, 24, 96)
    noise = torch.randn_like(frames)
    per_pixel = (
        masks.reshape(3, 2, 4, 4).repeat_interleave(2, 1).repeat_interleave(4, 2).repeat_interleave(4, 3)
    )
    assert torch.allclose(model(torch.where(per_pixel[:, None], noise, frames), masks), before, atol=1e-6)
    assert not torch.allclose(model(torch.where(per_pixel[:, None], frames, noise), masks), before, atol=1e-3)


def test_predictions_come_in_token_order():
    """With the decoder's blocks off, a prediction depends on its tube's position alone."""
    model, (frames, masks) = make_model(), make_inputs()
    model.decoder.blocks = torch.nn.ModuleList()
    predicted = model(frames, masks)
    positions = sincos_positions(32, 16)
    for clip in range(3):
        hidden = positions[masks[clip].nonzero().flatten()]
        expected = model.decoder.head(model.decoder.norm(model.mask_token[0] + hidden))
        assert torch.allclose(predicted[clip], expected, atol=1e-6)


def test_seen_tubes_are_embedded_with_their_own_positions():
    model, (frames, masks) = make_model(), make_inputs()
    caught = []
    model.encoder.blocks[0].register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    model(frames, masks)
    whole = model.encoder.patch_embed(frames) + sincos_positions(32, 32)
    expected = torch.stack([tokens[~mask] for tokens, mask in zip(whole, masks, strict=True)])
    assert torch.allclose(caught[0], expected, atol=1e-5)


def test_split_lists_every_tube_once_and_in_order():
    _, masks = make_inputs()
    seen, hidden = split_tubes(masks)
    for clip, mask in enumerate(masks):
        assert seen[clip].tolist() == (~mask).nonzero().flatten().tolist()
        assert hidden[clip].tolist() == mask.nonzero().flatten().tolist()


def test_every_parameter_learns():
    model = make_model()
    predicted = model(*make_inputs())
    predicted.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_checkpointing_gives_the_same_gradients():
    grads = []
    for every in (0, 1):
        model = make_model(checkpoint_every=every, drop_path=0.3)
        torch.manual_seed(5)
        model(*make_inputs()).square().mean().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.allclose(plain, recomputed, atol=1e-6)


def test_initialisation_is_glorots():
    model = make_model()
    bound = math.sqrt(6 / (32 + 128))
    first = model.encoder.blocks[0].mlp.fc1.weight.detach()
    assert 0.95 * bound < float(first.abs().max()) <= bound
    assert (model.encoder.blocks[0].attn.qkv.bias == 0).all() and (model.decoder.norm.weight == 1).all()
    patches = model.encoder.patch_embed.proj.weight.detach()
    assert 0.95 * math.sqrt(6 / 128) < float(patches.abs().max()) <= math.sqrt(6 / 128)
    assert model(*make_inputs()).std() > 1e-3


def test_evaluation_is_deterministic_and_training_drops_paths():
    model, inputs = make_model(drop_path=0.5), make_inputs()
    assert not torch.equal(model(*inputs), model(*inputs))
    model.eval()
    assert torch.equal(model(*inputs), model(*inputs))


@pytest.mark.parametrize(
    "masks",
    [
        torch.ones(3, 32, dtype=torch.bool),
        torch.zeros(3, 32, dtype=torch.bool),
        torch.arange(32).expand(3, 32) < torch.tensor([[5], [6], [5]]),
    ],
)
def test_masks_must_hide_as_many_tubes_in_every_clip(masks):
    with pytest.raises(ValueError, match="same number of its tubes"):
        make_model()(make_inputs()[0], masks)


def test_masks_and_clips_must_fit():
    frames, masks = make_inputs()
    with pytest.raises(ValueError, match="do not fit clips"):
        make_model()(frames, masks[:, :16])
    with pytest.raises(ValueError, match="takes clips"):
        make_model()(frames[:, :, :2], masks)
    with pytest.raises(ValueError, match="do not fit frames"):
        tube_targets(torch.zeros(3, 3, 16, 16, 3).byte(), masks, normalize=False)
    with pytest.raises(ValueError, match="do not fit frames"):
        tube_targets(torch.zeros(3, 4, 18, 18, 3).byte(), masks, normalize=False)


def test_built_from_a_configuration():
    config = ModelConfig(encoder="videomae", size="tiny")
    model = build_masked_video(config, num_frames=4, frame_size=64, decoder_depth=3)
    assert (model.time_slots, model.places, len(model.decoder.blocks)) == (2, 16, 3)
    assert len(model.encoder.blocks) == 4 and model.mask_token.shape == (1, 1, 96)
    with pytest.raises(UserError, match="clips of 5 frames .* multiple of 2"):
        build_masked_video(config, num_frames=5, frame_size=64, decoder_depth=3)
    with pytest.raises(UserError, match=r"needs model\.encoder = videomae, got vit"):
        build_masked_video(ModelConfig(size="tiny"), num_frames=4, frame_size=64, decoder_depth=3)
