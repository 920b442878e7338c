"""From Ego4D and EPIC-KITCHENS-100 as published to a score: the commands that the README shows."""

from __future__ import annotations

import json
import pickle
import re
import shlex
from pathlib import Path

import make_videos
import numpy as np
import pytest
from annotation_files import epic_row, write_epic, write_relevancy, write_sentences
from launch_data import SMALL, of_kind

from avion_dali.cli.main import main as avion_dali
from avion_dali.data.manifest import Manifest
from avion_dali.engine.run_log import read_rows

README = Path(__file__).parents[1] / "README.md"
EGO4D, EK100 = Path("datasets/Ego4D"), Path("datasets/EK100")
# One process, and small.
AT_TEST_SIZE = {
    "chunk": ["--jobs", "1", "--chunk-seconds", "2"],
    "manifest": ["--jobs", "1"],
    "pretrain": [*SMALL, "--decoder", "cpu-fused", "--model.weights", "", "--run.max_steps", "2"],
    "evaluate": ["--decoder", "cpu-fused", "--workers", "1"],
}


def commands_of_the_readme() -> list[str]:
    found = re.search(r"^## Ego4D in five commands$.*?```bash\n(.*?)```", README.read_text(), re.M | re.S)
    assert found, "the README's section has no commands"
    return found[1].replace("\\\n", " ").splitlines()


def run(command: str) -> None:
    words = shlex.split(command)
    place = next(i for i, word in enumerate(words) if word in AT_TEST_SIZE or word.startswith("train."))
    assert words[place - 1] in ("avion-dali", "avion_dali", "-m")
    subcommand = words[place].removeprefix("train.")
    assert avion_dali([subcommand, *words[place + 1 :], *AT_TEST_SIZE[subcommand]]) == 0


def lay_out() -> None:
    """What is downloaded, and EPIC-KITCHENS' videos as AVION cuts them, at the size of a fixture."""
    uids = ["0a1b2c3d-0000-4000-8000-000000000001", "0a1b2c3d-0000-4000-8000-000000000002"]
    cut = [f"EK100_320p_15sec_30fps_libx264/{name[:3]}/{name}.MP4/0.MP4" for name in ("P01_11", "P02_12")]
    paths = [*(EGO4D / f"full_scale/{uid}.mp4" for uid in uids), *(EK100 / path for path in cut)]
    for i, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        plain = make_videos.write_video(
            f"{i}.mp4", frames=90, size=(64, 48), first_number=i, audio_seconds=float(i < 2)
        )
        plain.rename(path)
    rows = [(uids[i % 2], 0.3 * i, 0.3 * i + 1.0, f"#C C picks up the cup {i}") for i in range(6)]
    (EGO4D / "ego4d_train.pkl").write_bytes(pickle.dumps([*rows, ("not-downloaded", 0.0, 1.0, "#C C waits")]))
    annotations = EK100 / "epic-kitchens-100-annotations/retrieval_annotations"
    (annotations / "relevancy").mkdir(parents=True)
    spans = [(f"00:00:00.{i}0", f"00:00:02.{i}0") for i in range(6)]
    clips = [
        epic_row(f"P0{1 + i % 2}_{i}", *span, narration=f"take {i % 3}", video=("P01_11", "P02_12")[i % 2])
        for i, span in enumerate(spans)
    ]
    write_epic(annotations / "EPIC_100_retrieval_test.csv", clips)
    sentences = [(row[0], row[8]) for row in clips[:3]]
    write_sentences(annotations / "EPIC_100_retrieval_test_sentence.csv", sentences)
    grades = np.array([[1.0 if row[8] == f"take {column}" else 0.25 for column in range(3)] for row in clips])
    write_relevancy(annotations / "relevancy/caption_relevancy_EPIC_100_retrieval_test.pkl", grades)


def test_five_commands_lead_from_the_published_files_to_a_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = commands_of_the_readme()
    assert len(commands) == 5
    monkeypatch.chdir(tmp_path)
    lay_out()
    for command in commands:
        run(command)
    ego4d, epic = Manifest("data/ego4d_train"), Manifest("data/ek100_mir_test")
    assert (ego4d.num_samples, ego4d.num_chunks) == (6, 4)  # three seconds in chunks of two
    assert ego4d.sample(5).num_chunks == 2
    assert "not-downloaded" in Path("data/ego4d_train/rejected.jsonl").read_text()
    assert (epic.num_samples, epic.num_chunks, epic.info["num_captions"]) == (6, 2, 3)
    rows = read_rows(Path("runs/ego4d_b/log.jsonl"))
    assert [np.isfinite(row["loss"]) for row in of_kind(rows, "train")] == [True] * 2
    found = json.loads(Path("mir.json").read_text())
    assert (found["clips"], found["unreadable"]) == (6, 0)
    assert 0 < found["map_avg"] <= 1 and 0 < found["ndcg_avg"] <= 1
