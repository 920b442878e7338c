"""What belongs together: models, objectives and evaluations; what a manifest must hold for each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from chunk_folders import chunk_row

from avion_dali.assembly.tasks import BEST_METRIC, build_evaluation, build_model, build_task, class_table
from avion_dali.config import (
    AugmentConfig,
    DataConfig,
    MaxMarginConfig,
    ModelConfig,
    ObjectiveConfig,
    ObjectiveName,
    TrainConfig,
)
from avion_dali.contracts import ClipBatch, UserError
from avion_dali.data.classes import ClassTable
from avion_dali.data.manifest import Manifest, Sample, write_manifest
from avion_dali.engine.distributed import Distributed
from avion_dali.engine.evaluate import freeze_first_frame
from avion_dali.models.classifier import Classifier
from avion_dali.models.dual_encoder import DualEncoder
from avion_dali.models.masked_video import MaskedVideo
from avion_dali.objectives.max_margin import MaxMargin

CPU = torch.device("cpu")
NAMES = get_args(ObjectiveName)
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
def test_every_objective_has_a_model_and_an_evaluation_with_its_metric(
    name: str, tmp_path: Path, rows: list[Sample]
) -> None:
    manifest = manifest_of(tmp_path, rows)
    task = build_task(config_of(name), manifest, CPU)
    assert type(task.model) is MODELS[name]
    model = task.model.eval()
    found = build_evaluation(config_of(name), model, manifest, Distributed())([batch()], None)
    assert np.isfinite(found.metrics()[BEST_METRIC[name]])
    assert found.metrics()["clips"] == 2
    again = build_model(config_of(name), CPU, num_classes=2)
    for key, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key  # drawn from the seed


def test_frozen_frames_change_scores_and_are_not_for_reconstruction(tmp_path: Path, rows: list[Sample]) -> None:
    manifest = manifest_of(tmp_path, rows)
    for name in ("contrastive", "classification", "masked-video"):
        model = build_task(config_of(name), manifest, CPU).model.eval()
        evaluate = build_evaluation(config_of(name), model, manifest, Distributed())
        if name == "masked-video":
            with pytest.raises(UserError, match="frozen_frames"):
                evaluate([batch()], freeze_first_frame)
            continue
        seen: list[torch.Tensor] = []
        evaluate([batch()], lambda frames, seen=seen: seen.append(frames) or freeze_first_frame(frames))
        assert torch.equal(seen[0], batch().frames_BTHWC)


def test_only_the_contrastive_objective_keeps_a_temperature_in_range(
    tmp_path: Path, rows: list[Sample]
) -> None:
    manifest = manifest_of(tmp_path, rows)
    tasks = {name: build_task(config_of(name), manifest, CPU) for name in NAMES}
    assert [name for name, task in tasks.items() if task.after_step] == ["contrastive"]
    with torch.no_grad():
        tasks["contrastive"].model.logit_scale.fill_(9.0)
    tasks["contrastive"].after_step()
    assert float(tasks["contrastive"].model.logit_scale.exp()) == pytest.approx(100.0)


def test_fine_tuning_takes_augmentation_and_grades_where_they_are_used(
    tmp_path: Path, rows: list[Sample]
) -> None:
    manifest = manifest_of(tmp_path, rows)
    augment = AugmentConfig(color_jitter=0.4)
    graded = MaxMarginConfig(loss="symmetric-multi-similarity")
    for settings, has_captions in ((MaxMarginConfig(), False), (graded, True)):
        config = replace(config_of("max-margin", max_margin=settings), augment=augment)
        objective = build_task(config, manifest, CPU).objective
        assert isinstance(objective, MaxMargin)
        assert (objective.captions is not None) is has_captions
        assert objective.augment == augment


def test_what_a_manifest_lacks_is_told_before_the_training(tmp_path: Path, rows: list[Sample]) -> None:
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
            build_task(config_of(name), manifest, CPU)
        build_task(config_of("masked-video"), manifest, CPU)  # needs neither
    assert class_table(manifest_of(tmp_path / "m", rows)).names == ("a", "b")


def test_masked_video_is_refused_for_other_encoders(tmp_path: Path, rows: list[Sample]) -> None:
    config = config_of("masked-video")
    config = replace(config, model=replace(config.model, encoder="vit"))
    with pytest.raises(UserError, match="model.encoder videomae, not vit"):
        build_task(config, manifest_of(tmp_path, rows), CPU)


def test_every_objective_is_in_the_table_of_metrics() -> None:
    assert set(BEST_METRIC) == set(NAMES)


def test_an_attention_kernel_that_cannot_run_is_refused_before_training():
    config = config_of("contrastive")
    with pytest.raises(UserError, match=r"model\.attention = 'xformers' cannot run here"):
        build_model(replace(config, model=replace(config.model, attention="xformers")), CPU)
