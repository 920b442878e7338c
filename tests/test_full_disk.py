"""A disk that fills up is one message, and what was there stays: for every command that writes results."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from chunk_folders import contents, write_random_manifest

from avion_dali import files
from avion_dali.cli import evaluate, features
from avion_dali.contracts import UserError
from avion_dali.data.manifest import Manifest
from avion_dali.inspection import checking
from avion_dali.inspection.checking import CheckSettings, check_chunks
from avion_dali.inspection.findings import FileReport, Finding
from avion_dali.inspection.repair import repair_manifest
from avion_dali.tasks.sample_means import PerSample


@contextmanager
def no_file_above(num_bytes: int) -> Iterator[None]:
    """Let longer writes fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("ending", [".safetensors", ".npy"])
def test_embeddings_are_whole_or_as_they_were(tmp_path: Path, ending: str) -> None:
    manifest = Manifest(write_random_manifest(tmp_path / "m", num_samples=200))
    means = PerSample(np.arange(200), np.zeros((200, 64), np.float32), np.full(200, -1), 0)
    path = tmp_path / "out" / f"features{ending}"
    path.parent.mkdir()
    with pytest.raises(UserError, match="could not be written.*no file was created"), no_file_above(20_000):
        features.write_features(path, means, manifest=manifest)
    assert not list(path.parent.iterdir())
    features.write_features(path, means, manifest=manifest)
    before = contents(path.parent)
    with pytest.raises(UserError, match="existing file is unchanged"), no_file_above(20_000):
        features.write_features(path, means, manifest=manifest)
    assert contents(path.parent) == before


@pytest.mark.parametrize("renames", [0, 1])
def test_an_array_never_stands_beside_the_list_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    """Of the two files of an .npy, the array is there only with its own list, wherever a run is interrupted."""
    manifest = Manifest(write_random_manifest(tmp_path / "m", num_samples=40))
    path, replace, done = tmp_path / "f.npy", files.os.replace, []

    def interrupted(source: Path, target: Path) -> None:
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(target)
        replace(source, target)

    def write(count: int) -> None:
        means = PerSample(np.arange(count), np.zeros((count, 8), np.float32), np.full(count, -1), 0)
        features.write_features(path, means, manifest=manifest)

    write(40)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files.os, "replace", interrupted)
        write(30)
    assert not path.exists()
    write(20)
    assert len(np.load(path)) == len(path.with_suffix(".clips.jsonl").read_text().splitlines()) == 20


def test_a_check_keeps_its_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c" / "v").mkdir(parents=True)
    for second in range(50):
        (tmp_path / "c" / "v" / f"{second}.mp4").touch()

    def reports(task: object, targets: object, **_: object) -> Iterator[tuple[object, FileReport]]:
        for target in targets:
            stamp = checking.file_stamp(target.path)
            yield target, FileReport(target.path, stamp, target.deep, findings=(Finding("truncated", "cut"),))

    monkeypatch.setattr(checking, "supervise", reports)
    with pytest.raises(UserError, match="cannot be written to.*not checked again"), no_file_above(5_000):
        check_chunks(tmp_path / "c", tmp_path / "out", settings=CheckSettings())
    assert not (tmp_path / "out" / checking.FINDINGS_FILE).exists()
    report = check_chunks(tmp_path / "c", tmp_path / "out", settings=CheckSettings())
    assert report.num_files == 50 and 5 < report.num_kept < 50


def test_a_repair_leaves_the_manifest_as_it_was(tmp_path: Path) -> None:
    folder = write_random_manifest(tmp_path / "m", num_samples=300)
    before = contents(folder)
    with pytest.raises(UserError, match="a manifest that was there is intact"), no_file_above(2_000):
        repair_manifest(folder, {"/chunks/a/15.mp4": ["truncated"]})
    assert contents(folder) == before


def test_scores_are_whole_or_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    class Result:
        def metrics(self) -> dict[str, float]:
            return {f"metric {number}": 0.5 for number in range(500)}

    monkeypatch.setattr("avion_dali.assembly.evaluators.evaluate_checkpoint", lambda *_: Result())
    path = tmp_path / "metrics.json"
    path.write_text("{}")
    arguments = ["--checkpoint", "c.pt", "--output", str(path)]
    with pytest.raises(UserError, match="existing file is unchanged"), no_file_above(1_000):
        evaluate.main(arguments)
    assert path.read_text() == "{}" and [p.name for p in tmp_path.iterdir()] == ["metrics.json"]
    assert evaluate.main(arguments) == 0
    assert len(json.loads(path.read_text())) == 500
