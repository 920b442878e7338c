import math

import pytest
import torch
from torch import nn

from avion_dali.config import ModelConfig
from avion_dali.contracts import UserError
from avion_dali.models.dual_encoder import DualEncoder, build_dual_encoder
from avion_dali.models.text_tower import TextTower, TextTowerConfig

SHORT = TextTowerConfig(context_length=8, vocab_size=50, width=32, layers=2, heads=4, embed_dim=16)


def make_model(**options: object) -> DualEncoder:
    torch.manual_seed(0)
    config = ModelConfig(size="tiny", embed_dim=32, context_length=12, **options)
    return build_dual_encoder(config, num_frames=2, frame_size=32)


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    return make_model()


def make_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.zeros(3, 12, dtype=torch.int64)
    for row, length in enumerate((2, 5, 9)):
        tokens[row, 0] = 49406
        tokens[row, 1 : 1 + length] = torch.randint(1, 40000, (length,), generator=generator)
        tokens[row, 1 + length] = 49407
    return torch.randn(3, 3, 2, 32, 32, generator=generator), tokens


def test_outputs_are_unit_rows_and_one_scale_per_row(model):
    video, text, scale = model(*make_inputs())
    assert video.shape == text.shape == (3, 32) and scale.shape == (3,)
    for rows in (video, text):
        assert torch.allclose(rows.norm(dim=1), torch.ones(3), atol=1e-5)
    assert torch.allclose(scale, torch.full((3,), 1 / 0.07))


def test_outputs_are_float32_under_autocast(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(*make_inputs())
    assert [output.dtype for output in outputs] == [torch.float32] * 3
    assert torch.allclose(outputs[0].norm(dim=1), torch.ones(3), atol=1e-5)


def test_text_feature_ignores_everything_after_its_end(model):
    _, tokens = make_inputs()
    changed = tokens.clone()
    changed[0, 5:] = 17  # smaller than the end token, behind it
    assert torch.allclose(model.encode_text(tokens), model.encode_text(changed), atol=1e-5)
    changed[0, 1] = 17
    assert not torch.allclose(model.encode_text(tokens)[0], model.encode_text(changed)[0], atol=1e-4)


def test_text_of_another_length_is_refused(model):
    with pytest.raises(ValueError, match="takes up to 12 tokens"):
        model.encode_text(torch.zeros(1, 77, dtype=torch.int64))


def test_scale_is_frozen_unless_asked_for():
    assert not make_model().logit_scale.requires_grad
    model = make_model(train_logit_scale=True)
    model(*make_inputs())[2].sum().backward()
    assert model.logit_scale.grad == pytest.approx(3 / 0.07, rel=1e-5)


@pytest.mark.parametrize(("value", "clamped"), [(-1.0, 0.0), (9.0, math.log(100)), (2.0, 2.0)])
def test_clamp_keeps_the_factor_between_1_and_100(model, value, clamped):
    before = model.logit_scale
    with torch.no_grad():
        model.logit_scale.fill_(value)
    model.clamp_logit_scale()
    assert model.logit_scale is before and float(before) == pytest.approx(clamped)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(1 / 0.07))


def test_same_seed_gives_the_same_weights(model):
    for mine, other in zip(model.parameters(), make_model().parameters(), strict=True):
        assert torch.equal(mine, other)


def test_frame_size_must_fit_the_patches():
    with pytest.raises(UserError, match="100 pixels cannot be divided into patches of 16"):
        build_dual_encoder(ModelConfig(size="tiny"), num_frames=2, frame_size=100)


def test_checkpointing_covers_both_towers_and_changes_nothing():
    grads = []
    for every in (0, 1):
        model, calls = make_model(checkpoint_every=every), []
        for tower in (model.visual, model.textual):
            tower.transformer.resblocks[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        video, text, _ = model(*make_inputs())
        (video * text.roll(1, dims=0)).sum().backward()
        assert len(calls) == (4 if every else 2)
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.allclose(plain, recomputed, atol=1e-6)


def test_activation_reaches_both_towers():
    for activation, name in (("gelu", "GELU"), ("quick_gelu", "QuickGELU")):
        model = make_model(activation=activation)
        for tower in (model.visual, model.textual):
            kinds = {type(module).__name__ for module in tower.modules()}
            assert name in kinds and not kinds & ({"GELU", "QuickGELU"} - {name})


def test_activation_settles_by_encoder_when_nothing_else_says():
    for encoder, name in (("vit", "GELU"), ("timesformer", "QuickGELU")):
        kinds = {type(module).__name__ for module in make_model(encoder=encoder).modules()}
        assert name in kinds and not kinds & ({"GELU", "QuickGELU"} - {name})


def test_timesformer_as_video_tower():
    model = make_model(encoder="timesformer")
    video, text, _ = model(*make_inputs())
    assert video.shape == text.shape == (3, 32)
    assert torch.allclose(video.norm(dim=1), torch.ones(3), atol=1e-5)
    (video * text.roll(1, dims=0)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_options_reach_the_video_tower():
    model = make_model(drop_path=0.3, drop_path_schedule="linear", attention="math", norm_eps=1e-5)
    blocks = model.visual.transformer.resblocks
    assert [block.drop_path_rate for block in blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert {block.attn.backend for block in blocks} == {"math"}
    assert {block.ln_1.eps for block in blocks} == {1e-5}


def test_compile_covers_both_towers(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda call, **_: compiled.append(call) or call)
    make_model(compile=True)
    assert len(compiled) == 4 + 2


def test_text_tower_is_a_causal_pre_norm_transformer():
    """Against torch's own encoder layers, given the same weights."""
    torch.manual_seed(0)
    tower = TextTower(SHORT).train()
    tokens = torch.tensor([[48, 3, 4, 49, 0, 0, 0, 0], [48, 9, 1, 1, 2, 7, 49, 0]])
    x = tower.token_embedding(tokens) + tower.positional_embedding
    mask = nn.Transformer.generate_square_subsequent_mask(8)
    for block in tower.transformer.resblocks:
        layer = nn.TransformerEncoderLayer(
            32, 4, 128, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        pairs = ("self_attn.", "attn."), ("linear1.", "mlp.c_fc."), ("linear2.", "mlp.c_proj.")
        pairs += ("norm1.", "ln_1."), ("norm2.", "ln_2.")
        ours = block.state_dict()
        renamed = {t + k[len(o) :]: v for t, o in pairs for k, v in ours.items() if k.startswith(o)}
        layer.load_state_dict(renamed, strict=True)
        x = layer(x, src_mask=mask)
    x = nn.functional.layer_norm(x, (32,), tower.ln_final.weight, tower.ln_final.bias, 1e-5)
    expected = x[torch.arange(2), torch.tensor([3, 6])] @ tower.text_projection
    assert torch.allclose(tower(tokens), expected, atol=1e-5)


def test_text_width_must_divide_into_heads():
    with pytest.raises(UserError, match="width 32 is not a multiple of the number of heads, 5"):
        TextTowerConfig(context_length=8, vocab_size=50, width=32, layers=2, heads=5, embed_dim=16)
