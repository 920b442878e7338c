"""Tiny data sets of every kind that the recipes train on, made by the commands, and what all launches share.

Three videos of three seconds, as VP9 chunks of one file, which every decoder reads without a GPU.
"""

from __future__ import annotations

import itertools
import json
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import make_videos
import numpy as np
import pytest
from annotation_files import epic_row, write_epic, write_lines, write_relevancy, write_sentences

from avion_dali.cli import evaluate, finetune, pretrain
from avion_dali.cli.arguments import parse_options
from avion_dali.cli.main import main as command
from avion_dali.config import TrainConfig
from avion_dali.engine.run_log import read_rows

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
RECIPES = sorted(path for path in CONFIGS.glob("*.yaml") if path.stem != "eval_mir")
VIDEOS = ("P01/P01_01", "P01/P01_02", "P02/P02_01")
VERBS, NOUNS = ("cut", "wash", "open"), ("carrot", "knife")
ENTRY_POINTS = {
    "contrastive": pretrain.main,
    "masked-video": pretrain.main,
    "max-margin": finetune.main,
    "classification": finetune.main,
}
# What makes any recipe small enough for a test; the rest of it stays.
SMALL = [
    *("--data.frame_size", "32", "--data.workers", "1", "--data.prefetch_batches", "1"),
    *("--model.size", "tiny", "--model.embed_dim", "32", "--model.context_length", "8"),
    *("--optim.global_batch", "4", "--optim.micro_batch", "2", "--run.log_every", "1"),
]


@dataclass(frozen=True)
class LaunchData:
    """Manifests by what they stand for.

    Args:
        folder: of everything.
        chunks: chunk folder with three videos.
        own: captions with verbs, nouns and labels, 12 rows.
        heldout: the same, 5 rows, with the classes of `own`.
        mir_train: EK-100 retrieval, 12 rows, with stored captions and relevancy.
        mir_test: the same, 6 rows and 4 captions.
        cls_train: EK-100 recognition, 12 rows of 6 actions.
        cls_val: the same, 6 rows.
        kinetics: whole files with labels, 6 rows of 3 classes.
        ego4d: narrations alone, 12 rows.
    """

    folder: Path
    chunks: Path

    def __getattr__(self, name: str) -> Path:
        path = self.folder / name
        if not (path / "manifest.json").is_file():
            raise AttributeError(name)
        return path

    def for_recipe(self, stem: str) -> tuple[Path, Path]:
        """The training and the evaluation manifest of the kind that a recipe names in its command."""
        if "k400" in stem:
            return self.kinetics, self.kinetics
        if "ego4d" in stem:
            return self.ego4d, self.mir_test
        if "finetune_mir" in stem:
            return self.mir_train, self.mir_test
        if "finetune_cls" in stem:
            return self.cls_train, self.cls_val
        return self.own, self.heldout


_made: list[LaunchData] = []  # a session fixture that several files import is one fixture for each


@pytest.fixture(scope="session", name="data")
def launch_data(tmp_path_factory: pytest.TempPathFactory) -> LaunchData:
    if not _made:
        _made.append(make_data(tmp_path_factory.mktemp("launches")))
    return _made[0]


def make_data(folder: Path) -> LaunchData:
    chunks = folder / "chunks"
    for number, video in enumerate(VIDEOS):
        path = chunks / f"{video}.MP4" / "0.mp4"
        path.parent.mkdir(parents=True)
        vp9 = {"codec": "libvpx-vp9", "options": make_videos.VP9_FAST}
        make_videos.write_video(path, frames=90, size=(64, 48), first_number=100 * number, **vp9)
    _captions(folder)
    _epic_retrieval(folder)
    _epic_recognition(folder)
    _kinetics(folder)
    rows = [(video, start, start + 1.0, f"#C C cuts {start}") for video, start in spans(12)]
    (folder / "narrations.pkl").write_bytes(pickle.dumps(rows))
    narrations = folder / "narrations.pkl"
    manifest("ego4d", "--chunks", chunks, "--annotations", narrations, "--output", folder / "ego4d")
    return LaunchData(folder, chunks)


def spans(count: int) -> list[tuple[str, float]]:
    """Videos and start seconds of some clips of a second."""
    return [(video, 0.4 * i) for i in range(count // 3) for video in VIDEOS]


def manifest(kind: str, *arguments: Any) -> None:
    assert command(["manifest", kind, *map(str, arguments), "--jobs", "1"]) == 0


def _captions(folder: Path) -> None:
    kinds = list(itertools.product(VERBS, NOUNS))
    for name, count, more in (("own", 12, ()), ("heldout", 6, ("--classes-from", folder / "own"))):
        lines = ["video,start,end,text,verb,noun,label"]
        for i, (video, start) in enumerate(spans(count)):
            verb, noun = kinds[i % len(kinds)]
            lines.append(f"{video},{start},{start + 1},{verb} the {noun},{verb},{noun},{verb}")
        csv = write_lines(folder / f"{name}.csv", *lines)
        output = ("--output", folder / name)
        manifest("captions", "--chunks", folder / "chunks", "--annotations", csv, *output, *more)


def _epic_rows(count: int, prefix: str) -> list[list[Any]]:
    rows = []
    for i, (video, start) in enumerate(spans(count)):
        times = (f"00:00:0{start:.2f}", f"00:00:0{start + 1:.2f}")
        names = {"verb": i % 3, "noun": i % 2, "video": video.partition("/")[2]}
        rows.append(epic_row(f"{prefix}_{i}", *times, narration=f"do {i % 3} with {i % 2}", **names))
    return rows


def _epic_retrieval(folder: Path) -> None:
    """Four unique sentences; a clip's own is fully relevant, the others by a third."""
    for name, count in (("train", 12), ("test", 6)):
        rows = _epic_rows(count, name)
        csv = write_epic(folder / f"EPIC_100_retrieval_{name}.csv", rows)
        sentences = [(row[0], row[8]) for row in rows[:4]]
        grades = np.array([[1.0 if row[8] == text else 1 / 3 for _, text in sentences] for row in rows])
        grades[np.arange(count), np.arange(count) % 4] += 0.5
        manifest(
            "ek100",
            *("--task", "retrieval", "--chunks", folder / "chunks", "--annotations", csv),
            *("--sentences", write_sentences(folder / f"EPIC_100_retrieval_{name}_sentence.csv", sentences)),
            *("--relevancy", write_relevancy(folder / f"relevancy_{name}.pkl", grades.clip(0, 1))),
            *("--output", folder / f"mir_{name}"),
        )


def _epic_recognition(folder: Path) -> None:
    for name, count in (("train", 12), ("validation", 6)):
        write_epic(folder / f"EPIC_100_{name}.csv", _epic_rows(count, name))
    for name, file in (("train", "train"), ("val", "validation")):
        csv = folder / f"EPIC_100_{file}.csv"
        where = ("--chunks", folder / "chunks", "--annotations", csv, "--output", folder / f"cls_{name}")
        manifest("ek100", "--task", "recognition", *where)


def _kinetics(folder: Path) -> None:
    chunks, lines = sorted((folder / "chunks").rglob("*.mp4")), []
    (folder / "k400").mkdir()
    for i in range(6):
        shutil.copyfile(chunks[i % 3], folder / "k400" / f"{i}.mp4")
        lines.append(f"{i}.mp4 {i % 3}")
    listed = write_lines(folder / "k400.txt", *lines)
    manifest("kinetics", "--videos", folder / "k400", "--annotations", listed, "--output", folder / "kinetics")


def recipe_config(recipe: Path) -> TrainConfig:
    return parse_options(TrainConfig, ["--config", str(recipe)], prog="p", description="d")


def launch(recipe: Path, data: LaunchData, output: Path, *more: str) -> list[dict[str, Any]]:
    """Train a recipe at tiny size through its entry point; returns the rows of the log."""
    train, held = data.for_recipe(recipe.stem)
    folders = ["--data.train_manifest", str(train), "--data.eval_manifest", str(held)]
    entry = ENTRY_POINTS[recipe_config(recipe).objective.name]
    status = entry(["--config", str(recipe), *SMALL, *folders, "--output-dir", str(output), *more])
    assert status == 0
    return read_rows(output / "log.jsonl")


def scores(checkpoint: Path, output: Path, *more: str) -> dict[str, float]:
    """Evaluate through the entry point; returns the metrics it writes."""
    arguments = ["--checkpoint", str(checkpoint), "--output", str(output), "--workers", "1", *more]
    assert evaluate.main(arguments) == 0
    found: dict[str, float] = json.loads(output.read_text())
    return found


def of_kind(rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["kind"] == kind]
