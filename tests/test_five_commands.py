"""From Ego4D and EPIC-KITCHENS-100 as published to a score: the commands that the README shows."""

from __future__ import annotations

import json
import pickle
import shlex
from pathlib import Path

import make_videos
import numpy as np
import pytest
from annotation_files import epic_row, write_epic, write_relevancy, write_sentences
from launch_data import CONFIGS, SMALL, of_kind

from avion_dali.data.manifest import Manifest
from avion_dali.engine.run_log import read_rows
from train import evaluate, pretrain
from train.cli import main as avion_dali

README = Path(__file__).parents[1] / "README.md"
COMMANDS = """
avion-dali chunk ego4d EPIC-KITCHENS --root . --output data/chunks
avion-dali manifest ego4d --chunks data/chunks/ego4d --annotations ego4d_train.pkl --output data/ego4d_train
avion-dali manifest ek100 --task retrieval --chunks data/chunks/EPIC-KITCHENS --output data/ek100_mir_test \\
    --annotations epic/EPIC_100_retrieval_test.csv --sentences epic/EPIC_100_retrieval_test_sentence.csv \\
    --relevancy epic/caption_relevancy_EPIC_100_retrieval_test.pkl
torchrun --nproc_per_node=8 -m train.pretrain --config configs/pretrain_vitb16_ego4d.yaml \\
    --data.train_manifest data/ego4d_train --data.eval_manifest data/ek100_mir_test --output-dir runs/ego4d_b
python -m train.evaluate --config configs/eval_mir.yaml --checkpoint runs/ego4d_b/checkpoint_best.pt
"""
# Two processes less, and small.
AT_TEST_SIZE = {
    "chunk": ["--jobs", "1", "--chunk-seconds", "2"],
    "manifest": ["--jobs", "1"],
    "train.pretrain": [*SMALL, "--decoder", "cpu-fused", "--model.weights", "", "--run.max_steps", "2"],
    "train.evaluate": ["--decoder", "cpu-fused", "--workers", "1", "--output", "mir.json"],
}


def run(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "avion-dali":
        assert avion_dali([*words[1:], *AT_TEST_SIZE[words[1]]]) == 0
        return
    module = next(word for word in words if word.startswith("train."))
    main = {"train.pretrain": pretrain.main, "train.evaluate": evaluate.main}[module]
    assert main([*words[words.index(module) + 1 :], *AT_TEST_SIZE[module]]) == 0


def lay_out(folder: Path) -> None:
    """Downloads as their programs leave them, at the size of a fixture."""
    uids = ["0a1b2c3d-0000-4000-8000-000000000001", "0a1b2c3d-0000-4000-8000-000000000002"]
    for i, path in enumerate(
        [f"ego4d/v2/full_scale/{uid}.mp4" for uid in uids]
        + [f"EPIC-KITCHENS/{name[:3]}/videos/{name}.MP4" for name in ("P01_11", "P02_12")]
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        plain = make_videos.write_video(
            folder / f"{i}.mp4", frames=90, size=(64, 48), first_number=i, audio_seconds=1
        )
        plain.rename(folder / path)
    rows = [(uids[i % 2], 0.3 * i, 0.3 * i + 1.0, f"#C C picks up the cup {i}") for i in range(6)]
    (folder / "ego4d_train.pkl").write_bytes(pickle.dumps(rows))
    epic = folder / "epic"
    epic.mkdir()
    spans = [(f"00:00:00.{i}0", f"00:00:02.{i}0") for i in range(6)]
    clips = [
        epic_row(f"P0{1 + i % 2}_{i}", *span, narration=f"take {i % 3}", video=("P01_11", "P02_12")[i % 2])
        for i, span in enumerate(spans)
    ]
    write_epic(epic / "EPIC_100_retrieval_test.csv", clips)
    write_sentences(epic / "EPIC_100_retrieval_test_sentence.csv", [(row[0], row[8]) for row in clips[:3]])
    grades = np.array([[1.0 if row[8] == f"take {column}" else 0.25 for column in range(3)] for row in clips])
    write_relevancy(epic / "caption_relevancy_EPIC_100_retrieval_test.pkl", grades)
    (folder / "configs").symlink_to(CONFIGS)


def test_five_commands_lead_from_the_published_files_to_a_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_out(tmp_path)
    monkeypatch.chdir(tmp_path)
    commands = COMMANDS.strip().replace("\\\n", " ").splitlines()
    assert len(commands) == 5
    for command in commands:
        run(command)
    ego4d, epic = Manifest("data/ego4d_train"), Manifest("data/ek100_mir_test")
    assert (ego4d.num_samples, ego4d.num_chunks) == (6, 4)
    assert (epic.num_samples, epic.num_chunks, epic.info["num_captions"]) == (6, 4, 3)
    assert epic.sample(5).num_chunks == 2  # two chunks of two seconds
    rows = read_rows(Path("runs/ego4d_b/log.jsonl"))
    assert [np.isfinite(row["loss"]) for row in of_kind(rows, "train")] == [True] * 2
    found = json.loads(Path("mir.json").read_text())
    assert (found["clips"], found["unreadable"]) == (6, 0)
    assert 0 < found["map_avg"] <= 1 and 0 < found["ndcg_avg"] <= 1


def test_the_readme_shows_these_commands() -> None:
    assert COMMANDS in README.read_text(), "the README's section is to hold the commands of this test"
