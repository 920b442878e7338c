"""Weights of every family into models: what is loaded, what stays fresh or is left over, what is refused."""

import pytest
import torch
from golden_fill import wave
from small_models import (
    same_tensors,
    save_as,
    save_open_clip,
    small_classifier,
    small_dual_encoder,
    small_masked_video,
    small_open_clip,
)

from avion_dali.config import ModelConfig
from avion_dali.contracts import UserError
from avion_dali.models.convert import to_ours
from avion_dali.models.dual_encoder import build_dual_encoder
from avion_dali.models.find_facts import guessed_facts
from avion_dali.models.presets import PRESETS
from avion_dali.models.starting_weights import apply_start, open_start
from avion_dali.models.weight_fitting import fit_weights


def apply(model, weights: str, **options):
    return apply_start(model, open_start(weights), temporal_resize="interpolate", **options)


@pytest.mark.parametrize("layout", ["avion-flash", "avion-plain"])
def test_a_dual_encoder_continues_exactly(tmp_path, layout):
    theirs, model = small_dual_encoder(seed=1), small_dual_encoder(seed=2)
    report = apply(model, save_as(tmp_path / "w.pt", theirs, layout), normalization="openai")
    assert same_tensors(model.state_dict(), theirs.state_dict())
    assert len(report.loaded) == len(theirs.state_dict()) and not report.fresh and not report.unused
    assert "openai-avion" in report.warnings[0] and report.warnings[0] in report.lines()[-1]
    assert f"{len(report.loaded)} of {len(report.loaded)} parameters loaded" in report.lines()[0]


@pytest.mark.parametrize("encoder", ["vit", "timesformer"])
def test_frame_positions_grow_and_shrink(tmp_path, encoder):
    theirs = small_dual_encoder(encoder, seed=1)
    path = save_as(tmp_path / "w.pt", theirs, "avion-flash" if encoder == "vit" else "lavila")
    name = {"vit": "temporal_embedding", "timesformer": "temporal_embed"}[encoder]
    frames = getattr(theirs.visual, name).detach().reshape(4, 64)
    for number, shrink, first in (
        (8, "interpolate", frames[0]),
        (2, "interpolate", frames[:2].mean(0)),
        (2, "truncate", frames[0]),
    ):
        model = small_dual_encoder(encoder, num_frames=number)
        report = apply_start(model, open_start(path), temporal_resize=shrink)
        resized = getattr(model.visual, name).detach().reshape(number, 64)
        assert torch.allclose(resized[0], first, atol=1e-6)
        assert len(report.resized) == 1 and f"visual.{name}" in report.resized[0] and not report.fresh


@pytest.mark.parametrize("encoder", ["vit", "timesformer"])
def test_place_positions_fit_other_frames(tmp_path, encoder):
    theirs = small_dual_encoder(encoder, seed=1)
    name = {"vit": "positional_embedding", "timesformer": "pos_embed"}[encoder]
    with torch.no_grad():
        getattr(theirs.visual, name)[..., 1:, :] = 0.25
    path = save_as(tmp_path / "w.pt", theirs, "avion-flash" if encoder == "vit" else "lavila")
    model = small_dual_encoder(encoder, image_size=48)
    assert "visual." + name in apply(model, path).resized[0]
    positions = getattr(model.visual, name).detach().reshape(37, 64)
    assert torch.allclose(positions[1:], torch.full((36, 64), 0.25), atol=1e-6)
    assert torch.equal(positions[0], getattr(theirs.visual, name).detach().reshape(17, 64)[0])


def test_image_weights_start_a_video_model(tmp_path):
    model = small_dual_encoder(num_frames=4)
    report = apply(model, save_open_clip(tmp_path / "w.pt"), activation="quick_gelu", normalization="openai")
    assert set(report.fresh) == {"visual.temporal_embedding"} and not report.warnings
    theirs = small_open_clip().state_dict()
    assert torch.equal(model.visual.image_projection, theirs["visual.proj"])
    assert torch.equal(model.logit_scale, theirs["logit_scale"])


def test_another_width_of_the_shared_space_renews_it_whole(tmp_path):
    model = small_dual_encoder(embed_dim=24)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = apply(model, save_open_clip(tmp_path / "w.pt"))
    space = {"visual.image_projection", "textual.text_projection", "logit_scale"}
    assert set(report.fresh) == {*space, "visual.temporal_embedding"}
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in report.fresh)


def test_text_positions_are_cut_and_continued_and_words_added(tmp_path):
    weights = save_open_clip(tmp_path / "w.pt")
    theirs = small_open_clip().state_dict()
    cut = small_dual_encoder(text={"context_length": 7})
    apply(cut, weights)
    assert torch.equal(cut.textual.positional_embedding, theirs["positional_embedding"][:7])
    longer = small_dual_encoder(text={"context_length": 15, "vocab_size": 110})
    assert len(apply(longer, weights).resized) == 2
    assert torch.equal(longer.textual.positional_embedding[:12], theirs["positional_embedding"])
    assert not longer.textual.positional_embedding[12:].any()
    assert torch.equal(longer.textual.token_embedding.weight[:100], theirs["token_embedding.weight"])
    assert not longer.textual.token_embedding.weight[100:].any()
    with pytest.raises(
        UserError, match=r"textual\.token_embedding\.weight is \(100, 32\) instead of \(90, 32\)"
    ):
        apply(small_dual_encoder(text={"vocab_size": 90}), weights)


def test_image_weights_start_a_timesformer(tmp_path):
    weights = save_open_clip(tmp_path / "w.pt")
    model = small_dual_encoder("timesformer")
    report = apply(model, weights)
    assert all(
        ".timeattn." in name or ".norm3." in name or name == "visual.temporal_embed" for name in report.fresh
    )
    assert len(report.fresh) == 2 * 6 + 1 and not report.unused
    theirs = small_open_clip().state_dict()
    assert torch.equal(model.visual.norm.weight, theirs["visual.ln_post.weight"])
    assert torch.equal(
        model.visual.blocks[1].mlp.fc2.weight, theirs["visual.transformer.resblocks.1.mlp.c_proj.weight"]
    )


def test_a_dual_encoder_starts_a_classifier(tmp_path):
    theirs, model = small_dual_encoder(seed=1), small_classifier(seed=2)
    head = model.fc_cls.weight.clone()
    report = apply(model, save_as(tmp_path / "w.pt", theirs, "avion-flash"))
    assert set(report.fresh) == {"fc_cls.weight", "fc_cls.bias"} and torch.equal(model.fc_cls.weight, head)
    unused = {name for name in theirs.state_dict() if name.startswith("textual.")}
    assert set(report.unused) == {*unused, "visual.image_projection", "logit_scale"}
    clips = wave(2, 3, 4, 32, 32)
    assert torch.equal(model.visual(clips), theirs.visual.features(clips))


def test_masked_video_starts_a_classifier(tmp_path):
    theirs, model = small_masked_video(seed=1), small_classifier("videomae", seed=2)
    report = apply(model, save_as(tmp_path / "w.pt", theirs, "avion-flash", key="model"))
    assert set(report.fresh) == {
        *("fc_cls.weight", "fc_cls.bias"),
        *("visual.fc_norm.weight", "visual.fc_norm.bias"),
    }
    used = {name.replace("visual.", "encoder.") for name in report.loaded}
    assert set(report.unused) == set(theirs.state_dict()) - used
    assert {"mask_token", "encoder.norm.weight", "decoder.head.bias"} <= set(report.unused)
    assert torch.equal(model.visual.blocks[1].attn.qkv.bias, theirs.encoder.blocks[1].attn.qkv.bias)


@pytest.mark.parametrize("classes", [5, 7])
def test_a_head_is_kept_when_the_classes_are_as_many(tmp_path, classes):
    theirs, model = small_classifier("videomae", seed=1), small_classifier("videomae", seed=2, classes=classes)
    report = apply(model, save_as(tmp_path / "w.pt", theirs, "avion-flash"))
    assert set(report.fresh) == (set() if classes == 5 else {"fc_cls.weight", "fc_cls.bias"})


def test_masked_video_continues_exactly(tmp_path):
    theirs, model = small_masked_video(seed=1), small_masked_video(seed=2)
    report = apply(model, save_as(tmp_path / "w.pt", theirs, "avion-flash"))
    assert same_tensors(model.state_dict(), theirs.state_dict()) and not report.fresh and not report.unused


def test_weights_without_text_leave_the_text_tower_fresh(tmp_path):
    model = small_dual_encoder("videomae")
    report = apply(model, save_as(tmp_path / "w.pt", small_classifier("videomae"), "videomae"))
    assert {"logit_scale", "visual.image_projection", "textual.ln_final.bias"} <= set(report.fresh)
    assert set(report.unused) == {"fc_cls.weight", "fc_cls.bias"}
    assert any("the weights have no text tower" in line for line in report.lines())


def test_half_precision_weights_become_the_models(tmp_path):
    torch.save(
        {name: tensor.half() for name, tensor in small_classifier().state_dict().items()}, tmp_path / "w.pt"
    )
    model = small_classifier(seed=3)
    apply(model, str(tmp_path / "w.pt"))
    assert model.fc_cls.weight.dtype == torch.float32
    assert torch.allclose(model.fc_cls.weight, small_classifier().fc_cls.weight, atol=1e-3)


@pytest.mark.parametrize(
    ("model", "theirs", "layout", "message"),
    [
        (
            small_masked_video,
            small_dual_encoder,
            "avion-flash",
            "cannot start from the weights of a dual-encoder",
        ),
        (
            small_classifier,
            small_masked_video,
            "videomae",
            r"of a videomae encoder, the model has vit; set model\.encoder",
        ),
        (
            small_dual_encoder,
            lambda: small_dual_encoder("timesformer"),
            "lavila",
            r"of a timesformer encoder, the model has vit",
        ),
        (
            lambda: small_dual_encoder(layers=3),
            small_dual_encoder,
            "avion-flash",
            r"resblocks\.2\.\S+ is missing.* and \d+ more",
        ),
        (
            small_dual_encoder,
            lambda: small_dual_encoder(layers=3),
            "avion-flash",
            r"resblocks\.2\.\S+ is unexpected.* and \d+ more",
        ),
        (
            lambda: small_dual_encoder(embed_dim=24),
            small_dual_encoder,
            "avion-flash",
            r"image_projection is \(64, 16\) instead of \(64, 24\).*model\.embed_dim is 16",
        ),
    ],
    ids=["masked", "encoder", "timesformer", "fewer", "more", "space"],
)
def test_weights_of_another_model_are_refused_and_change_nothing(tmp_path, model, theirs, layout, message):
    weights = save_as(tmp_path / "w.pt", theirs(), layout)
    built = model()
    before = {name: tensor.clone() for name, tensor in built.state_dict().items()}
    with pytest.raises(UserError, match=message):
        apply(built, weights)
    assert same_tensors(built.state_dict(), before)


def test_a_single_unexpected_entry_is_an_error(tmp_path):
    state = {**small_dual_encoder().state_dict(), "visual.gate": torch.zeros(1)}
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"visual\.gate is unexpected"):
        apply(small_dual_encoder(), str(tmp_path / "w.pt"))


def test_a_timesformer_without_the_first_norm_is_another_model(tmp_path):
    weights = save_as(tmp_path / "w.pt", small_dual_encoder("timesformer", pre_norm=False), "lavila")
    with pytest.raises(UserError, match=r"visual\.ln_pre\.weight is missing.*proj\.bias is unexpected"):
        apply(small_dual_encoder("timesformer"), weights)
    assert not apply(small_dual_encoder("timesformer", pre_norm=False), weights).fresh


@pytest.mark.parametrize(
    ("name", "size", "encoder"),
    [
        ("ViT-B-16", "vit_b16", "vit"),
        ("ViT-L-14", "vit_l14", "vit"),
        ("ViT-L-14-336", "vit_l14_336", "vit"),
        ("ViT-B-16", "vit_b16", "timesformer"),
    ],
)
def test_real_sizes_of_open_clip_fit_ours(name, size, encoder):
    """Names and shapes only, on the meta device."""
    import open_clip

    with torch.device("meta"):
        theirs = open_clip.CLIP(**open_clip.get_model_config(name)).state_dict()
        model = build_dual_encoder(
            ModelConfig(encoder=encoder, size=size), num_frames=4, frame_size=PRESETS[size].image_size
        )
    state, _ = to_ours(theirs, "open_clip")
    facts = guessed_facts(state, "open_clip")
    assert facts.size == size
    fit = fit_weights(model, state, facts=facts, temporal_resize="interpolate")
    assert not fit.problems and not fit.resized and not fit.unused
    fresh = {name for name in fit.fresh if ".timeattn." not in name and ".norm3." not in name}
    time = "visual.temporal_embedding" if encoder == "vit" else "visual.temporal_embed"
    assert fresh == {"visual.image_projection", "textual.text_projection", "logit_scale", time}
    assert len(fit.tensors) + len(fit.fresh) == len(model.state_dict())
