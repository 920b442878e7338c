"""EgoVLP's video tower, from its file to features, classes and retrieval; against a plain one written here."""

from dataclasses import asdict, replace
from pathlib import Path

import make_videos
import numpy as np
import pytest
import torch
from golden_fill import wave
from safetensors.numpy import load_file
from small_models import same_tensors, save_as, small_dual_encoder
from torch.nn import functional

from avion_dali.assembly.evaluators import evaluate_checkpoint, trained_config
from avion_dali.cli import features, weights
from avion_dali.cli.main import build_parser
from avion_dali.config import EvaluateConfig, ModelConfig
from avion_dali.contracts import UserError
from avion_dali.engine.checkpoint import export_safetensors
from avion_dali.engine.distributed import Distributed
from avion_dali.models.classifier import build_classifier
from avion_dali.models.dual_encoder import build_dual_encoder
from avion_dali.models.starting_weights import apply_start, open_start
from avion_dali.models.towers import build_video_tower, resolve_model

WIDTH, LAYERS, HEADS, PATCH, SIDE, FRAMES = 192, 4, 3, 16, 64, 4
PLACES = (SIDE // PATCH) ** 2
CLIPS = {"num_frames": FRAMES, "frame_size": SIDE}
BLOCK = {
    **{f"{norm}.{what}": (WIDTH,) for norm in ("norm1", "norm2", "norm3") for what in ("weight", "bias")},
    **{f"{attention}.qkv.weight": (3 * WIDTH, WIDTH) for attention in ("attn", "timeattn")},
    **{f"{attention}.qkv.bias": (3 * WIDTH,) for attention in ("attn", "timeattn")},
    **{f"{attention}.proj.weight": (WIDTH, WIDTH) for attention in ("attn", "timeattn")},
    **{f"{attention}.proj.bias": (WIDTH,) for attention in ("attn", "timeattn")},
    **{"mlp.fc1.weight": (4 * WIDTH, WIDTH), "mlp.fc1.bias": (4 * WIDTH,)},
    **{"mlp.fc2.weight": (WIDTH, 4 * WIDTH), "mlp.fc2.bias": (WIDTH,)},
}
TOWER = {
    "cls_token": (1, 1, WIDTH),
    "pos_embed": (1, 1 + PLACES, WIDTH),
    "temporal_embed": (1, FRAMES, WIDTH),
    "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
    "patch_embed.proj.bias": (WIDTH,),
    **{f"blocks.{i}.{name}": shape for i in range(LAYERS) for name, shape in BLOCK.items()},
    "norm.weight": (WIDTH,),
    "norm.bias": (WIDTH,),
}
OTHERS = {
    "text_model.transformer.layer.0.attention.q_lin.weight": (8, 8),
    "vid_proj.0.weight": (256, WIDTH),
    "vid_proj.0.bias": (256,),
    "txt_proj.1.weight": (256, 768),
    "txt_proj.1.bias": (256,),
}
LAVILAS_NAMES = (
    ("video_model", "visual"),
    ("text_model", "textual"),
    ("vid_proj", "image_projection"),
    ("txt_proj", "text_projection"),
)


def random_tower() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in TOWER.items()}
    return {name: 1 + t if "norm" in name and name.endswith("weight") else t for name, t in drawn.items()}


def egovlp_state() -> dict[str, torch.Tensor]:
    tower = {f"module.video_model.{name}": tensor for name, tensor in random_tower().items()}
    return tower | {f"module.{name}": torch.ones(shape) for name, shape in OTHERS.items()}


@pytest.fixture
def egovlp(tmp_path: Path) -> str:
    path = tmp_path / "egovlp.pth"
    torch.save({"arch": "FrozenInTime", "epoch": 8, "state_dict": egovlp_state()}, path)
    return str(path)


def attended(x: torch.Tensor, state: dict[str, torch.Tensor], name: str, hidden: torch.Tensor) -> torch.Tensor:
    """PyTorch's multi-head attention of all tokens, under a mask."""
    layer = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    layer.load_state_dict(
        {
            "in_proj_weight": state[name + ".qkv.weight"],
            "in_proj_bias": state[name + ".qkv.bias"],
            "out_proj.weight": state[name + ".proj.weight"],
            "out_proj.bias": state[name + ".proj.bias"],
        }
    )
    return layer(x, x, x, attn_mask=hidden, need_weights=False)[0]


def hidden_pairs(group: torch.Tensor) -> torch.Tensor:
    """True where a patch may not look: at patches of other groups."""
    hidden = torch.zeros(1 + len(group), 1 + len(group), dtype=torch.bool)
    hidden[1:, 1:] = group[:, None] != group[None, :]
    return hidden


@torch.no_grad()
def plain_features(state: dict[str, torch.Tensor], clips: torch.Tensor) -> torch.Tensor:
    """Divided attention with the residual of Frozen in Time, written as masks over all tokens."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.layer_norm(x, (WIDTH,), state[name + ".weight"], state[name + ".bias"], eps=1e-6)

    tokens = []
    for frame in range(FRAMES):
        weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
        patches = functional.conv2d(clips[:, :, frame], weight, bias, stride=PATCH).flatten(2).transpose(1, 2)
        tokens.append(patches + state["pos_embed"][:, 1:] + state["temporal_embed"][:, frame])
    first = (state["cls_token"] + state["pos_embed"][:, :1]).expand(len(clips), -1, -1)
    x = torch.cat([first, *tokens], dim=1)
    number = torch.arange(FRAMES * PLACES)
    of_place, of_frame = hidden_pairs(number % PLACES), hidden_pairs(number // PLACES)
    for i in range(LAYERS):
        block = f"blocks.{i}"
        time = attended(norm(x, f"{block}.norm3"), state, f"{block}.timeattn", of_place)
        x = x + attended(norm(x + time, f"{block}.norm1"), state, f"{block}.attn", of_frame)
        inner = functional.linear(
            norm(x, f"{block}.norm2"), state[f"{block}.mlp.fc1.weight"], state[f"{block}.mlp.fc1.bias"]
        )
        inner = functional.gelu(inner)
        x = x + functional.linear(inner, state[f"{block}.mlp.fc2.weight"], state[f"{block}.mlp.fc2.bias"])
    return norm(x[:, 0], "norm")


def model_config(path: str) -> ModelConfig:
    return ModelConfig(encoder="timesformer", size="tiny", weights=path, embed_dim=16, context_length=8)


def test_the_file_says_what_it_is(egovlp: str) -> None:
    start = open_start(egovlp)
    facts = start.facts
    assert (facts.family, facts.role, facts.size) == ("egovlp", "video-tower", "tiny")
    assert (facts.activation, facts.norm_eps, facts.normalization) == ("gelu", 1e-6, "imagenet")
    assert (facts.pre_norm, facts.num_frames, facts.frame_size) == (False, FRAMES, SIDE)
    assert set(start.left_over) == set(OTHERS)
    assert same_tensors(start.state, {f"visual.{name}": t for name, t in random_tower().items()})


def test_lavilas_copy_of_the_file_is_the_same(egovlp: str, tmp_path: Path) -> None:
    state = {**egovlp_state(), "module.logit_scale": torch.zeros(())}
    for theirs, lavilas in LAVILAS_NAMES:
        state = {name.replace(theirs, lavilas): tensor for name, tensor in state.items()}
    torch.save({"state_dict": state}, tmp_path / "copy.pt")
    start, copy = open_start(egovlp), open_start(str(tmp_path / "copy.pt"))
    assert copy.facts == start.facts and same_tensors(copy.state, start.state)
    assert len(copy.left_over) == len(OTHERS) + 1 and "logit_scale" in copy.left_over


def test_a_classifier_computes_what_the_published_tower_does(egovlp: str) -> None:
    start = open_start(egovlp)
    config = resolve_model(model_config(egovlp), start.facts)
    assert (config.pre_norm, config.activation, config.norm_eps) == (False, "gelu", 1e-6)
    model = build_classifier(config, num_classes=5, dropout=0.0, **CLIPS).eval()
    report = apply_start(model, start, temporal_resize="interpolate", normalization="imagenet")
    assert set(report.fresh) == {"fc_cls.weight", "fc_cls.bias"}
    assert set(report.unused) == set(OTHERS) and not report.resized and not report.warnings
    assert len(report.loaded) == len(TOWER)
    clips = wave(2, 3, FRAMES, SIDE, SIDE) + 0.1 * torch.randn(2, 3, FRAMES, SIDE, SIDE)
    expected = plain_features(random_tower(), clips)
    assert expected.std() > 0.1
    assert torch.allclose(model.visual.features(clips), expected, atol=1e-4)
    assert torch.allclose(model(clips), model.fc_cls(expected), atol=1e-4)


def test_a_dual_encoder_gets_a_fresh_text_tower(egovlp: str) -> None:
    start = open_start(egovlp)
    model = build_dual_encoder(resolve_model(model_config(egovlp), start.facts), **CLIPS).eval()
    report = apply_start(model, start, temporal_resize="interpolate")
    fresh = {name for name in model.state_dict() if name.startswith("textual.")}
    assert set(report.fresh) == {*fresh, "visual.image_projection", "logit_scale"}
    clips = wave(2, 3, FRAMES, SIDE, SIDE)
    expected = plain_features(random_tower(), clips) @ model.visual.image_projection
    assert torch.allclose(model.encode_video(clips), functional.normalize(expected, dim=-1), atol=1e-5)


def test_a_training_that_started_so_goes_on_so(egovlp: str, tmp_path: Path) -> None:
    """Our own file, whose run was started without `pre_norm`, and one that `avion-dali weights` wrote."""
    start = open_start(egovlp)
    resolved = resolve_model(model_config(egovlp), start.facts)
    model = build_classifier(resolved, num_classes=5, dropout=0.0, **CLIPS)
    plain = asdict(replace(trained_config(start), model=resolved))
    export_safetensors(model, tmp_path / "own.safetensors", header={"config": plain})
    assert (
        resolve_model(model_config(""), open_start(str(tmp_path / "own.safetensors")).facts).pre_norm is False
    )
    weights.write(start, tmp_path / "converted.safetensors", layout=None)
    converted = open_start(str(tmp_path / "converted.safetensors"))
    config = trained_config(converted)
    assert (config.model.pre_norm, config.model.activation, config.model.encoder) == (
        False,
        "gelu",
        "timesformer",
    )
    assert (config.data.normalization, config.data.num_frames) == ("imagenet", FRAMES)
    assert same_tensors(converted.state, start.state)


def test_the_features_command_takes_the_file_as_it_is(egovlp: str, tmp_path: Path) -> None:
    make_videos.write_video(tmp_path / "a.mp4", frames=30, size=(64, 64))
    output = tmp_path / "f.safetensors"
    arguments = ["features", str(tmp_path / "a.mp4"), "--checkpoint", egovlp, "--output", str(output)]
    options = build_parser().parse_args([*arguments, "--decoder", "cpu-fused", "--workers", "1"])
    assert features.run(options) == 0
    written = load_file(output)["features"]
    assert written.shape == (1, WIDTH) and np.isfinite(written).all() and written.std() > 0.1


def test_a_norm_is_neither_lost_nor_invented(tmp_path: Path) -> None:
    lavila = open_start(save_as(tmp_path / "w.pt", small_dual_encoder("timesformer"), "lavila"))
    facts = replace(lavila.facts, width=WIDTH, layers=LAYERS, patch_size=PATCH)
    assert facts.pre_norm and resolve_model(model_config(""), facts).pre_norm
    with pytest.raises(UserError, match=r"have a norm before their first block; remove model\.pre_norm"):
        resolve_model(replace(model_config(""), pre_norm=False), facts)
    for encoder in ("vit", "videomae"):
        with pytest.raises(UserError, match=r"model\.pre_norm = false is for model\.encoder timesformer"):
            build_video_tower(ModelConfig(encoder=encoder, size="tiny", pre_norm=False), embed_dim=8, **CLIPS)


def test_a_tower_alone_cannot_be_evaluated(egovlp: str) -> None:
    options, here = EvaluateConfig(checkpoint=egovlp, manifest="m"), Distributed(torch.device("cpu"))
    with pytest.raises(UserError, match="contains only a video tower; train or fine-tune from it first"):
        evaluate_checkpoint(options, here)
