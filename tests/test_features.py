"""Embeddings of videos and manifests: right rows, right numbers, nothing lost."""

import json
import runpy
import sys
from dataclasses import asdict, replace
from pathlib import Path

import make_videos
import numpy as np
import pytest
import torch
from safetensors import safe_open

from avion_dali.assembly.resolve import resolve
from avion_dali.assembly.run_model import build_model
from avion_dali.cli import features
from avion_dali.cli.main import build_parser
from avion_dali.config import DataConfig, ModelConfig, ObjectiveConfig, TrainConfig
from avion_dali.contracts import UserError
from avion_dali.data.manifest import Manifest
from avion_dali.data.planner import ClipRules, Planner
from avion_dali.datasets.captions import build_captions_manifest
from avion_dali.decode.cpu_fused import decode_clip
from avion_dali.device_ops.normalize import normalize_frames
from avion_dali.engine.checkpoint import export_safetensors
from avion_dali.engine.distributed import Distributed

CONFIG = TrainConfig(
    data=DataConfig(num_frames=2, frame_size=32),
    model=ModelConfig(size="tiny", embed_dim=8, context_length=8),
)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos of three seconds, and a file that is none."""
    folder = tmp_path_factory.mktemp("videos")
    for number, name in enumerate("ab"):
        path = folder / f"{name}.mp4"
        make_videos.write_video(path, frames=90, size=(64, 48), first_number=100 * number)
    (folder / "c.mp4").write_text("not a video")
    return folder


def model_of(config: TrainConfig, num_classes: int = 0) -> torch.nn.Module:
    return build_model(resolve(config, Distributed()), num_classes=num_classes)


def exported(folder: Path, config: TrainConfig, **more: int) -> Path:
    """Weights of a model as a training leaves them."""
    path = folder / "weights.safetensors"
    export_safetensors(model_of(config, **more), path, header={"config": asdict(config)})
    return path


def run(*arguments: object) -> int:
    parsed = build_parser().parse_args(
        ["features", *map(str, arguments), "--decoder", "cpu-fused", "--workers", "1"]
    )
    return features.run(parsed)


def contents(path: Path) -> tuple[dict[str, np.ndarray], list[dict[str, object]]]:
    with safe_open(path, framework="np") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        return arrays, json.loads(file.metadata()["clips"])


def test_videos_become_clips_with_names_and_times(videos: Path, tmp_path: Path):
    weights, output = exported(tmp_path, CONFIG), tmp_path / "f.safetensors"
    (tmp_path / "f.quarantine.jsonl").write_text("of an earlier run")
    files = (videos / "a.mp4", videos / "b.mp4")
    assert run(*files, "--checkpoint", weights, "--output", output, "--clip-seconds", 2) == 0
    arrays, clips = contents(output)
    assert [(c["video"], c["start_s"], c["end_s"]) for c in clips] == [
        ("a.mp4", 0.0, 2.0),
        ("a.mp4", 2.0, 3.0),
        ("b.mp4", 0.0, 2.0),
        ("b.mp4", 2.0, 3.0),
    ]
    assert arrays["features"].shape == (4, 8) and arrays["features"].dtype == np.float32
    assert np.allclose(np.linalg.norm(arrays["features"], axis=1), 1, atol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.safetensors", "weights.safetensors"]


def test_a_file_that_is_no_video_is_listed_and_changes_the_status(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    weights, output = exported(tmp_path, CONFIG), tmp_path / "f.safetensors"
    assert run(videos, "--checkpoint", weights, "--output", output) == 1
    assert [c["video"] for c in contents(output)[1]] == ["a.mp4", "b.mp4"]
    assert "1 files could not be read and have no embedding" in capsys.readouterr().err
    (row,) = map(json.loads, (tmp_path / "f.quarantine.jsonl").read_text().splitlines())
    assert row["path"] == str(videos / "c.mp4") and row["cause"] and row["sample_id"] is None
    assert not (tmp_path / "f.safetensors.work").exists()


def test_bad_videos_alone_are_named_with_their_reasons(videos: Path, tmp_path: Path):
    output = ("--checkpoint", "w.safetensors", "--output", tmp_path / "f.npy")
    with pytest.raises(UserError, match=r"none of the videos can be read:\n  .*/c\.mp4: \w+") as told:
        run(videos / "c.mp4", *output)
    assert ".work" not in str(told.value)
    assert [p.name for p in tmp_path.iterdir()] == ["f.quarantine.jsonl"]
    with pytest.raises(UserError, match=r"1 of the videos do not exist:\n  none\.mp4"):
        run(videos / "a.mp4", "none.mp4", *output)


def test_numbers_are_those_of_the_model_itself(videos: Path, tmp_path: Path):
    rows = [f"{name},{start},{start + 1},someone waits" for name in "ab" for start in (0, 1)]
    (tmp_path / "captions.csv").write_text("\n".join(["video,start,end,text", *rows]) + "\n")
    chunks = tmp_path / "chunks"
    for name in "ab":
        (chunks / f"{name}.mp4").mkdir(parents=True)
        (chunks / f"{name}.mp4" / "0.mp4").write_bytes((videos / f"{name}.mp4").read_bytes())
    build_captions_manifest(chunks, tmp_path / "captions.csv", output=tmp_path / "m", jobs=1)
    weights, output = exported(tmp_path, CONFIG), tmp_path / "f.npy"
    assert (
        run("--checkpoint", weights, "--manifest", tmp_path / "m", "--output", output, "--micro-batch", 3) == 0
    )
    manifest, model = Manifest(tmp_path / "m"), model_of(CONFIG).eval()
    planner = Planner(manifest, ClipRules.from_options(CONFIG.data, training=False), seed=0)
    frames = np.empty((4, 2, 32, 32, 3), np.uint8)
    for row in range(4):
        decode_clip(planner.plan(row, 0), frames[row : row + 1])
    with torch.inference_mode():
        expected = model.encode_video(normalize_frames(torch.from_numpy(frames), "openai"))
    assert np.allclose(np.load(output), expected.numpy(), atol=1e-5)
    lines = [json.loads(line) for line in output.with_suffix(".clips.jsonl").read_text().splitlines()]
    assert [line["sample_id"] for line in lines] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["classification", "masked-video"])
def test_other_models_give_the_encoders_features(videos: Path, tmp_path: Path, name: str):
    encoder = "videomae" if name == "masked-video" else "vit"
    model = replace(CONFIG.model, encoder=encoder)
    config = replace(CONFIG, model=model, objective=ObjectiveConfig(name=name))
    weights = exported(tmp_path, config, num_classes=3)
    output = tmp_path / "f.safetensors"
    assert run(videos / "a.mp4", "--checkpoint", weights, "--output", output, "--eval-crops", 3) == 0
    arrays, clips = contents(output)
    assert arrays["features"].shape == (1, 192) and len(clips) == 1


def test_another_number_of_frames_and_before_the_projection(videos: Path, tmp_path: Path):
    weights, output = exported(tmp_path, CONFIG), tmp_path / "f.safetensors"
    more = ("--num-frames", 4, "--before-projection", "--eval-clips", 2)
    assert run(videos / "b.mp4", "--checkpoint", weights, "--output", output, *more) == 0
    assert contents(output)[0]["features"].shape == (1, 192)


def test_unreadable_clips_are_counted_and_listed(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    own = tmp_path / "videos"
    own.mkdir()
    for name in "ab":
        (own / f"{name}.mp4").write_bytes((videos / f"{name}.mp4").read_bytes())
    build, damaged = features._build_manifest, own / "a.mp4"

    def build_and_damage(options: object, folder: Path) -> None:
        build(options, folder)
        damaged.write_bytes(damaged.read_bytes()[:1000])

    monkeypatch.setattr(features, "_build_manifest", build_and_damage)
    weights, output = exported(tmp_path, CONFIG), tmp_path / "f.safetensors"
    assert run(own, "--checkpoint", weights, "--output", output) == 1
    _, clips = contents(output)
    assert [clip["video"] for clip in clips] == ["b.mp4"]
    assert "1 clips could not be read" in capsys.readouterr().err
    assert str(damaged) in output.with_suffix(".quarantine.jsonl").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "f.txt", "a.mp4"], "must end in .safetensors or .npy"),
        (["--output", "f.npy"], "give either videos or --manifest"),
        (["--output", "f.npy", "a.mp4", "--manifest", "m"], "give either videos or --manifest"),
        (["--output", "f.npy", "a.mp4", "--clip-seconds", "-3"], "--clip-seconds -3 must be > 0"),
        (["--output", "f.npy", "a.mp4", "--clip-seconds", "nan"], "--clip-seconds nan"),
        (["--output", "f.npy", "a.mp4", "--eval-clips", "0"], "--eval-clips 0 must be at least 1"),
    ],
)
def test_bad_options_say_what_is_wanted(arguments: list[str], message: str):
    with pytest.raises(UserError, match=message):
        run("--checkpoint", "w.safetensors", *arguments)


@pytest.mark.parametrize("module", ["avion_dali", "train.features"])
def test_modules_for_several_processes_are_the_same_command(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    arguments = ["features"] if module == "avion_dali" else []
    monkeypatch.setattr(sys, "argv", [module, *arguments, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: avion-dali features ") and "--checkpoint" in shown
