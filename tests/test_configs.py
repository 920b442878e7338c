"""Every recipe says how it is run, and runs: three steps at tiny size, with both decoders."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from launch_data import CONFIGS, RECIPES, LaunchData, launch, launch_data, of_kind, recipe_config  # noqa: F401

from avion_dali.cli.arguments import parse_options
from avion_dali.cli.demo import DemoOptions
from avion_dali.config import EvaluateConfig, TrainConfig
from avion_dali.engine.checkpoint import load_checkpoint
from avion_dali.models.starting_weights import open_start
from avion_dali.tasks.table import find_task

OPTIONS = {"pretrain": TrainConfig, "finetune": TrainConfig, "evaluate": EvaluateConfig, "demo": DemoOptions}
TRAINS = {
    "contrastive": "pretrain",
    "masked-video": "pretrain",
    "max-margin": "finetune",
    "classification": "finetune",
}


def header_fields(recipe: Path) -> dict[str, str]:
    """The header comment's entries, `Name: text`, with the lines that go on further right."""
    found: dict[str, str] = {}
    name = ""
    for line in recipe.read_text().splitlines():
        if not line.startswith("#"):
            break
        text = line[1:]
        start = re.match(r" (Command|Hardware|Published number): *(.*)", text)
        if start:
            name = start[1]
            found[name] = start[2]
        elif name and text.startswith("      "):
            found[name] += " " + text.strip()
        else:
            name = ""
    return found


@pytest.mark.parametrize("recipe", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_says_how_it_is_run_and_what_was_published(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = header_fields(recipe)
    assert set(fields) == {"Command", "Hardware", "Published number"}
    assert all(fields.values())
    words = shlex.split(fields["Command"])
    launch = next(i for i, word in enumerate(words) if word in ("avion-dali", "avion_dali"))
    assert launch == 0 or words[0] == "torchrun" and words[launch - 1] == "-m"
    command, *arguments = words[launch + 1 :]
    monkeypatch.chdir(tmp_path)
    parse_options(OPTIONS[command], arguments, prog="p", description="d")
    if command != "demo":
        assert arguments[arguments.index("--config") + 1] == recipe.stem
    if command in TRAINS.values():
        assert command == TRAINS[recipe_config(recipe).objective.name]


@pytest.fixture(scope="session")
def pretrained(data: LaunchData, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What fine-tuning starts from: a dual encoder of 4 frames, and a VideoMAE."""
    folder = tmp_path_factory.mktemp("pretrained")
    more = ("--decoder", "cpu-fused", "--run.max_steps", "1")
    for name, recipe in (("vit", "pretrain_own"), ("videomae", "videomae_pretrain_vitb16_k400")):
        launch(CONFIGS / f"{recipe}.yaml", data, folder / name, *more)
    return {name: folder / name / "weights.safetensors" for name in ("vit", "videomae")}


@pytest.mark.parametrize("decoder", ["cpu-fused", "dali"])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains(
    recipe: Path,
    decoder: str,
    data: LaunchData,
    pretrained: dict[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="avion_dali")
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
    config = recipe_config(recipe)
    is_finetuning = TRAINS[config.objective.name] == "finetune"
    weights = str(pretrained[config.model.encoder]) if is_finetuning else ""
    more = ("--decoder", decoder, "--run.max_steps", "3", "--model.weights", weights)
    rows = launch(recipe, data, tmp_path, *more)
    trained = of_kind(rows, "train")
    assert [row["step"] for row in trained] == [1, 2, 3]
    assert all(np.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in trained)
    assert {row["decoder"] for row in trained} == {decoder}
    assert trained[-1]["decoded_on_cpu"] == trained[-1]["replaced"] == 0
    (evaluation,) = of_kind(rows, "evaluation")[-1:]
    assert np.isfinite(evaluation[find_task(config.objective.name).best_metric])
    assert (evaluation["unreadable"], evaluation["step"]) == (0, 3)
    assert load_checkpoint(tmp_path / "checkpoint.pt").step == 3
    assert (
        open_start(str(tmp_path / "weights.safetensors")).config["objective"]["name"] == config.objective.name
    )
    assert (tmp_path / "report.html").is_file() and (tmp_path / "checkpoint_best.pt").is_file()
    said = re.search(r"(\d+) of (\d+) parameters loaded", caplog.text)
    assert bool(said) == is_finetuning
    assert said is None or int(said[1]) >= int(said[2]) - 4  # a head, and what stands before it
