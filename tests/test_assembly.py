"""A run's configuration: what weights and checkpoints decide, what an evaluation changes, what must stay."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chunk_folders import chunk_row, sample_row
from small_models import save_as, small_classifier

from avion_dali.assembly.class_agreement import require_same_classes
from avion_dali.assembly.evaluators import evaluate_checkpoint, evaluation_config, trained_config
from avion_dali.assembly.training import resume_facts, training
from avion_dali.cli.weights import write as write_weights
from avion_dali.config import (
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from avion_dali.contracts import UserError
from avion_dali.data.classes import ClassTable
from avion_dali.data.manifest import Manifest, write_manifest
from avion_dali.engine.distributed import Distributed
from avion_dali.models.classifier import build_classifier
from avion_dali.models.starting_weights import open_start

TRAINED = TrainConfig(
    output_dir="runs/x",
    data=DataConfig(num_frames=16, eval_clips=2, eval_crops=3, workers=7),
    model=ModelConfig(temporal_resize="truncate"),
    run=RunConfig(precision="bf16"),
)


def manifest_of(folder: Path, names: tuple[str, ...] = (), *, end: float = 2.0) -> Manifest:
    rows = [replace(sample_row(i, i + end), label=0 if names else -1) for i in range(2)]
    classes = ClassTable(names) if names else None
    write_manifest(folder, chunk_root="/chunks", chunks=[chunk_row("v", 0)], samples=rows, classes=classes)
    return Manifest(folder)


def test_an_evaluation_changes_what_it_says_and_nothing_else() -> None:
    plain = evaluation_config(TRAINED, EvaluateConfig("w", workers=2, micro_batch=5, decoder="dali"))
    assert plain == replace(
        TRAINED,
        decoder="dali",
        data=replace(TRAINED.data, workers=2),
        model=replace(TRAINED.model, temporal_resize="interpolate"),
        optim=replace(TRAINED.optim, micro_batch=5),
    )
    changed = evaluation_config(
        TRAINED, EvaluateConfig("w", num_frames=4, eval_clips=5, eval_crops=1, output_dir="elsewhere")
    )
    assert (changed.data.num_frames, changed.data.eval_clips, changed.data.eval_crops) == (4, 5, 1)
    assert changed.output_dir == "elsewhere"
    half = replace(TRAINED, run=RunConfig(precision="fp16"))
    assert evaluation_config(half, EvaluateConfig("w")).run.precision == "auto"


def test_what_may_not_change_in_a_resumed_run_is_plain_and_complete(tmp_path: Path) -> None:
    one, other = manifest_of(tmp_path / "a"), manifest_of(tmp_path / "b", ("x", "y"))
    facts = resume_facts(TRAINED, one, eval_manifest=None)
    assert json.loads(json.dumps(facts)) == facts
    assert resume_facts(TRAINED, one, eval_manifest=other) != facts
    assert resume_facts(TRAINED, other, eval_manifest=None)["classes"] != facts["classes"]
    for changed in (
        replace(TRAINED, data=replace(TRAINED.data, stride=2)),
        replace(TRAINED, data=replace(TRAINED.data, repeats=2)),
        replace(TRAINED, data=replace(TRAINED.data, sampling="dense")),
        replace(TRAINED, model=replace(TRAINED.model, norm_eps=1e-5)),
        replace(TRAINED, objective=ObjectiveConfig(name="max-margin")),
    ):
        assert resume_facts(changed, one, eval_manifest=None) != facts
    same = replace(TRAINED, data=replace(TRAINED.data, workers=1), optim=OptimConfig(epochs=9))
    assert resume_facts(same, one, eval_manifest=None) == facts


def test_classes_are_compared_by_name_and_order(tmp_path: Path) -> None:
    one = manifest_of(tmp_path / "a", ("x", "y"))
    require_same_classes(one, manifest_of(tmp_path / "b", ("x", "y"), end=3.0))
    for number, names in enumerate((("y", "x"), ("x", "y", "z"))):
        with pytest.raises(UserError, match="--classes-from .* --class-names"):
            require_same_classes(one, manifest_of(tmp_path / str(number), names))
    bare = manifest_of(tmp_path / "bare")
    for pair in ((one, bare), (bare, one)):
        with pytest.raises(UserError, match="bare has no class labels"):
            require_same_classes(*pair)


def test_a_retrieval_training_does_not_mind_the_classes_of_its_manifests(tmp_path: Path) -> None:
    """They are for another task; only the order of rows counts."""
    config = TrainConfig(
        output_dir=str(tmp_path / "run"),
        data=DataConfig(num_frames=2, frame_size=32, workers=1),
        model=ModelConfig(size="tiny", embed_dim=16, context_length=8),
        optim=OptimConfig(global_batch=2, micro_batch=2),
    )
    folders = [str(manifest_of(tmp_path / n, names).folder) for n, names in (("a", ("x", "y")), ("b", ()))]
    data = replace(config.data, train_manifest=folders[0], eval_manifest=folders[1])
    context = training(replace(config, decoder="cpu-fused", data=data), Distributed())
    loop = context.__enter__()
    assert (loop.step, loop.last_step) == (0, 5)
    assert loop.settings.config["model"]["activation"] == "gelu"
    context.__exit__(None, None, None)
    assert not (tmp_path / "run" / "weights.safetensors").exists()  # nothing was trained to its end
    recognition = replace(config, data=data, objective=ObjectiveConfig(name="classification"))
    with pytest.raises(UserError, match="b has no class labels"):
        training(recognition, Distributed()).__enter__()


def test_weights_of_others_tell_what_they_can(tmp_path: Path) -> None:
    classifier = build_classifier(
        ModelConfig(encoder="videomae", size="tiny"), num_classes=4, num_frames=16, frame_size=64, dropout=0.0
    )
    config = trained_config(open_start(save_as(tmp_path / "w.pt", classifier, "videomae", key="module")))
    found = (config.objective.name, config.model.encoder, config.model.size)
    assert found == ("classification", "videomae", "tiny")
    assert (config.data.normalization, config.output_dir) == ("imagenet", "runs/evaluate")
    odd = open_start(save_as(tmp_path / "odd.pt", small_classifier("videomae"), "videomae", key="module"))
    with pytest.raises(UserError, match=r"odd.pt has width .* matches no model.size \(tiny"):
        trained_config(odd)  # of no known size


def test_a_checkpoint_without_manifest_and_a_file_that_is_none_are_told(tmp_path: Path) -> None:
    model = build_classifier(
        ModelConfig(encoder="videomae", size="tiny"), num_classes=4, num_frames=16, frame_size=64, dropout=0.0
    )
    path = save_as(tmp_path / "w.pt", model, "videomae", key="module")
    with pytest.raises(UserError, match="give --manifest"):
        evaluate_checkpoint(EvaluateConfig(path), Distributed())
    with pytest.raises(UserError, match="the model has 4 classes"):
        folder = manifest_of(tmp_path / "m", ("x", "y")).folder
        evaluate_checkpoint(EvaluateConfig(path, manifest=str(folder)), Distributed())
    (tmp_path / "no.pt").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"no\.pt"):
        evaluate_checkpoint(EvaluateConfig(str(tmp_path / "no.pt")), Distributed())


@pytest.mark.parametrize("dtype", ["default", "fp8"])
def test_mlps_are_converted_for_trainings_in_fp8(dtype: str, tmp_path: Path, monkeypatch) -> None:
    converted: list[object] = []
    monkeypatch.setattr("avion_dali.assembly.training.convert_mlps", converted.append)
    monkeypatch.setattr("avion_dali.assembly.resolve.require_fp8", lambda *_, **__: None)
    manifest = manifest_of(tmp_path / "m", ("x", "y"))
    config = TrainConfig(
        output_dir=str(tmp_path / "run"),
        decoder="cpu-fused",
        data=DataConfig(num_frames=2, frame_size=32, workers=1, train_manifest=str(manifest.folder)),
        model=ModelConfig(size="tiny", mlp_dtype=dtype),
        optim=OptimConfig(global_batch=2, micro_batch=2),
        objective=ObjectiveConfig(name="classification"),
        run=RunConfig(precision="bf16"),
    )
    with training(config, Distributed()) as loop:
        assert converted == ([loop.model] if dtype == "fp8" else [])


def test_weights_know_their_classes_wherever_their_training_manifest_is(tmp_path: Path) -> None:
    """A manifest that numbers the same classes otherwise is refused, not scored."""
    train, other = manifest_of(tmp_path / "train", ("x", "y")), manifest_of(tmp_path / "other", ("y", "x"))
    config = TrainConfig(
        output_dir=str(tmp_path / "run"),
        decoder="cpu-fused",
        data=DataConfig(num_frames=2, frame_size=32, workers=1, train_manifest=str(train.folder)),
        model=ModelConfig(size="tiny"),
        optim=OptimConfig(global_batch=2, micro_batch=2),
        objective=ObjectiveConfig(name="classification"),
    )
    run = tmp_path / "run"
    with training(config, Distributed()) as loop:
        loop.checkpointer.save("checkpoint.pt")
        loop.export(run / "weights.safetensors")
    shutil.rmtree(train.folder)
    converted = str(tmp_path / "converted.safetensors")
    write_weights(open_start(str(run / "weights.safetensors")), Path(converted), layout=None)
    for path in (str(run / "checkpoint.pt"), str(run / "weights.safetensors"), converted):
        assert open_start(path).classes == ("x", "y")
        with pytest.raises(UserError, match=r"other numbers its classes differently: class 0 of .* is 'x'"):
            evaluate_checkpoint(EvaluateConfig(path, manifest=str(other.folder)), Distributed())


def test_a_damaged_checkpoint_stops_a_resumed_run_with_its_name(tmp_path: Path) -> None:
    folder = manifest_of(tmp_path / "m").folder
    (tmp_path / "run").mkdir()
    torch.save({"format": "avion_dali checkpoint"}, tmp_path / "run" / "checkpoint.pt")
    whole = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    (tmp_path / "run" / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    config = TrainConfig(output_dir=str(tmp_path / "run"), data=DataConfig(train_manifest=str(folder)))
    with pytest.raises(UserError, match=r"run/checkpoint\.pt .*Copy checkpoint_best\.pt"):
        training(config, Distributed()).__enter__()
