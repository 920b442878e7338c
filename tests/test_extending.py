"""Every kind of part can be added in one place and one line: see `toy_parts.py`, which CONTRIBUTING follows."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import make_videos
import pytest
from small_models import same_tensors

from avion_dali.engine.checkpoint import load_checkpoint
from avion_dali.engine.run_log import read_rows

TESTS = Path(__file__).parent
TABLES = {"CPU_DECODERS", "ENCODERS", "TASKS", "CLASS_METRICS", "CROPS", "DATASETS"}


def launch(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TESTS / "toy_parts.py"), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])},
        capture_output=True,
        text=True,
        timeout=110,
    )


@pytest.fixture(scope="module")
def chunks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toys") / "chunks"
    for number, name in enumerate("ab"):
        path = folder / f"{name}.mp4" / "0.mp4"
        path.parent.mkdir(parents=True)
        make_videos.write_video(path, frames=180, size=(96, 64), first_number=200 * number)
    return folder


def test_toys_train_are_killed_and_resumed_evaluated_and_exported(chunks: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    done = launch("train", chunks, whole, 3)
    assert done.returncode == 0, done.stderr
    killed = launch("train", chunks, cut, 2, "kill")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert load_checkpoint(cut / "run" / "checkpoint.pt").step == 2
    resumed = launch("train", chunks, cut, 3)
    assert resumed.returncode == 0, resumed.stderr
    ends = [load_checkpoint(folder / "run" / "checkpoint.pt") for folder in (whole, cut)]
    assert [end.step for end in ends] == [3, 3]
    assert same_tensors(ends[0].model, ends[1].model)
    rows = read_rows(cut / "run" / "log.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3]
    assert {row["decoder"] for row in rows if row["kind"] == "train"} == {"inverted"}
    (evaluation,) = [row for row in rows if row["kind"] == "evaluation"]
    assert 0 < evaluation["mrr"] <= 1 and evaluation["clips"] == 12
    evaluated = launch("evaluate", cut)
    assert evaluated.returncode == 0, evaluated.stderr
    found = json.loads(evaluated.stdout)
    assert (found["encoder"], found["classes"]) == ("mean", ["even", "odd"])
    for name in ("top1", "mrr", "clips"):
        assert found["metrics"][name] == pytest.approx(evaluation[name])


def test_each_toy_is_registered_by_one_line() -> None:
    tree = ast.parse((TESTS / "toy_parts.py").read_text())
    targets = [
        ast.unparse(target.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Subscript)
    ]
    assert sorted(targets) == sorted(TABLES)
