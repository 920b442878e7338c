"""Evaluations of every kind, several views of a clip, and trainings that stop and go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launch_data import CONFIGS, LaunchData, launch, launch_data, of_kind, scores  # noqa: F401
from small_models import randomize, save_as
from torch import nn

from avion_dali.assembly.evaluators import evaluate_checkpoint
from avion_dali.cli import finetune, pretrain
from avion_dali.config import EvaluateConfig, ModelConfig, TrainConfig
from avion_dali.contracts import UserError
from avion_dali.data.manifest import Manifest
from avion_dali.data.planner import ClipRules, Planner
from avion_dali.data.relevancy import open_captions
from avion_dali.data.tokens import pad_tokens
from avion_dali.decode.cpu_fused import decode_clip
from avion_dali.device_ops.normalize import normalize_frames
from avion_dali.engine.checkpoint import load_checkpoint
from avion_dali.engine.distributed import Distributed
from avion_dali.engine.run_log import read_rows
from avion_dali.metrics.retrieval import retrieval_scores
from avion_dali.models.classifier import build_classifier
from avion_dali.models.dual_encoder import DualEncoder, build_dual_encoder
from avion_dali.objectives.classification import Classification
from avion_dali.objectives.masked_reconstruction import MaskedReconstruction

CPU = ("--decoder", "cpu-fused")
FEW = ("--run.max_steps", "2", "--optim.learning_rate", "1e-3")
SMALL_MODEL = ModelConfig(size="tiny", embed_dim=32, context_length=8)


def decoded_clips(manifest: Manifest, rules: ClipRules) -> list[torch.Tensor]:
    """Every clip of a manifest, (V, T, H, W, C) each, planned and decoded one by one."""
    planner = Planner(manifest, rules, seed=0)
    clips = []
    for row in range(planner.num_clips):
        frames = np.empty(rules.clip_shape, np.uint8)
        decode_clip(planner.plan(row, 0), frames)
        clips.append(torch.from_numpy(frames))
    return clips


@pytest.fixture(scope="module")
def dual(data: LaunchData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a pre-training on narrations, evaluated on EK-100's retrieval set."""
    output = tmp_path_factory.mktemp("dual")
    launch(CONFIGS / "pretrain_vitb16_ego4d.yaml", data, output, *CPU, "--model.weights", "", *FEW)
    return output


def retrieval_by_hand(model: DualEncoder, manifest: Manifest, frames: int, statistics: str) -> dict[str, float]:
    """The scores of a manifest with stored captions and relevancy, without loader and evaluation."""
    rules = ClipRules(num_frames=frames, frame_size=32, training=False)
    relevancy = np.load(manifest.files.path("relevancy.npy"))
    tokens = torch.from_numpy(pad_tokens(open_captions(manifest).tokens, 8))
    with torch.no_grad():
        video = torch.cat(
            [model.encode_video(normalize_frames(c, statistics)) for c in decoded_clips(manifest, rules)]
        )
        similarity = video @ model.encode_text(tokens).T
    found = retrieval_scores(similarity.numpy(), relevancy)
    return {"map_avg": found.mean_average_precision.average, "ndcg_avg": found.ndcg.average}


def test_the_retrieval_recipe_scores_a_checkpoint_at_4_and_16_frames(
    data: LaunchData,
    dual: Path,
    tmp_path: Path,
) -> None:
    config = ["--config", str(CONFIGS / "eval_mir.yaml"), "--manifest", str(data.mir_test), *CPU]
    trained = of_kind(read_rows(dual / "log.jsonl"), "evaluation")[-1]
    state = load_checkpoint(dual / "checkpoint.pt").model
    for frames in (4, 16):
        found = scores(dual / "checkpoint.pt", tmp_path / "m.json", *config, "--num-frames", str(frames))
        model = build_dual_encoder(SMALL_MODEL, num_frames=frames, frame_size=32).eval()
        positions = state["visual.temporal_embedding"]
        # The recipe's rule (torch's linear interpolation, ends not aligned), by torch itself.
        resized = nn.functional.interpolate(positions.T[None], size=frames, mode="linear")[0].T
        model.load_state_dict(state | {"visual.temporal_embedding": resized})
        expected = retrieval_by_hand(model, Manifest(data.mir_test), frames, "openai")
        assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-5), frames
        assert (found["clips"], found["unreadable"]) == (6, 0)
        if frames == 4:
            assert found == pytest.approx({name: trained[name] for name in found}, abs=1e-5)


def test_16_frames_are_what_the_recipe_says(data: LaunchData, dual: Path, tmp_path: Path) -> None:
    common = ["--manifest", str(data.mir_test), *CPU]
    by_recipe = scores(
        dual / "weights.safetensors",
        tmp_path / "a.json",
        *("--config", str(CONFIGS / "eval_mir.yaml")),
        *common,
    )
    assert by_recipe == scores(dual / "checkpoint.pt", tmp_path / "b.json", *common, "--num-frames", "16")


def test_an_entry_point_names_the_one_for_another_objective() -> None:
    for entry, name, other in ((finetune, "contrastive", "pretrain"), (pretrain, "max-margin", "finetune")):
        with pytest.raises(UserError, match=f"{name} is for avion-dali {other}. Give --config a recipe"):
            entry.main(["--objective.name", name])


@pytest.mark.parametrize("layout", ["avion-flash", "avion-plain"])
def test_weights_of_avion_are_scored(data: LaunchData, tmp_path: Path, layout: str) -> None:
    torch.manual_seed(0)
    model = randomize(build_dual_encoder(SMALL_MODEL, num_frames=4, frame_size=32))
    path = save_as(tmp_path / "avion.pt", model, layout)
    found = scores(Path(path), tmp_path / "m.json", "--manifest", str(data.mir_test), *CPU)
    expected = retrieval_by_hand(model, Manifest(data.mir_test), 4, "openai-avion")
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    with pytest.raises(UserError, match="give --manifest"):
        scores(Path(path), tmp_path / "m.json", *CPU)


@pytest.fixture(scope="module")
def classifier(data: LaunchData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("classifier")
    launch(CONFIGS / "finetune_own_recognition.yaml", data, output, *CPU, *FEW)
    return output


def test_five_clips_and_three_crops_are_averaged(data: LaunchData, classifier: Path) -> None:
    options = EvaluateConfig(
        str(classifier / "checkpoint.pt"),
        decoder="cpu-fused",
        workers=1,
        eval_clips=5,
        eval_crops=3,
        micro_batch=7,
    )
    result = evaluate_checkpoint(options, Distributed())
    model = build_classifier(SMALL_MODEL, num_classes=3, num_frames=4, frame_size=32, dropout=0.0).eval()
    model.load_state_dict(load_checkpoint(classifier / "checkpoint.pt").model)
    rules = ClipRules(num_frames=4, frame_size=32, training=False, eval_clips=5, eval_crops=3)
    clips = decoded_clips(Manifest(data.heldout), rules)
    with torch.no_grad():
        scored = torch.stack([model(normalize_frames(clip, "openai")).softmax(-1) for clip in clips])
    expected = scored.unflatten(0, (-1, 5)).mean(dim=(1, 2))
    assert expected.shape == (6, 3)
    np.testing.assert_allclose(result.probabilities_NK, expected.numpy(), atol=1e-5)
    assert result.labels.tolist() == [Manifest(data.heldout).label(row) for row in range(6)]


def test_paper_fused_scores_and_trains_alike(data: LaunchData, classifier: Path, tmp_path: Path) -> None:
    views = ("--eval-clips", "5", "--eval-crops", "3")
    found = [
        scores(classifier / "checkpoint.pt", tmp_path / "m.json", "--decoder", decoder, *views)
        for decoder in ("cpu-fused", "paper-fused")
    ]
    assert found[0] == found[1] and found[0]["clips"] == 6
    rows = launch(
        CONFIGS / "finetune_own_recognition.yaml", data, tmp_path / "p", "--decoder", "paper-fused", *FEW
    )
    same = of_kind(read_rows(classifier / "log.jsonl"), "train")
    assert [row["loss"] for row in of_kind(rows, "train")] == [row["loss"] for row in same]


def test_labels_of_other_classes_are_refused(data: LaunchData, classifier: Path, tmp_path: Path) -> None:
    for folder, message in ((data.cls_val, "the model has 3 classes"), (data.kinetics, "differently")):
        with pytest.raises(UserError, match=message):
            scores(classifier / "checkpoint.pt", tmp_path / "m.json", *CPU, "--manifest", str(folder))
    with pytest.raises(UserError, match="no class labels"):
        scores(classifier / "checkpoint.pt", tmp_path / "m.json", *CPU, "--manifest", str(data.ego4d))


@pytest.mark.parametrize(
    ("recipe", "objective"),
    [
        ("finetune_own_recognition", Classification),
        ("videomae_pretrain_vitb16_k400", MaskedReconstruction),
    ],
)
def test_repeated_augmentation_with_both_decoders(
    data: LaunchData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe: str,
    objective: type,
) -> None:
    """Two clips a micro-batch, two views each: the same rows of frames, whoever decodes."""
    pytest.importorskip("nvidia.dali")
    seen: list[Any] = []
    outputs = objective.outputs

    def recorded(self: Any, model: nn.Module, batch: Any, key: Any) -> Any:
        seen.append(batch)
        return outputs(self, model, batch, key)

    monkeypatch.setattr(objective, "outputs", recorded)
    losses = []
    for decoder in ("cpu-fused", "dali"):
        more = ("--decoder", decoder, "--data.repeats", "2", "--run.max_steps", "1", "--data.eval_manifest", "")
        rows = launch(CONFIGS / f"{recipe}.yaml", data, tmp_path / decoder, *more)
        losses.append([row["loss"] for row in of_kind(rows, "train")])
    cpu, dali = seen[:2], seen[2:]
    for one, other in zip(cpu, dali, strict=True):
        assert one.frames_BTHWC.shape[0] == 4 and one.view_ids.tolist() == [0, 1, 0, 1]
        assert one.sample_ids.tolist() == other.sample_ids.tolist()
        near = (one.frames_BTHWC.float() - other.frames_BTHWC.float()).abs().mean(dim=(1, 2, 3, 4))
        views = (one.frames_BTHWC[::2].float() - one.frames_BTHWC[1::2].float()).abs().mean(dim=(1, 2, 3, 4))
        assert near.max() < 4 < views.min()  # the decoders' scalers differ a little, two windows a lot
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.parametrize("recipe", ["finetune_cls_vitb16", "videomae_pretrain_vitb16_k400"])
def test_a_run_goes_on_within_an_epoch_without_the_weights_it_started_from(
    data: LaunchData,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    recipe: str,
) -> None:
    start = tmp_path / "start"
    first = "pretrain_own" if recipe.startswith("finetune") else recipe
    launch(CONFIGS / f"{first}.yaml", data, start, *CPU, *FEW, "--data.eval_manifest", "")
    more = [*CPU, "--optim.learning_rate", "1e-2", "--optim.rate_batch", "0", "--model.drop_path", "0.2"]
    more += ["--model.weights", str(start / "weights.safetensors"), "--data.eval_manifest", ""]
    more += ["--data.train_manifest", str(data.cls_train)]  # three steps an epoch
    caplog.set_level("INFO", logger="avion_dali")
    whole = launch(CONFIGS / f"{recipe}.yaml", data, tmp_path / "whole", *more, "--run.max_steps", "5")
    launch(CONFIGS / f"{recipe}.yaml", data, tmp_path / "cut", *more, "--run.max_steps", "2")
    assert caplog.text.count("parameters loaded") == 2
    caplog.clear()
    (start / "weights.safetensors").unlink()
    cut = launch(CONFIGS / f"{recipe}.yaml", data, tmp_path / "cut", *more, "--run.max_steps", "5")
    assert "parameters loaded" not in caplog.text
    losses = [[row["loss"] for row in of_kind(rows, "train")] for rows in (whole, cut)]
    assert losses[0] == losses[1] and len(losses[0]) == 5
    before, after = (load_checkpoint(tmp_path / name / "checkpoint.pt").model for name in ("whole", "cut"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_metrics_are_printed_as_json(
    data: LaunchData,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A masked-video model is scored, too; there is no control with frozen frames for it."""
    recipe = CONFIGS / "videomae_pretrain_vitb16_k400.yaml"
    rows = launch(recipe, data, tmp_path / "run", *CPU, "--run.max_steps", "1")
    capsys.readouterr()
    found = scores(tmp_path / "run" / "checkpoint.pt", tmp_path / "m.json", *CPU)
    assert json.loads(capsys.readouterr().out) == found
    evaluation = of_kind(rows, "evaluation")[-1]
    assert found["reconstruction"] == pytest.approx(evaluation["reconstruction"], abs=1e-6)
    with pytest.raises(UserError, match="frozen_frames"):
        scores(tmp_path / "run" / "checkpoint.pt", tmp_path / "m.json", *CPU, "--frozen-frames", "true")
    assert (
        TrainConfig.from_plain(load_checkpoint(tmp_path / "run" / "checkpoint.pt").config).model.norm_eps
        == 1e-6
    )


def test_graded_fine_tuning_and_averaged_weights(data: LaunchData, dual: Path, tmp_path: Path) -> None:
    """The other loss of retrieval; what is evaluated and exported is the running average of the weights."""
    more = [*CPU, *FEW, "--model.weights", str(dual / "weights.safetensors"), "--optim.ema_decay", "0.9"]
    more += ["--objective.max_margin.loss", "symmetric-multi-similarity"]
    recipe = CONFIGS / "finetune_mir_vitb16.yaml"
    with pytest.raises(UserError, match="data.text"):
        launch(recipe, data, tmp_path / "own", *more, "--data.text", "own")
    rows = launch(recipe, data, tmp_path / "run", *more)
    evaluation = of_kind(rows, "evaluation")[-1]
    saved = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert any(not torch.equal(saved.average[name], saved.model[name]) for name in saved.average)
    for name in ("checkpoint.pt", "checkpoint_best.pt", "weights.safetensors"):
        found = scores(tmp_path / "run" / name, tmp_path / "m.json", *CPU)
        assert found == pytest.approx({key: evaluation[key] for key in found}, abs=1e-6), name
