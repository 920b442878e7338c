"""The text tower against open_clip's, with the same weights."""

import dataclasses

import pytest
import torch
from open_clip.transformer import TextTransformer
from torch import nn

from avion_dali.config import ModelConfig
from avion_dali.models.blocks import ACTIVATIONS
from avion_dali.models.dual_encoder import build_dual_encoder
from avion_dali.models.text_tower import TextTower, TextTowerConfig

SMALL = TextTowerConfig(context_length=77, vocab_size=90, width=32, layers=3, heads=4, embed_dim=16)
LONG_VOCABULARY = dataclasses.replace(SMALL, vocab_size=49408, layers=1, activation="quick_gelu")


def both(config: TextTowerConfig) -> tuple[nn.Module, TextTower]:
    """Both towers from one seed."""
    sizes = {"context_length": config.context_length, "vocab_size": config.vocab_size, "width": config.width}
    depth = {"heads": config.heads, "layers": config.layers, "output_dim": config.embed_dim}
    torch.manual_seed(0)
    theirs = TextTransformer(**sizes, **depth, act_layer=ACTIVATIONS[config.activation])
    torch.manual_seed(0)
    return theirs, TextTower(config)


def make_tokens(config: TextTowerConfig, lengths: tuple[int, ...], *, width: int) -> torch.Tensor:
    """Texts of these lengths with their end token, zero padded: int64 (B, width)."""
    generator, last = torch.Generator().manual_seed(1), config.vocab_size - 1
    tokens = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = torch.randint(1, last, (length,), generator=generator)
        row[length - 1] = last
    return tokens


@pytest.mark.parametrize("config", [SMALL, LONG_VOCABULARY])
def test_a_seed_gives_the_weights_of_open_clip(config):
    theirs, ours = (tower.state_dict() for tower in both(config))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("config", "lengths", "cut"),
    [
        (SMALL, (2, 9, 16), 16),
        (SMALL, (3, 17, 40), 48),
        (SMALL, (77, 5, 64), 77),
        (LONG_VOCABULARY, (12, 77, 30), 77),
        (LONG_VOCABULARY, (12, 7), 16),
    ],
)
def test_vectors_and_gradients_are_those_of_open_clip(config, lengths, cut, training):
    """open_clip's tower takes whole rows; ours gets them cut behind the longest text."""
    theirs, ours = (tower.train(training) for tower in both(config))
    with torch.no_grad():
        for tower in (theirs, ours):
            for number, parameter in enumerate(tower.parameters()):
                generator = torch.Generator().manual_seed(number)
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    tokens = make_tokens(config, lengths, width=77)
    expected, found = theirs(tokens), ours(tokens[:, :cut])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for features in (expected, found):
        features.sin().sum().backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, atol=1e-5, rtol=1e-5, msg=name)


def test_no_mask_is_passed_to_attention(monkeypatch):
    calls = []
    attention = nn.functional.scaled_dot_product_attention

    def watched(*inputs, **options):
        calls.append((len(inputs), options))
        return attention(*inputs, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watched)
    _, tower = both(SMALL)
    tower(make_tokens(SMALL, (5, 9), width=16))
    assert calls == [(3, {"is_causal": True})] * 3


@pytest.mark.parametrize(("every", "recomputed"), [(0, 0), (1, 2), (2, 1)])
def test_blocks_are_recomputed_as_in_the_video_tower(every, recomputed):
    config = ModelConfig(size="tiny", embed_dim=32, checkpoint_every=every)
    torch.manual_seed(0)
    model, calls = build_dual_encoder(config, num_frames=2, frame_size=32), []
    for block in model.textual.transformer.resblocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    model.textual(torch.tensor([[49406, 5, 49407, 0]])).sum().backward()
    assert len(calls) == 2 + recomputed


def test_a_longer_text_is_refused():
    with pytest.raises(ValueError, match="takes up to 77 tokens per text, got 78"):
        TextTower(SMALL)(torch.zeros(1, 78, dtype=torch.int64))
