"""The fine-tuning demo: recipes fit together, both sides train alike, and too small a gain is a failure."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path

import pytest

from avion_dali.cli import demo, demo_finetune
from avion_dali.cli.arguments import parse_options
from avion_dali.cli.demo_finetune import FinetuneNumbers, Margin, main, margins, most_frequent_share, table
from avion_dali.config import TrainConfig
from avion_dali.data import synthetic
from avion_dali.data.manifest import Manifest
from avion_dali.engine.run_log import read_rows
from avion_dali.models.starting_weights import open_start

CONFIGS = demo.recipes_folder()
RECIPES = ("demo_retrieval", "demo_recognition", "demo_videomae_pretrain", "demo_videomae_finetune")
SMALL = synthetic.SyntheticSettings(train_videos=2, heldout_videos=1, seconds=24, fps=8, side=32)
RUNS = {
    "retrieval": "demo",
    "recognition": "demo",
    "recognition_from_random": "",
    "videomae": "",
    "videomae_recognition": "videomae",
    "videomae_recognition_from_random": "",
}
GOOD = FinetuneNumbers(
    map_before=0.5,
    map_after=0.7,
    top1=0.9,
    top1_scratch=0.3,
    top1_frozen=0.2,
    top1_chance=0.2,
    videomae=0.6,
    videomae_scratch=0.3,
)


def recipe(name: str) -> TrainConfig:
    return parse_options(TrainConfig, ["--config", str(CONFIGS / f"{name}.yaml")], prog="p", description="d")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder after the whole demo at tiny size, two steps a training; the patches hold for the module."""
    folder = tmp_path_factory.mktemp("finetune")
    configs = folder / "configs"
    configs.mkdir()
    for name in ("demo", *RECIPES):
        text = (CONFIGS / f"{name}.yaml").read_text()
        assert "\nrun:\n" in text
        shorter = text.replace("\nrun:\n", "\nrun:\n  max_steps: 2\n").replace(
            "embed_dim: 128", "embed_dim: 16"
        )
        (configs / f"{name}.yaml").write_text(shorter)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "make_videos", partial(synthetic.make_videos, settings=SMALL, jobs=1))
        patch.setattr(demo, "recipes_folder", lambda: configs)
        assert main(arguments(folder)) == 1, "two steps teach nothing"
        yield folder


def arguments(folder: Path) -> list[str]:
    return ["--demo-dir", str(folder / "demo"), "--output-dir", str(folder / "runs")]


def steps_logged(folder: Path) -> dict[str, list[int]]:
    logs = sorted(folder.rglob("log.jsonl"))
    return {
        str(log.relative_to(folder)): [row["step"] for row in read_rows(log) if row["kind"] == "train"]
        for log in logs
    }


def test_every_run_starts_from_what_it_should(finished: Path) -> None:
    starts = {"": "", "demo": finished / "demo", "videomae": finished / "runs" / "videomae"}
    for name, source in RUNS.items():
        trained = open_start(str(finished / "runs" / name / "weights.safetensors")).config
        assert trained is not None
        weights = starts[source] / "weights.safetensors" if source else ""
        assert trained["model"]["weights"] == str(weights)
        assert (finished / "runs" / name / "report.html").is_file()


def test_both_sides_of_a_comparison_train_alike(finished: Path) -> None:
    for name in ("recognition", "videomae_recognition"):
        one, other = (
            open_start(str(finished / "runs" / run / "weights.safetensors")).config
            for run in (name, f"{name}_from_random")
        )
        assert one is not None and other is not None
        assert one.pop("output_dir") != other.pop("output_dir")
        assert one["model"].pop("weights") and not other["model"].pop("weights")
        assert one == other


def test_run_again_it_trains_nothing_and_says_the_same(finished: Path, capsys: pytest.CaptureFixture) -> None:
    before, numbers = steps_logged(finished), (finished / "runs" / "numbers.json").read_text()
    assert len(before) == 1 + len(RUNS)
    assert main(arguments(finished)) == 1
    assert steps_logged(finished) == before
    assert (finished / "runs" / "numbers.json").read_text() == numbers
    said = capsys.readouterr().out
    assert "training dual encoder" not in said
    assert table(margins(FinetuneNumbers(**json.loads(numbers)))) in said


def test_the_exit_status_follows_the_margins(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_finetune, "measure", lambda runs, weights: GOOD)
    assert main(arguments(finished)) == 0
    assert json.loads((finished / "runs" / "numbers.json").read_text()) == asdict(GOOD)
    monkeypatch.setattr(demo_finetune, "measure", lambda runs, weights: replace(GOOD, map_after=0.51))
    assert main(arguments(finished)) == 1


def test_classes_are_the_motions_in_both_manifests(finished: Path) -> None:
    folder = finished / "demo" / "data" / "balanced"
    for name in ("manifest_train", "manifest_heldout"):
        manifest = Manifest(folder / name)
        assert manifest.classes is not None
        assert manifest.classes.names == tuple(sorted(synthetic.ACTIONS))
        rows = [manifest.sample(i) for i in range(manifest.num_samples)]
        assert len(rows) > 10
        assert all(manifest.classes.names[row.label] == row.verb for row in rows)
        common = Counter(row.verb for row in rows).most_common(1)[0][1]
        assert most_frequent_share(folder / name) == pytest.approx(common / len(rows))


@pytest.mark.parametrize("name", RECIPES)
def test_a_mirrored_clip_would_show_another_motion(name: str) -> None:
    assert recipe(name).data.flip_probability == 0


def test_recipes_fit_what_they_start_from() -> None:
    for name, start in (
        ("demo_retrieval", "demo"),
        ("demo_recognition", "demo"),
        ("demo_videomae_finetune", "demo_videomae_pretrain"),
    ):
        one, other = recipe(name), recipe(start)
        for section, same in (
            ("data", ("num_frames", "frame_size", "normalization")),
            ("model", ("encoder", "size")),
        ):
            for field in same:
                assert getattr(getattr(one, section), field) == getattr(getattr(other, section), field)
    assert recipe("demo_retrieval").model.embed_dim == recipe("demo").model.embed_dim
    assert recipe("demo_retrieval").model.context_length == recipe("demo").model.context_length


def test_each_number_can_miss_a_margin() -> None:
    assert all(margin.is_met for margin in margins(GOOD))
    baselines = ("map_before", "top1_scratch", "top1_frozen", "top1_chance", "videomae_scratch")
    for name in (field.name for field in fields(FinetuneNumbers)):
        worse = replace(GOOD, **{name: 1.0 if name in baselines else 0.0})
        missed = [margin for margin in margins(worse) if not margin.is_met]
        assert len(missed) == (3 if name == "top1" else 1)


def test_a_margin_is_met_from_its_least_on() -> None:
    assert Margin("w", value=0.75, other=0.5, least=0.25).is_met
    assert not Margin("w", value=0.74, other=0.5, least=0.25).is_met


def test_the_table_tells_which_margin_was_missed() -> None:
    lines = table((Margin("short", 0.9, 0.5, 0.3), Margin("much longer", 0.9, 0.8, 0.3))).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["short", "0.900", "0.500", "0.400", "0.300", "met"],
        ["much", "longer", "0.900", "0.800", "0.100", "0.300", "MISSED"],
    ]
    assert lines[1].index("0.900") == lines[2].index("0.900")
