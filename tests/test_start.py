"""Weights of every family into models: what is loaded, what stays fresh, what is left over, and what is refused."""

import argparse
import dataclasses
from pathlib import Path

import pytest
import torch
from golden_fill import wave
from small_models import randomize, same_tensors, small_classifier, small_dual_encoder, small_masked_video

from avion_dali.config import ModelConfig, TrainConfig
from avion_dali.contracts import UserError
from avion_dali.engine.checkpoint import Checkpoint, export_safetensors, save_checkpoint
from avion_dali.models.convert import from_ours, to_ours
from avion_dali.models.dual_encoder import INITIAL_LOGIT_SCALE, build_dual_encoder
from avion_dali.models.fitting import fit_weights
from avion_dali.models.presets import PRESETS
from avion_dali.models.start import apply_start, contradictions, open_start, settle
from avion_dali.models.weight_facts import facts_of

LARGE = dataclasses.replace


def save(path: Path, model: torch.nn.Module, layout: str, *, key: str = "state_dict") -> str:
    """A checkpoint as the reference programs write them: DDP's prefix, options in a Namespace."""
    state = {f"module.{name}": tensor for name, tensor in from_ours(model.state_dict(), layout).items()}
    torch.save({key: state, "epoch": 3, "args": argparse.Namespace(lr=1.0)}, path)
    return str(path)


def small_open_clip(**changes):
    import open_clip

    vision = {"layers": 2, "width": 64, "head_width": 16, "patch_size": 8, "image_size": 32}
    text = {"context_length": 12, "vocab_size": 100, "width": 32, "heads": 4, "layers": 2}
    sizes = {"embed_dim": 16, **changes}
    torch.manual_seed(4)
    return randomize(open_clip.CLIP(sizes["embed_dim"], vision, {**text, **changes.get("text", {})}))


def save_open_clip(path: Path, **changes) -> str:
    torch.save({"state_dict": small_open_clip(**changes).state_dict()}, path)
    return f"open_clip:ViT-B-16-quickgelu//{path}"


# --- opening


def test_avion_checkpoint(tmp_path):
    model = small_dual_encoder(seed=1)
    start = open_start(save(tmp_path / "w.pt", model, "avion-flash"))
    facts = start.facts
    assert (facts.family, facts.role, facts.encoder) == ("avion", "dual-encoder", "vit")
    assert (facts.activation, facts.norm_eps, facts.normalization) == ("gelu", 1e-6, "openai-avion")
    assert (facts.num_frames, facts.frame_size, facts.patch_size) == (4, 32, 8)
    assert (facts.width, facts.layers, facts.embed_dim, facts.context_length) == (64, 2, 16, 12)
    assert same_tensors(start.state, model.state_dict())


def test_lavila_checkpoint(tmp_path):
    model = small_dual_encoder("timesformer", seed=1)
    start = open_start(save(tmp_path / "w.pt", model, "lavila"))
    facts = start.facts
    assert (facts.family, facts.encoder, facts.activation) == ("lavila", "timesformer", "quick_gelu")
    assert (facts.normalization, facts.num_frames, facts.frame_size) == ("openai-avion", 4, 32)
    assert same_tensors(start.state, model.state_dict())


@pytest.mark.parametrize("layout", ["videomae", "avion-flash"])
def test_videomae_checkpoints(tmp_path, layout):
    start = open_start(save(tmp_path / "w.pt", small_masked_video(), layout, key="model"))
    facts = start.facts
    assert (facts.family, facts.role, facts.encoder) == ("videomae", "masked-video", "videomae")
    assert (facts.activation, facts.norm_eps, facts.normalization) == ("gelu", 1e-6, "imagenet")
    assert (facts.width, facts.layers, facts.num_frames) == (64, 2, 0)
    start = open_start(save(tmp_path / "w.pt", small_classifier("videomae"), layout, key="module"))
    assert (start.facts.role, start.facts.num_classes) == ("classifier", 5)


def test_open_clip_file_and_its_name(tmp_path):
    facts = open_start(save_open_clip(tmp_path / "w.pt")).facts
    assert (facts.family, facts.num_frames, facts.norm_eps) == ("open_clip", 1, 1e-5)
    assert (facts.activation, facts.normalization) == ("quick_gelu", "openai")
    assert open_start(f"open_clip:ViT-B-16//{tmp_path}/w.pt").facts.activation == "gelu"
    assert open_start(str(tmp_path / "w.pt")).facts.activation is None


def test_open_clip_file_below_the_working_directory(tmp_path, monkeypatch):
    save_open_clip(tmp_path / "w.pt")
    monkeypatch.chdir(tmp_path)
    assert open_start("open_clip:ViT-B-16//w.pt").facts.family == "open_clip"
    with pytest.raises(UserError, match=r"there is no file at other\.pt"):
        open_start("open_clip:ViT-B-16//other.pt")


def test_openais_own_constants_tell_the_activation(tmp_path):
    state = {**small_open_clip().state_dict(), "input_resolution": torch.tensor(32)}
    torch.save(state, tmp_path / "w.pt")
    start = open_start(str(tmp_path / "w.pt"))
    assert start.facts.activation == "quick_gelu" and "input_resolution" in start.left_over


@pytest.mark.parametrize(
    ("published", "activation", "normalization"),
    [
        ("ViT-B-16/openai", "quick_gelu", "openai"),
        ("ViT-B-16/laion2b_s34b_b88k", "gelu", "openai"),
        ("ViT-B-16-quickgelu/dfn2b", "quick_gelu", "openai"),
        ("ViT-B-16-SigLIP/webli", "gelu", None),
    ],
)
def test_published_weights(tmp_path, monkeypatch, published, activation, normalization):
    from open_clip import pretrained

    save_open_clip(tmp_path / "w.pt")
    asked = []
    monkeypatch.setattr(pretrained, "download_pretrained", lambda c: asked.append(c) or str(tmp_path / "w.pt"))
    facts = open_start("open_clip:" + published).facts
    assert (facts.activation, facts.normalization) == (activation, normalization)
    assert len(asked) == 1


def test_published_weights_that_cannot_be_had(monkeypatch):
    from open_clip import pretrained

    def offline(published: dict) -> str:
        raise FileNotFoundError("no route to host")

    monkeypatch.setattr(pretrained, "download_pretrained", offline)
    with pytest.raises(UserError, match=r"no route to host.*open_clip:ViT-B-16//path/to/file"):
        open_start("open_clip:ViT-B-16/openai")
    with pytest.raises(UserError, match=r"open_clip has ViT-B-16 as: openai, "):
        open_start("open_clip:ViT-B-16/opanai")
    with pytest.raises(UserError, match=r"knows no pretrained ViT-Q"):
        open_start("open_clip:ViT-Q/openai")
    with pytest.raises(UserError, match=r"write open_clip:NAME/PRETRAINED"):
        open_start("open_clip:ViT-B-16")


def test_an_open_clip_name_on_other_weights_is_refused(tmp_path):
    path = save(tmp_path / "w.pt", small_dual_encoder(), "avion-flash")
    with pytest.raises(UserError, match="holds weights of avion; name the file without open_clip:"):
        open_start(f"open_clip:ViT-B-16/{path}")


def own_config(**model) -> dict:
    config = TrainConfig(model=ModelConfig(**model))
    return dataclasses.asdict(
        dataclasses.replace(config, data=dataclasses.replace(config.data, num_frames=4, frame_size=32))
    )


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("form", ["checkpoint", "safetensors"])
def test_our_own_files(tmp_path, form, averaged):
    model = small_dual_encoder(seed=2)
    config = own_config(activation="quick_gelu", norm_eps=1e-5)
    expected = model.state_dict()
    if form == "safetensors":
        export_safetensors(model, tmp_path / "w.safetensors", {"config": config})
    else:
        average = {name: 0.5 * p.detach() for name, p in model.named_parameters()} if averaged else {}
        expected = {**expected, **average}
        save_checkpoint(
            tmp_path / "w.pt", Checkpoint(model.state_dict(), {}, {}, 7, {}, config=config, average=average)
        )
    start = open_start(str(next(tmp_path.iterdir())))
    assert start.facts.family == "avion_dali" and start.config == config
    assert (start.facts.activation, start.facts.norm_eps) == ("quick_gelu", 1e-5)
    assert (start.facts.normalization, start.facts.num_frames) == ("openai", 4)
    assert same_tensors(start.state, expected)


def test_our_files_without_settled_options_mean_the_defaults(tmp_path):
    export_safetensors(
        small_dual_encoder("timesformer"),
        tmp_path / "w.safetensors",
        {"config": own_config(encoder="timesformer")},
    )
    facts = open_start(str(tmp_path / "w.safetensors")).facts
    assert (facts.activation, facts.norm_eps) == ("quick_gelu", 1e-6)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_unreadable_files(tmp_path, name):
    with pytest.raises(UserError, match="there is no"):
        open_start(str(tmp_path / name))
    (tmp_path / name).write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(UserError, match=r"w\.\w+ (is not a readable|cannot be read)"):
        open_start(str(tmp_path / name))


def test_a_file_of_unknown_weights_is_named(tmp_path):
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "w.pt")
    with pytest.raises(UserError, match="none of AVION's"):
        open_start(str(tmp_path / "w.pt"))


# --- settling


def real_facts(encoder="vit", size="vit_b16", family="avion", **known):
    with torch.device("meta"):
        model = build_dual_encoder(
            ModelConfig(encoder=encoder, size=size), num_frames=4, frame_size=PRESETS[size].image_size
        )
    return facts_of(model.state_dict(), family, known=known)


def test_settling_takes_what_is_left_open():
    config = ModelConfig(weights="w")
    settled = settle(config, real_facts())
    assert (settled.activation, settled.norm_eps) == ("gelu", 1e-6)
    assert settled == dataclasses.replace(config, activation="gelu", norm_eps=1e-6)
    settled = settle(config, real_facts(family="open_clip", activation="quick_gelu"))
    assert (settled.activation, settled.norm_eps) == ("quick_gelu", 1e-5)
    assert settle(config, real_facts(family="open_clip")).activation == "gelu"
    own = ModelConfig(activation="gelu", norm_eps=1e-3)
    assert settle(own, real_facts(family="open_clip", activation="quick_gelu")) == own


def test_settling_starts_a_timesformer_from_an_image_model_only():
    config = ModelConfig(encoder="timesformer", weights="w")
    assert settle(config, real_facts(family="open_clip")).activation == "quick_gelu"
    with pytest.raises(UserError, match=r"set model\.encoder: vit"):
        settle(config, real_facts())
    with pytest.raises(UserError, match=r"set model\.encoder: timesformer"):
        settle(ModelConfig(weights="w"), real_facts("timesformer", family="lavila"))


@pytest.mark.parametrize(("actual", "wrong"), [("vit_l14", "vit_b16"), ("vit_l14_336", "tiny")])
def test_settling_names_the_right_size(actual, wrong):
    with pytest.raises(
        UserError, match=rf"width 1024, 24 blocks and patches of 14; set model\.size: {actual}$"
    ):
        settle(ModelConfig(size=wrong, weights="w"), real_facts(size=actual))


def test_contradictions_are_said():
    facts = real_facts()
    assert contradictions(facts, normalization="openai-avion", activation="gelu") == ()
    assert contradictions(facts) == ()
    found = contradictions(facts, normalization="openai", activation="quick_gelu")
    assert "data.normalization openai-avion, this run uses openai" in found[0]
    assert "model.activation gelu, this run uses quick_gelu" in found[1]
    assert "does not tell" in contradictions(real_facts(family="open_clip"), activation="gelu")[0]


# --- applying


def apply(model, weights: str, **options):
    return apply_start(model, open_start(weights), temporal_resize="interpolate", **options)


@pytest.mark.parametrize("layout", ["avion-flash", "avion-plain"])
def test_a_dual_encoder_continues_exactly(tmp_path, layout):
    theirs, model = small_dual_encoder(seed=1), small_dual_encoder(seed=2)
    report = apply(model, save(tmp_path / "w.pt", theirs, layout), normalization="openai")
    assert same_tensors(model.state_dict(), theirs.state_dict())
    assert len(report.loaded) == len(theirs.state_dict()) and not report.fresh and not report.unused
    assert "openai-avion" in report.warnings[0] and report.warnings[0] in report.lines()[-1]
    assert f"{len(report.loaded)} of {len(report.loaded)} parameters loaded" in report.lines()[0]


@pytest.mark.parametrize("encoder", ["vit", "timesformer"])
def test_frame_positions_grow_and_shrink(tmp_path, encoder):
    theirs = small_dual_encoder(encoder, seed=1)
    path = save(tmp_path / "w.pt", theirs, "avion-flash" if encoder == "vit" else "lavila")
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
    path = save(tmp_path / "w.pt", theirs, "avion-flash" if encoder == "vit" else "lavila")
    model = small_dual_encoder(encoder, image_size=48)
    assert "visual." + name in apply(model, path).resized[0]
    positions = getattr(model.visual, name).detach().reshape(37, 64)
    assert torch.allclose(positions[1:], torch.full((36, 64), 0.25), atol=1e-6)
    assert torch.equal(positions[0], getattr(theirs.visual, name).detach().reshape(17, 64)[0])


def test_image_weights_start_a_video_model(tmp_path):
    model = small_dual_encoder(num_frames=4, activation="quick_gelu", norm_eps=1e-5)
    with torch.no_grad():
        model.visual.temporal_embedding.zero_()
    report = apply(model, save_open_clip(tmp_path / "w.pt"), activation="quick_gelu", normalization="openai")
    assert set(report.fresh) == {"visual.temporal_embedding"} and not report.warnings
    theirs = small_open_clip().state_dict()
    assert torch.equal(model.visual.image_projection, theirs["visual.proj"])
    assert torch.equal(model.logit_scale, theirs["logit_scale"])
    # Frames without positions of their own: one frame repeated is the image's tokens over and over.
    frame = wave(2, 3, 1, 32, 32)
    still = small_dual_encoder(num_frames=1, activation="quick_gelu", norm_eps=1e-5)
    apply(still, f"open_clip:ViT-B-16-quickgelu//{tmp_path}/w.pt")
    assert torch.allclose(model.visual(frame.expand(-1, -1, 4, -1, -1)), still.visual(frame), atol=1e-5)


def test_another_width_of_the_shared_space_renews_it_whole(tmp_path):
    model = small_dual_encoder(embed_dim=24)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = apply(model, save_open_clip(tmp_path / "w.pt"))
    space = {"visual.image_projection", "textual.text_projection", "logit_scale"}
    assert set(report.fresh) == {*space, "visual.temporal_embedding"}
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in report.fresh)
    assert model.logit_scale != INITIAL_LOGIT_SCALE  # `before` is what a fresh model has, whatever that is


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
    report = apply(model, save(tmp_path / "w.pt", theirs, "avion-flash"))
    assert set(report.fresh) == {"fc_cls.weight", "fc_cls.bias"} and torch.equal(model.fc_cls.weight, head)
    unused = {name for name in theirs.state_dict() if name.startswith("textual.")}
    assert set(report.unused) == {*unused, "visual.image_projection", "logit_scale"}
    clips = wave(2, 3, 4, 32, 32)
    assert torch.equal(model.visual(clips), theirs.visual.features(clips))


def test_masked_video_starts_a_classifier(tmp_path):
    theirs, model = small_masked_video(seed=1), small_classifier("videomae", seed=2)
    report = apply(model, save(tmp_path / "w.pt", theirs, "avion-flash", key="model"))
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
    report = apply(model, save(tmp_path / "w.pt", theirs, "avion-flash"))
    assert set(report.fresh) == (set() if classes == 5 else {"fc_cls.weight", "fc_cls.bias"})


def test_masked_video_continues_exactly(tmp_path):
    theirs, model = small_masked_video(seed=1), small_masked_video(seed=2)
    report = apply(model, save(tmp_path / "w.pt", theirs, "avion-flash"))
    assert same_tensors(model.state_dict(), theirs.state_dict()) and not report.fresh and not report.unused


def test_weights_without_text_leave_the_text_tower_fresh(tmp_path):
    model = small_dual_encoder("videomae")
    report = apply(model, save(tmp_path / "w.pt", small_classifier("videomae"), "videomae"))
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
    weights = save(tmp_path / "w.pt", theirs(), layout)
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


def test_egovlps_tower_lacks_a_norm_and_says_so(tmp_path):
    tower = small_dual_encoder("timesformer").visual.state_dict()
    state = {f"video_model.{name}": tensor for name, tensor in tower.items() if "ln_pre" not in name}
    torch.save({"state_dict": {**state, "txt_proj.1.bias": torch.zeros(1)}}, tmp_path / "w.pt")
    start = open_start(str(tmp_path / "w.pt"))
    assert (start.facts.family, start.facts.role) == ("egovlp", "video-tower") and len(start.left_over) == 1
    with pytest.raises(UserError, match="without a norm before its first block"):
        apply(small_dual_encoder("timesformer"), str(tmp_path / "w.pt"))


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
        own = build_dual_encoder(
            ModelConfig(encoder=encoder, size=size), num_frames=4, frame_size=PRESETS[size].image_size
        ).state_dict()
    state, _ = to_ours(theirs, "open_clip")
    facts = facts_of(state, "open_clip")
    assert facts.size == size
    fit = fit_weights(own, state, facts, temporal_resize="interpolate")
    assert not fit.problems and not fit.resized and not fit.unused
    fresh = {name for name in fit.fresh if ".timeattn." not in name and ".norm3." not in name}
    time = "visual.temporal_embedding" if encoder == "vit" else "visual.temporal_embed"
    assert fresh == {"visual.image_projection", "textual.text_projection", "logit_scale", time}
    assert len(fit.tensors) + len(fit.fresh) == len(own)
