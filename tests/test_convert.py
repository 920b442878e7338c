import json
import math
from pathlib import Path

import pytest
import torch
from golden_fill import TOWERS, close, filled, shape_table, wave
from small_models import (
    same_tensors,
    small_classifier,
    small_dual_encoder,
    small_masked_video,
    small_open_clip,
    written,
)
from test_presets import TABLES, expand
from torch import nn

from avion_dali.config import ModelConfig
from avion_dali.contracts import UserError
from avion_dali.models.blocks import VideoTowerConfig
from avion_dali.models.classifier import Classifier, build_classifier
from avion_dali.models.convert import from_ours, identify, remap_avion_keys, to_ours
from avion_dali.models.convert_lavila import vit_to_timesformer
from avion_dali.models.dual_encoder import build_dual_encoder
from avion_dali.models.masked_video import MaskedVideo, build_masked_video
from avion_dali.models.presets import PRESETS
from avion_dali.models.timesformer import TimeSformer
from avion_dali.models.towers import build_video_tower
from avion_dali.models.videomae import VideoMAETower
from avion_dali.models.vit import VideoTower
from avion_dali.models.weight_facts import LAYOUTS

FOLDER = Path(__file__).parent
GOLDEN = json.loads((FOLDER / "golden_clip_tiny.json").read_text())
PLAIN = json.loads((FOLDER / "videomae_plain_shapes.json").read_text())


def fill(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """The deterministic weights that the golden outputs were computed with."""
    weights = {key: filled(key, torch.Size(shape)) for key, shape in shapes.items()}
    return {**weights, "logit_scale": torch.tensor(math.log(1 / 0.07))} if "logit_scale" in weights else weights


@pytest.mark.parametrize("data_parallel", [False, True])
@pytest.mark.parametrize("style", ["clip_tiny_fast_flash", "clip_tiny_conv_mha"])
def test_golden_vectors_of_both_avion_styles(style, data_parallel):
    golden = GOLDEN[style]
    weights = fill(golden["state_dict"])
    if data_parallel:
        weights = {f"module.{key}": weight for key, weight in weights.items()}
    assert identify(weights) == "avion"
    state, left_over = to_ours(weights, "avion")
    assert not left_over
    model = small_dual_encoder()
    model.load_state_dict(state, strict=True)
    frames = wave(2, 3, 4, 32, 32)
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
        assert close(ours, golden[name]), name
    assert float(scale[0]) == pytest.approx(golden["logit_scale"], rel=1e-6)


CLASSIFIER_LOGITS = [-0.32629, -1.605247, -1.868286, -0.944197]


def test_golden_vector_of_avions_classifier():
    golden = GOLDEN["clip_tiny_fast_flash"]
    shapes = {
        key: shape
        for key, shape in golden["state_dict"].items()
        if key.startswith("visual.") and key != "visual.image_projection"
    }
    weights = fill({**shapes, "fc_cls.weight": [5, 64], "fc_cls.bias": [5]})
    state, _ = to_ours(weights, identify(weights))
    model = small_classifier()
    model.load_state_dict(state, strict=True)
    assert close(model(wave(2, 3, 4, 32, 32)).flatten()[:4], CLASSIFIER_LOGITS)


def flash_videomae(shapes: dict[str, tuple[int, ...]], width: int) -> dict[str, torch.Tensor]:
    """AVION's VideoMAE parameters of our shapes, filled by AVION's names."""
    weights = {}
    for name, shape in shapes.items():
        key = name.replace("attn.qkv", "attn.Wqkv").replace("attn.proj", "attn.out_proj")
        key = key.removeprefix("visual.").replace("fc_cls", "head")
        weights[key] = filled(key, torch.Size((width, 1536) if "patch_embed.proj.weight" in key else shape))
    return weights


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_golden_vectors_of_avions_videomae():
    config = VideoTowerConfig(32, 16, 16, 48, 2, 4, None)
    masked = MaskedVideo(config, decoder_depth=1).eval()
    weights = flash_videomae(shapes_of(masked), 48)
    assert identify(weights) == "videomae"
    masked.load_state_dict(to_ours(weights, "videomae")[0], strict=True)
    masks = torch.tensor([[True, False, True, True]]).repeat(1, 8)
    predicted = masked(wave(1, 3, 16, 32, 32), masks).flatten()
    assert close(predicted[:8], TOWERS["videomae_pretrain_tiny"]["out_first8"])
    assert close(predicted[-8:], TOWERS["videomae_pretrain_tiny"]["out_last8"])
    tuned = Classifier(VideoMAETower(config), 5).eval()
    weights = flash_videomae(shapes_of(tuned), 48)
    assert identify(weights) == "videomae"
    tuned.load_state_dict(to_ours(weights, "videomae")[0], strict=True)
    assert close(tuned(wave(2, 3, 16, 32, 32)), TOWERS["videomae_finetune_tiny"]["logits"])


@pytest.mark.parametrize("prefix", ["", "module.visual."])
def test_golden_vector_of_lavilas_video_tower(prefix):
    tower = TimeSformer(VideoTowerConfig(32, 8, 4, 64, 2, 4, None, activation="quick_gelu")).eval()
    weights = {prefix + key: filled(key, torch.Size(shape)) for key, shape in shapes_of(tower).items()}
    assert identify(weights) == "lavila"
    state, _ = to_ours(weights, "lavila")
    tower.load_state_dict({name.removeprefix("visual."): tensor for name, tensor in state.items()}, strict=True)
    assert close(tower(wave(2, 3, 4, 32, 32)).flatten()[:32], TOWERS["timesformer_tiny"]["out"])


def on_meta(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def plain_table(name: str) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for key, shape in PLAIN[name]["shapes"].items():
        blocks = range(PLAIN[name]["layers"][key.split(".*")[0]]) if ".*." in key else range(1)
        shapes.update({key.replace("*", str(i)): tuple(shape) for i in blocks})
    return shapes


def real_model(table: str) -> torch.nn.Module:
    with torch.device("meta"):
        if table.startswith("CLIP"):
            size = {"B": "vit_b16", "L": "vit_l14"}[table[8]] + ("_336" if "336" in table else "")
            return build_dual_encoder(ModelConfig(size=size), num_frames=4, frame_size=PRESETS[size].image_size)
        videomae = ModelConfig(encoder="videomae")
        if table.startswith("VIDEOMAE"):
            return build_masked_video(videomae, num_frames=16, frame_size=224, decoder_depth=4)
        return build_classifier(videomae, num_classes=400, num_frames=16, frame_size=224, dropout=0.0)


REAL_TABLES = {
    **{name: ({k: tuple(w.shape) for k, w in expand(table).items()}) for name, table in TABLES.items()},
    **{name: plain_table(name) for name in PLAIN},
    **{
        name: shape_table(name)
        for name in ("VIDEOMAE_VITB16_dec4_flash_channellast", "vit_base_patch16_224_k400_flash_channellast")
    },
}


@pytest.mark.parametrize("table", REAL_TABLES)
def test_every_published_name_has_its_place_both_ways(table):
    theirs = REAL_TABLES[table]
    weights = on_meta(theirs)
    family = identify(weights)
    assert family == ("avion" if table.startswith("CLIP") else "videomae")
    state, left_over = to_ours(weights, family)
    assert not left_over
    ours = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert ours == shapes_of(real_model(table))
    flash = "flash" in table
    layout = "avion-flash" if flash else "avion-plain" if family == "avion" else "videomae"
    encoder = "vit" if family == "avion" else "videomae"
    theirs_again = from_ours(state, layout, encoder=encoder)
    back = {name: tuple(tensor.shape) for name, tensor in theirs_again.items()}
    assert back == theirs


def test_every_name_of_lavilas_video_tower_has_its_place():
    theirs = shape_table("LaViLa_TSF_B_visual_T4")
    state, left_over = to_ours(on_meta(theirs), "lavila")
    with torch.device("meta"):
        tower = build_video_tower(
            ModelConfig(encoder="timesformer"), num_frames=4, frame_size=224, embed_dim=None
        )
    assert not left_over
    ours = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert ours == {f"visual.{name}": shape for name, shape in shapes_of(tower).items()}


MODELS = {
    "avion-flash": small_dual_encoder,
    "avion-plain": small_classifier,
    "open_clip": lambda: small_dual_encoder(num_frames=1),
    "lavila": lambda: small_dual_encoder("timesformer"),
    "videomae": small_masked_video,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_conversions_are_inverses(layout):
    model = MODELS[layout]()
    state = model.state_dict()
    if layout == "videomae":  # which has no biases of keys
        for name, tensor in state.items():
            if name.endswith("qkv.bias"):
                tensor[tensor.shape[0] // 3 : 2 * tensor.shape[0] // 3] = 0
    theirs = written(model, layout)
    assert layout == "avion-plain" or theirs.keys() != state.keys()
    family = identify(theirs)
    assert same_tensors(to_ours(theirs, family)[0], state)
    model.load_state_dict(to_ours(theirs, family)[0])
    assert same_tensors(written(model, layout), theirs)


@pytest.mark.parametrize(
    "make", [small_masked_video, lambda: small_classifier("videomae")], ids=["masked", "classifier"]
)
def test_avions_videomae_style_keeps_biases_of_keys(make):
    state = make().state_dict()
    theirs = written(make(), "avion-flash")
    assert any(name.endswith("attn.Wqkv.bias") for name in theirs)
    assert same_tensors(to_ours(theirs, identify(theirs))[0], state)


def test_a_bias_of_keys_changes_nothing():
    model = small_classifier("videomae")
    clips = wave(2, 3, 4, 32, 32)
    before = model(clips)
    state = to_ours(written(model, "videomae"), "videomae")[0]
    assert not torch.equal(state["visual.blocks.0.attn.qkv.bias"], model.visual.blocks[0].attn.qkv.bias)
    model.load_state_dict(state)
    assert torch.allclose(model(clips), before, atol=1e-5)


def test_frame_positions_do_not_go_to_open_clip():
    model = small_dual_encoder()
    with pytest.raises(UserError, match="cannot store 4 frame positions"):
        written(model, "open_clip")
    nn.init.zeros_(model.visual.temporal_embedding)
    assert "visual.temporal_embedding" not in written(model, "open_clip")


@pytest.mark.parametrize(
    ("make", "layout"),
    [
        (small_dual_encoder, "lavila"),
        (small_classifier, "open_clip"),
        (lambda: small_dual_encoder("timesformer"), "avion-flash"),
        (small_masked_video, "lavila"),
    ],
)
def test_models_that_a_project_lacks_are_refused(make, layout):
    with pytest.raises(UserError, match=f"cannot be written as {layout}"):
        written(make(), layout)


@pytest.mark.parametrize("kind", ["CLIP", "CustomTextCLIP"])
def test_open_clips_own_model_gives_the_same_vectors(kind):
    theirs = small_open_clip(kind, quick_gelu=True)
    weights = {"module." + name: tensor for name, tensor in theirs.state_dict().items()}
    assert identify(weights) == "open_clip"
    state, left_over = to_ours(weights, "open_clip")
    assert set(left_over) <= {"attn_mask", "text.attn_mask"}
    model = small_dual_encoder(num_frames=1, activation="quick_gelu", norm_eps=1e-5)
    model.load_state_dict(state, strict=True)
    frames = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    tokens = torch.randint(1, 99, (3, 12), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.allclose(model.visual(frames[:, :, None]), theirs.encode_image(frames), atol=1e-5)
        assert torch.allclose(model.textual(tokens), theirs.encode_text(tokens), atol=1e-5)


def test_openais_constants_are_left_over():
    weights = {"visual.conv1.weight": torch.zeros(2, 3, 2, 2), "text_projection": torch.zeros(2, 2)}
    state, left_over = to_ours({**weights, "context_length": torch.tensor(77)}, "open_clip")
    assert list(left_over) == ["context_length"] and set(state) == {
        "visual.conv1.weight",
        "textual.text_projection",
    }


def test_an_image_vit_as_timesformer_gives_the_same_vector_of_a_frame():
    config = VideoTowerConfig(32, 8, 1, 64, 2, 4, 16, activation="quick_gelu", norm_eps=1e-5)
    torch.manual_seed(0)
    vit, timesformer = VideoTower(config).eval(), TimeSformer(config).eval()
    state = vit_to_timesformer({f"visual.{name}": tensor for name, tensor in vit.state_dict().items()})
    ours = {name.removeprefix("visual."): tensor for name, tensor in state.items()}
    report = timesformer.load_state_dict(ours, strict=False)
    assert not report.unexpected_keys
    assert all(
        ".timeattn." in name or ".norm3." in name or name == "temporal_embed" for name in report.missing_keys
    )
    clips = wave(2, 3, 1, 32, 32)
    assert torch.allclose(timesformer(clips), vit(clips), atol=1e-5)


def test_egovlp_gives_its_video_tower_and_names_the_rest():
    tower = small_dual_encoder("timesformer").visual.state_dict()
    weights = {f"module.video_model.{name}": tensor for name, tensor in tower.items()}
    others = ("text_model.transformer.layer.0.ffn.lin1.weight", "vid_proj.0.weight", "txt_proj.1.bias")
    weights |= {f"module.{name}": torch.zeros(1) for name in others}
    assert identify(weights) == "egovlp"
    state, left_over = to_ours(weights, "egovlp")
    assert same_tensors(state, {f"visual.{name}": tensor for name, tensor in tower.items()})
    assert set(left_over) == set(others) and "DistilBERT" in left_over[others[0]]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("textual.transformer.layer.0.attention.q_lin.weight", "DistilBERT.*CLIP_OPENAI_TIMESFORMER_BASE"),
        ("text_decoder.transformer.wte.weight", "narrator.*CLIP_OPENAI_TIMESFORMER_BASE"),
    ],
)
def test_lavilas_other_models_are_refused_by_name(name, message):
    weights = {"visual.blocks.0.timeattn.qkv.bias": torch.zeros(1), name: torch.zeros(1)}
    with pytest.raises(UserError, match=message):
        to_ours(weights, identify(weights))


def test_one_of_several_heads_is_left_over():
    weights = {"visual.blocks.0.timeattn.qkv.bias": torch.zeros(1), "fc_cls.0.weight": torch.zeros(1)}
    assert list(to_ours(weights, "lavila")[1]) == ["fc_cls.0.weight"]


def test_unknown_names_are_shown():
    with pytest.raises(UserError, match=r"layer1\.0\.conv1.*not those of AVION"):
        identify({"layer1.0.conv1.weight": torch.zeros(1)})


def test_remap_leaves_our_own_names_alone_and_shares_memory():
    weights = small_dual_encoder().state_dict()
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


def test_videomae_tubes_are_cut_channels_first():
    weight = torch.arange(1.0 * 3 * 2 * 4).reshape(1, 24)
    state, _ = to_ours({"patch_embed.proj.weight": weight}, "videomae")
    tubes = state["visual.patch_embed.proj.weight"]
    assert tubes.shape == (1, 3, 2, 2, 2)
    assert torch.equal(tubes[0, 1, 0].flatten(), torch.arange(8.0, 12.0))


def test_damaged_videomae_files_are_refused():
    with pytest.raises(UserError, match="needs q_bias and v_bias"):
        to_ours({"blocks.0.attn.q_bias": torch.zeros(4)}, "videomae")
    with pytest.raises(UserError, match="mixes two styles"):
        both = {"blocks.0.attn.Wqkv.weight": torch.zeros(1), "blocks.0.attn.qkv.weight": torch.zeros(1)}
        to_ours(both, "videomae")
    with pytest.raises(UserError, match="tubes of two RGB frames"):
        to_ours({"patch_embed.proj.weight": torch.zeros(4, 20)}, "videomae")


def test_an_encoder_saved_alone_is_read():
    state = small_masked_video().state_dict()
    alone = {name: tensor for name, tensor in state.items() if name.startswith("encoder.")}
    del alone["encoder.norm.weight"], alone["encoder.norm.bias"]
    ours, _ = to_ours(alone, identify(alone))
    assert set(ours) == {"visual." + name.removeprefix("encoder.") for name in alone}
