"""An encoder known to this file and one line of `ENCODERS` alone: training, files, resuming, evaluation."""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import same_tensors
from torch import Tensor, nn
from torch.nn import functional

from avion_dali.cli.weights import write as write_weights
from avion_dali.config import DataConfig, ModelConfig, ObjectiveConfig, OptimConfig, TrainConfig
from avion_dali.contracts import ClipBatch, UserError
from avion_dali.data.classes import ClassTable
from avion_dali.engine.checkpoint import (
    Checkpoint,
    export_safetensors,
    load_checkpoint,
    restore_model,
    restore_optimizer,
    save_checkpoint,
)
from avion_dali.engine.distributed import Distributed
from avion_dali.engine.optimizers import build_optimizer, parameter_groups
from avion_dali.models.blocks import NamedPatchEmbedding, VideoEncoder, init_linear_layers
from avion_dali.models.classifier import Classifier, build_classifier
from avion_dali.models.dual_encoder import build_dual_encoder
from avion_dali.models.layout import TowerLayout
from avion_dali.models.masked_video import build_masked_video
from avion_dali.models.residual import run_blocks
from avion_dali.models.starting_weights import StartWeights, apply_start, open_start
from avion_dali.models.towers import ENCODERS, resolve_model
from avion_dali.models.videomae import build_blocks
from avion_dali.tasks.evaluation import evaluate
from avion_dali.tasks.recognition import ClassScorer

CLASSES = ClassTable(("x", "y", "z"))


class PooledTower(VideoEncoder):
    """Tubes with learned positions and a learned offset, averaged; its patches are named as VideoMAE's are."""

    tube_frames = 2
    default_activation = "quick_gelu"
    layout = TowerLayout(
        blocks="stack",
        stem=("patch_embed",),
        tokens=("offset",),
        frame_positions=("when",),
        place_positions=("where",),
        patches="patch_embed.proj.weight",
    )

    def __init__(self, config):
        super().__init__(config)
        self.offset = nn.Parameter(torch.empty(1, 1, config.width))
        self.when = nn.Parameter(torch.empty(1, self.time_slots, config.width))
        self.where = nn.Parameter(torch.empty(config.patches_per_frame, config.width))
        self.patch_embed = NamedPatchEmbedding(config.patch_size, config.width, patch_frames=2)
        self.stack = build_blocks(config)
        self.last = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.add_projection()
        init_linear_layers(self)
        for parameter in (self.offset, self.when, self.where):
            nn.init.normal_(parameter, std=0.02)
        self.init_projection()

    @staticmethod
    def init_head(head: nn.Linear) -> None:
        nn.init.constant_(head.weight, 0.125)
        nn.init.zeros_(head.bias)

    def features(self, frames_BCTHW: Tensor) -> Tensor:
        positions_ND = (self.when[0].unsqueeze(1) + self.where).flatten(0, 1)
        x_BND = self.patch_embed(frames_BCTHW) + positions_ND + self.offset
        return self.last(run_blocks(self.stack, x_BND, checkpoint_every=0).mean(dim=1))


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENCODERS, "pooled", PooledTower)


CONFIG = TrainConfig(
    data=DataConfig(num_frames=4, frame_size=32),
    model=resolve_model(ModelConfig(size="tiny")),
    optim=OptimConfig(learning_rate=1e-3, layer_decay=0.5, weight_decay=0.1),
    objective=ObjectiveConfig(name="classification"),
)


def pooled_config() -> TrainConfig:
    """What a run records: the resolved configuration."""
    return replace(CONFIG, model=resolve_model(ModelConfig(encoder="pooled", size="tiny")))


def build(config: TrainConfig, *, seed: int = 0, classes: int = 3) -> Classifier:
    torch.manual_seed(seed)
    data = config.data
    clips = {"num_frames": data.num_frames, "frame_size": data.frame_size}
    return build_classifier(config.model, num_classes=classes, dropout=0.0, **clips)


def optimizer_of(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    groups = parameter_groups(model, config.optim.weight_decay, layer_decay=config.optim.layer_decay)
    return build_optimizer(groups, config.optim)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        clips = torch.randn(3, 3, 4, 32, 32, generator=torch.Generator().manual_seed(step))
        functional.cross_entropy(model(clips), torch.arange(3)).backward()
        optimizer.step()
        optimizer.zero_grad()


def reopened(path: Path, config: TrainConfig) -> tuple[Classifier, StartWeights]:
    """A fresh model with the weights of a file, as evaluations and new runs open it."""
    start, model = open_start(str(path)), build(config, seed=9)
    report = apply_start(model, start, temporal_resize="interpolate")
    assert not report.fresh and not report.unused and not report.resized
    return model, start


def test_what_is_declared_decides_decay_layers_head_and_defaults():
    config = pooled_config()
    assert (config.model.activation, config.model.norm_eps) == ("quick_gelu", 1e-6)
    model = build(config)
    assert (model.fc_cls.weight == 0.125).all()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {
        names[id(parameter)]: (group["weight_decay"], group["lr_scale"])
        for group in optimizer_of(model, config).param_groups
        for parameter in group["params"]
    }
    assert groups.keys() == dict(model.named_parameters()).keys()
    for table in ("offset", "when", "where"):
        assert groups[f"visual.{table}"] == (0.0, 0.5**5)
    assert groups["visual.patch_embed.proj.weight"] == (0.1, 0.5**5)
    assert groups["visual.stack.0.mlp.fc1.weight"] == (0.1, 0.5**4)
    assert groups["visual.stack.3.mlp.fc1.bias"] == (0.0, 0.5)
    assert groups["visual.last.weight"] == (0.0, 1.0) and groups["fc_cls.weight"] == (0.1, 1.0)


def test_frames_and_options_are_checked_by_declaration(monkeypatch):
    config = pooled_config()
    with pytest.raises(UserError, match="clips of 3 frames cannot be divided into tubes of 2"):
        build(replace(config, data=DataConfig(num_frames=3, frame_size=32)))
    for option in ({"patch_dropout": 0.5}, {"pre_norm": False}):
        with pytest.raises(UserError, match="for model.encoder"):
            resolve_model(replace(config.model, **option))
    with pytest.raises(UserError, match="needs model.encoder = videomae, got pooled"):
        build_masked_video(config.model, num_frames=4, frame_size=32, decoder_depth=1)
    monkeypatch.setattr(PooledTower, "can_hide_tubes", True)
    assert build_masked_video(config.model, num_frames=4, frame_size=32, decoder_depth=1).time_slots == 2


def test_a_run_is_resumed_from_its_checkpoint(tmp_path: Path):
    config = pooled_config()
    straight = build(config)
    train(straight, optimizer_of(straight, config), 0, 4)
    model = build(config)
    optimizer = optimizer_of(model, config)
    train(model, optimizer, 0, 2)
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(
        path, Checkpoint(model.state_dict(), optimizer.state_dict(), {}, 2, {}, config=asdict(config))
    )
    facts = open_start(str(path)).facts
    assert (facts.encoder, facts.role, facts.size) == ("pooled", "classifier", "tiny")
    # The user's own configuration leaves open what the run decided.
    left_open = ModelConfig(encoder="pooled", size="tiny")
    assert resolve_model(left_open, facts) == config.model
    with pytest.raises(UserError, match=r"set model\.encoder: pooled"):
        resolve_model(ModelConfig(size="tiny"), facts)
    saved, resumed = load_checkpoint(path), build(config, seed=9)
    continued = optimizer_of(resumed, config)
    restore_model(resumed, saved.model, source="checkpoint")
    restore_optimizer(continued, saved.optimizer, source="checkpoint")
    train(resumed, continued, saved.step, 4)
    assert same_tensors(resumed.state_dict(), straight.state_dict())


def test_weights_are_exported_evaluated_and_written_again(tmp_path: Path):
    config = pooled_config()
    model = build(config)
    train(model, optimizer_of(model, config), 0, 3)
    first, second = tmp_path / "weights.safetensors", tmp_path / "again.safetensors"
    export_safetensors(model, first, header={"config": asdict(config), "classes": CLASSES.names})
    write_weights(open_start(str(first)), second, layout=None)
    expected = probabilities(model)
    assert len(np.unique(expected)) > 3
    for path in (first, second):
        opened, start = reopened(path, TrainConfig.from_plain(open_start(str(path)).config))
        assert start.classes == CLASSES.names and start.facts.num_classes == 3
        assert (start.facts.num_frames, start.facts.frame_size, start.facts.width) == (4, 32, 192)
        np.testing.assert_array_equal(probabilities(opened), expected)
    for layout in ("videomae", "avion-flash", "lavila"):
        with pytest.raises(UserError, match=f"with the pooled encoder cannot be written as {layout}"):
            write_weights(open_start(str(first)), tmp_path / "theirs.safetensors", layout=layout)


def probabilities(model: nn.Module) -> np.ndarray:
    """Scores of an evaluation over two batches."""
    generator = torch.Generator().manual_seed(3)
    batches = [
        ClipBatch(
            torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8, generator=generator),
            tokens_BL=None,
            labels_B=torch.tensor([0, 2]),
            sample_ids=np.array([2 * number, 2 * number + 1]),
            view_ids=np.zeros(2, np.int64),
            valid=np.ones(2, bool),
        )
        for number in range(2)
    ]
    result = evaluate(
        model.eval(),
        batches,
        ClassScorer(CLASSES, normalization="openai"),
        precision="fp32",
        distributed=Distributed(torch.device("cpu")),
    )
    return result.probabilities_NK


def test_declared_positions_fit_other_frames_and_sizes(tmp_path: Path):
    config = pooled_config()
    model, path = build(config), tmp_path / "weights.safetensors"
    with torch.no_grad():
        model.visual.when.fill_(0.25)
        model.visual.where.fill_(0.5)
    export_safetensors(model, path, header={"config": asdict(config)})
    larger = build(replace(config, data=DataConfig(num_frames=8, frame_size=48)), seed=1)
    report = apply_start(larger, open_start(str(path)), temporal_resize="interpolate")
    assert report.resized == (
        "visual.when (1, 2, 192) -> (1, 4, 192)",
        "visual.where (4, 192) -> (9, 192)",
    )
    assert torch.allclose(larger.visual.when, torch.full((1, 4, 192), 0.25), atol=1e-6)
    assert torch.allclose(larger.visual.where, torch.full((9, 192), 0.5), atol=1e-6)


def test_a_classifier_starts_from_the_dual_encoder_of_the_same_encoder(tmp_path: Path):
    config = replace(pooled_config(), objective=ObjectiveConfig(name="contrastive"))
    model = build_dual_encoder(config.model, num_frames=4, frame_size=32)
    export_safetensors(model, tmp_path / "dual.safetensors", header={"config": asdict(config)})
    start, classifier = open_start(str(tmp_path / "dual.safetensors")), build(config)
    assert (start.facts.role, start.facts.embed_dim, start.facts.context_length) == ("dual-encoder", 256, 77)
    report = apply_start(classifier, start, temporal_resize="interpolate")
    assert set(report.fresh) == {"fc_cls.weight", "fc_cls.bias"}
    assert torch.equal(classifier.visual.where, model.visual.where)
    with pytest.raises(UserError, match="are those of a pooled encoder, the model has vit"):
        apply_start(build(CONFIG), start, temporal_resize="interpolate")


def test_a_file_of_an_encoder_that_is_not_known_is_refused_by_its_name(tmp_path, monkeypatch):
    """Its names look like VideoMAE's, and its header decides."""
    config, path = pooled_config(), tmp_path / "weights.safetensors"
    export_safetensors(build(config), path, header={"config": asdict(config)})
    monkeypatch.delitem(ENCODERS, "pooled")
    with pytest.raises(
        UserError,
        match=r"weights\.safetensors.*'pooled' is not an encoder; choose one of vit, timesformer, videomae",
    ):
        open_start(str(path))
