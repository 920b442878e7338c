"""What belongs together: models, objectives and evaluations; what a manifest must hold for each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chunk_folders import chunk_row

from avion_dali.assembly.resolve import ResolvedRun, require_trainable, resolve
from avion_dali.assembly.run_model import build_model
from avion_dali.config import (
    AugmentConfig,
    DataConfig,
    MaxMarginConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    TrainConfig,
)
from avion_dali.contracts import ClipBatch, UserError
from avion_dali.data.classes import ClassTable
from avion_dali.data.manifest import Manifest, Sample, write_manifest
from avion_dali.engine.distributed import Distributed
from avion_dali.models.classifier import Classifier
from avion_dali.models.dual_encoder import DualEncoder
from avion_dali.models.masked_video import MaskedVideo
from avion_dali.objectives.max_margin import MaxMargin
from avion_dali.tasks.evaluation import evaluate, freeze_first_frame
from avion_dali.tasks.requirements import class_table
from avion_dali.tasks.table import TASKS, find_task

NAMES = tuple(TASKS)
MODELS = dict(zip(NAMES, (DualEncoder, DualEncoder, Classifier, MaskedVideo), strict=True))


def config_of(name: str, **more: Any) -> TrainConfig:
    encoder = "videomae" if name == "masked-video" else "vit"
    return TrainConfig(
        data=DataConfig(num_frames=2, frame_size=32),
        model=ModelConfig(encoder=encoder, size="tiny", embed_dim=16, context_length=8),
        objective=ObjectiveConfig(name=name, **more),
    )


@pytest.fixture
def rows() -> list[Sample]:
    """Two rows with text and class."""
    return [Sample(0, 1, i, i + 1, (f"cut {i}",), ((49406, 5 + i, 49407),), label=i) for i in range(2)]


def manifest_of(folder: Path, rows: list[Sample], *, names: tuple[str, ...] = ("a", "b")) -> Manifest:
    classes = ClassTable(names) if names else None
    write_manifest(folder, chunk_root="/chunks", chunks=[chunk_row("v", 0)], samples=rows, classes=classes)
    return Manifest(folder)


def checked(config: TrainConfig, manifest: Manifest) -> ResolvedRun:
    """What a training does before it builds anything."""
    run = resolve(config, Distributed())
    run.task.check(run.config, manifest)
    return run


def model_of(run: ResolvedRun, manifest: Manifest) -> torch.nn.Module:
    return build_model(run, num_classes=len(run.task.class_names(manifest)))


def batch(texts: int = 2) -> ClipBatch:
    rng = np.random.default_rng(0)
    tokens = torch.zeros(texts, 8, dtype=torch.int64)
    tokens[:, :3] = torch.tensor([49406, 5, 49407])
    return ClipBatch(
        frames_BTHWC=torch.from_numpy(rng.integers(0, 256, (texts, 2, 32, 32, 3), dtype=np.uint8)),
        tokens_BL=tokens,
        labels_B=torch.arange(texts),
        sample_ids=np.arange(texts),
        view_ids=np.zeros(texts, dtype=np.int64),
        valid=np.ones(texts, dtype=bool),
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_task_has_a_model_an_objective_and_an_evaluation_with_its_metric(
    name: str, tmp_path: Path, rows: list[Sample]
) -> None:
    manifest = manifest_of(tmp_path, rows)
    run = checked(config_of(name), manifest)
    model = model_of(run, manifest).eval()
    assert type(model) is MODELS[name]
    assert hasattr(run.task.build_objective(run.config, model, manifest), "couples_samples")
    scorer = run.task.build_scorer(run.config, model, manifest)
    found = evaluate(model, [batch()], scorer, precision="fp32", distributed=Distributed())
    assert np.isfinite(found.metrics()[run.task.best_metric])
    assert found.metrics()["clips"] == 2
    for key, value in model_of(run, manifest).state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key  # drawn from the seed


def test_frozen_frames_reach_the_model(tmp_path: Path, rows: list[Sample]) -> None:
    manifest = manifest_of(tmp_path, rows)
    for name in ("contrastive", "classification"):
        run = checked(config_of(name), manifest)
        model = model_of(run, manifest).eval()
        scorer, seen = run.task.build_scorer(run.config, model, manifest), []

        def freeze(frames: torch.Tensor, seen: list[torch.Tensor] = seen) -> torch.Tensor:
            seen.append(frames)
            return freeze_first_frame(frames)

        on = {"precision": "fp32", "distributed": Distributed()}
        still, frozen = batch(), batch()
        still.frames_BTHWC = freeze_first_frame(still.frames_BTHWC)
        expected = evaluate(model, [still], scorer, **on).metrics()
        assert evaluate(model, [frozen], scorer, transform=freeze, **on).metrics() == expected
        assert torch.equal(seen[0], batch().frames_BTHWC)
    assert [name for name in NAMES if not find_task(name).has_frozen_control] == ["masked-video"]
    assert {name: find_task(name).embeds_as for name in NAMES if find_task(name).embeds_as} == {
        "masked-video": "classification"
    }


def test_only_the_contrastive_objective_keeps_a_temperature_in_range(
    tmp_path: Path, rows: list[Sample]
) -> None:
    manifest = manifest_of(tmp_path, rows)
    for name, most in (("contrastive", 100.0), ("max-margin", np.exp(9.0))):
        run = checked(config_of(name), manifest)
        model = model_of(run, manifest)
        with torch.no_grad():
            model.logit_scale.fill_(9.0)
        run.task.after_step(model)
        assert float(model.logit_scale.exp()) == pytest.approx(most)


def test_fine_tuning_takes_augmentation_and_grades_where_they_are_used(
    tmp_path: Path, rows: list[Sample]
) -> None:
    manifest = manifest_of(tmp_path, rows)
    augment = AugmentConfig(color_jitter=0.4)
    graded = MaxMarginConfig(loss="symmetric-multi-similarity")
    for settings, has_captions in ((MaxMarginConfig(), False), (graded, True)):
        run = checked(replace(config_of("max-margin", max_margin=settings), augment=augment), manifest)
        objective = run.task.build_objective(run.config, model_of(run, manifest), manifest)
        assert isinstance(objective, MaxMargin)
        assert (objective.captions is not None) is has_captions
        assert objective.augment == augment


def test_what_a_manifest_lacks_is_said_before_the_training(tmp_path: Path, rows: list[Sample]) -> None:
    without_label = [rows[0], replace(rows[1], label=-1)]
    without_text = [rows[0], replace(rows[1], texts=(), tokens=())]
    without_classes = [replace(row, label=-1) for row in rows]
    cases = (
        ("classification", without_label, ("a", "b"), "1 of 2 rows have no label"),
        ("classification", without_classes, (), "no class labels"),
        ("contrastive", without_text, ("a", "b"), "1 of 2 rows have no text"),
        ("max-margin", without_text, ("a", "b"), "1 of 2 rows have no text"),
    )
    for number, (name, samples, names, message) in enumerate(cases):
        manifest = manifest_of(tmp_path / str(number), samples, names=names)
        with pytest.raises(UserError, match=message):
            checked(config_of(name), manifest)
        checked(config_of("masked-video"), manifest)  # needs neither
    assert class_table(manifest_of(tmp_path / "m", rows)).names == ("a", "b")


def test_masked_video_is_refused_for_other_encoders(tmp_path: Path, rows: list[Sample]) -> None:
    config = config_of("masked-video")
    config = replace(config, model=replace(config.model, encoder="vit"))
    with pytest.raises(UserError, match="model.encoder = videomae, got vit"):
        model_of(resolve(config, Distributed()), manifest_of(tmp_path, rows))


def test_an_unknown_objective_is_refused_with_those_there_are() -> None:
    with pytest.raises(UserError, match=r"'contrasitve' is not an objective.* contrastive, max-margin"):
        resolve(config_of("contrasitve"), Distributed())


def test_an_attention_kernel_that_cannot_run_is_refused_before_training() -> None:
    config = config_of("contrastive")
    with pytest.raises(UserError, match=r"model\.attention = 'xformers' cannot run here"):
        resolve(replace(config, model=replace(config.model, attention="xformers")), Distributed())


def with_model(config: TrainConfig, **options: object) -> TrainConfig:
    return replace(config, model=replace(config.model, **options))


def test_tokens_in_bf16_need_a_run_in_bf16() -> None:
    config = with_model(config_of("contrastive"), residual_dtype="bf16")
    run = resolve(config, Distributed())
    with pytest.raises(
        UserError, match=r"residual_dtype = bf16 needs run.precision = bf16, .* computes in fp32"
    ):
        require_trainable(run)
    require_trainable(replace(run, precision="bf16"))


def test_mlps_in_fp8_are_refused_where_they_cannot_train() -> None:
    config = with_model(config_of("contrastive"), mlp_dtype="fp8", size="vit_l14")
    run = resolve(config, Distributed())  # a checkpoint of such a training can be evaluated anywhere
    with pytest.raises(UserError, match=r"mlp_dtype = fp8 needs run.precision = bf16, .* computes in fp32"):
        require_trainable(run)
    with pytest.raises(UserError, match=r"mlp_dtype = fp8 cannot be used: it needs a GPU"):
        require_trainable(replace(run, precision="bf16"))
    sharded = replace(config, run=replace(config.run, sharding="shard"))
    with pytest.raises(UserError, match=r"mlp_dtype = fp8 and run.sharding = shard do not go together"):
        require_trainable(resolve(sharded, Distributed(world_size=2)))


def test_sharded_compiled_and_recomputed_blocks_are_refused() -> None:
    config = with_model(config_of("contrastive"), compile=True, checkpoint_every=1)
    sharded = replace(config, run=replace(config.run, sharding="shard"))
    two, one = Distributed(world_size=2), Distributed()
    with pytest.raises(
        UserError, match=r"do not go together.*model.checkpoint_every = 0 or model.compile = false"
    ):
        require_trainable(resolve(sharded, two))
    allowed = (config, two), (sharded, one), (with_model(sharded, compile=False), two)
    for settings, ranks in (*allowed, (with_model(sharded, checkpoint_every=0), two)):
        require_trainable(resolve(settings, ranks))


def test_a_resolved_run_leaves_nothing_open_and_says_what_was_decided() -> None:
    config = replace(config_of("contrastive"), optim=OptimConfig(global_batch=8, micro_batch=2))
    run = resolve(config, Distributed(world_size=2))
    model = run.config.model
    assert "auto" not in (model.activation, model.attention, run.decoder.name, run.precision)
    assert (model.norm_eps, run.accum_steps) == (1e-6, 2)
    text = "\n".join([*run.lines(), *run.batch_lines()])
    for part in (
        "decoder: cpu-fused",
        "attention sdpa (flash)",
        "fp32 on cpu",
        "8 clips = 2 ranks x 2 clips x 2",
    ):
        assert part in text


def test_memory_is_planned_for_compiled_blocks_of_any_mode() -> None:
    model = {"compile": True, "compile_mode": "max-autotune-no-cudagraphs", "checkpoint_every": "auto"}
    run = resolve(with_model(config_of("contrastive"), **model), Distributed())
    assert run.config.model.checkpoint_every == 0
    assert run.config.model.compile_mode == "max-autotune-no-cudagraphs"
