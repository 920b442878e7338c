"""Whole trainings on tiny videos: they learn, resume exactly, agree over ranks, and refuse bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import make_videos
import numpy as np
import pytest
import torch

from avion_dali.assembly.evaluators import open_evaluator
from avion_dali.assembly.open_clips import open_pool
from avion_dali.assembly.resolve import resolve
from avion_dali.assembly.run_model import build_model
from avion_dali.cli import evaluate, pretrain
from avion_dali.cli.arguments import parse_options
from avion_dali.config import TrainConfig
from avion_dali.contracts import UserError
from avion_dali.data.manifest import Manifest
from avion_dali.datasets.captions import build_captions_manifest
from avion_dali.engine.checkpoint import load_checkpoint
from avion_dali.engine.distributed import Distributed
from avion_dali.engine.run_log import read_rows

ROOT = Path(__file__).resolve().parent.parent
COMMON = [
    *("--decoder", "cpu-fused", "--data.num_frames", "2", "--data.frame_size", "32", "--data.workers", "1"),
    *("--model.size", "tiny", "--model.embed_dim", "32", "--model.context_length", "8"),
    *("--optim.global_batch", "8", "--optim.micro_batch", "4", "--optim.learning_rate", "1e-3"),
    *("--model.drop_path", "0.1", "--run.log_every", "1"),
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos of three seconds with 24 captions; `m` is the manifest."""
    folder = tmp_path_factory.mktemp("tiny")
    lines = ["video,start,end,text,verb,noun"]
    for v, name in enumerate("abc"):
        (folder / "chunks" / f"{name}.mp4").mkdir(parents=True)
        make_videos.write_video(
            folder / "chunks" / f"{name}.mp4" / "0.mp4", frames=90, size=(64, 48), first_number=100 * v
        )
        lines += [
            f"{name},{i / 3:.2f},{i / 3 + 0.6:.2f},cut the {name} {i},cut{i % 2},{name}" for i in range(8)
        ]
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    build_captions_manifest(folder / "chunks", folder / "captions.csv", output=folder / "m", jobs=1)
    # Ten clips: two ranks with four a batch leave one rank without any in the last batch.
    (folder / "ten.csv").write_text("\n".join(lines[:11]) + "\n")
    build_captions_manifest(folder / "chunks", folder / "ten.csv", output=folder / "ten", jobs=1)
    return folder


def options(dataset: Path, output: Path, *more: str) -> list[str]:
    return [*COMMON, "--data.train_manifest", str(dataset / "m"), "--output-dir", str(output), *more]


def launch(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def weights(output: Path) -> dict[str, torch.Tensor]:
    return dict(load_checkpoint(output / "checkpoint.pt").model)


def train_rows(output: Path) -> list[dict[str, float]]:
    return [row for row in read_rows(output / "log.jsonl") if row["kind"] == "train"]


def test_training_learns_evaluates_and_exports(dataset: Path, tmp_path: Path) -> None:
    held = ["--data.eval_manifest", str(dataset / "m"), "--optim.epochs", "20", "--run.eval_every", "10"]
    gentle = ["--model.drop_path", "0", "--optim.learning_rate", "2e-4", "--model.train_logit_scale", "true"]
    pretrain.main(options(dataset, tmp_path / "run", *held, *gentle))
    rows = read_rows(tmp_path / "run" / "log.jsonl")
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert len(losses) == 60
    assert np.mean(losses[-6:]) < np.mean(losses[:6]) - 0.2
    scores = [row["map_avg"] for row in rows if row["kind"] == "evaluation"]
    assert len(scores) == 2
    for key in ("clips_per_s", "data_wait_share", "learning_rate", "logit_scale", "accuracy", "replaced"):
        assert all(np.isfinite(row[key]) for row in train_rows(tmp_path / "run")), key
    out = tmp_path / "metrics.json"
    evaluate.main(["--checkpoint", str(tmp_path / "run" / "checkpoint.pt"), "--output", str(out)])
    metrics = json.loads(out.read_text())
    assert metrics["clips"] == 24
    assert metrics["map_avg"] == pytest.approx(scores[-1], abs=1e-6)
    exported = tmp_path / "run" / "weights.safetensors"
    assert exported.exists()
    evaluate.main(["--checkpoint", str(exported), "--output", str(out), "--frozen-frames", "true"])
    assert json.loads(out.read_text())["clips"] == 24


def test_killed_at_random_steps_and_resumed_with_other_worker_counts(dataset: Path, tmp_path: Path) -> None:
    """The same batches byte for byte, and the same final weights, as the run that was never killed."""
    script = [sys.executable, str(ROOT / "tests" / "recorded_training.py")]
    more = ("--optim.epochs", "4", "--run.save_every", "2")

    def run(name: str, kill_step: int, workers: int) -> int:
        arguments = options(dataset, tmp_path / name, *more, "--data.workers", str(workers))
        done = launch([*script, str(tmp_path / f"{name}.txt"), str(kill_step), *arguments])
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        return done.returncode

    assert run("whole", -1, 1) == 0
    expected = dict(line.split() for line in (tmp_path / "whole.txt").read_text().splitlines())
    assert len(expected) == 24  # 4 epochs x 3 steps x 2 micro-batches
    assert len(set(expected.values())) == 24
    kills = np.sort(np.random.default_rng().choice(np.arange(1, 12), 3, replace=False)).tolist()
    for kill_step, workers in zip(kills, (1, 2, 3), strict=True):
        assert run("killed", kill_step, workers) == -signal.SIGKILL, kills
    assert run("killed", -1, 2) == 0
    lines = [line.split() for line in (tmp_path / "killed.txt").read_text().splitlines()]
    assert {name for name, _ in lines} == set(expected)
    assert all(expected[name] == digest for name, digest in lines), kills
    before, after = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(before[name], after[name]) for name in before), kills


@pytest.mark.parametrize("sharding", ["replicate", "shard"])
def test_two_ranks_train_like_one(dataset: Path, tmp_path: Path, sharding: str) -> None:
    # A large epsilon: Adam's first steps otherwise turn the last bit of a tiny gradient into a full step.
    more = ["--run.max_steps", "3", "--model.drop_path", "0", "--optim.eps", "1e-2"]
    more += ["--data.eval_manifest", str(dataset / "ten"), "--optim.micro_batch"]
    pretrain.main(options(dataset, tmp_path / "one", *more, "8"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    shared = ["4", "--run.sharding", sharding]
    done = launch([*torchrun, "-m", "train.pretrain", *options(dataset, tmp_path / "two", *more, *shared)])
    assert done.returncode == 0, done.stderr
    one, two = (train_rows(tmp_path / name) for name in ("one", "two"))
    assert [r["loss"] for r in one] == pytest.approx([r["loss"] for r in two], abs=1e-5)
    assert [r["grad_norm"] for r in one] == pytest.approx([r["grad_norm"] for r in two], rel=1e-4)
    before, after = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in before:
        torch.testing.assert_close(after[name], before[name], atol=1e-5, rtol=0, msg=name)
    evaluations = [
        {name: row[name] for name in ("clips", "unreadable", "map_avg", "ndcg_avg")}
        for output in ("one", "two")
        for row in read_rows(tmp_path / output / "log.jsonl")
        if row["kind"] == "evaluation"
    ]
    assert evaluations[0]["clips"] == 10
    assert evaluations[0] == pytest.approx(evaluations[1], abs=1e-3)
    # What several ranks wrote, one process reads.
    out = tmp_path / "metrics.json"
    evaluate.main(
        ["--checkpoint", str(tmp_path / "two" / "weights.safetensors"), "--workers", "1", "--output", str(out)]
    )
    found = json.loads(out.read_text())
    assert {name: found[name] for name in evaluations[1]} == pytest.approx(evaluations[1], abs=1e-5)


def test_sigterm_saves_and_says_with_its_status_that_the_run_is_not_done(dataset: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "train.pretrain",
        *options(dataset, tmp_path / "run", "--optim.epochs", "500"),
    ]
    run = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=-1, text=True)
    try:
        deadline = time.monotonic() + 60
        while len(train_rows(tmp_path / "run")) < 4 and time.monotonic() < deadline:
            time.sleep(0.1)
        run.send_signal(signal.SIGTERM)
        console, _ = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 128 + signal.SIGTERM, console
    step = load_checkpoint(tmp_path / "run" / "checkpoint.pt").step
    assert f"SIGTERM: saved and stopped after step {step}" in console and 4 <= step < 1500
    assert (tmp_path / "run" / "report.html").exists()
    assert not (tmp_path / "run" / "weights.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--data.num_frame", "2"], "num_frame"),
        (["--data.num_frames", "two"], "data.num_frames"),
        (["--data.num_frames", "0"], "data.num_frames = 0 is not allowed; it must be >= 1"),
        (["--decoder", "nvdec"], "cpu-fused"),
        (["--decoder", "dali"], "avion-dali chunk --profile vp9"),
        (["--optim.global_batch", "10"], "optim.global_batch = 10 must be a multiple"),
        (["--optim.global_batch", "64"], "24 samples, fewer than one global batch"),
        (["--data.train_manifest", "/nowhere"], "/nowhere is not a manifest"),
        (["--data.train_manifest", ""], "data.train_manifest is not set"),
    ],
)
def test_bad_input_is_named(dataset: Path, tmp_path: Path, change: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        pretrain.main(options(dataset, tmp_path / "run", *change))
    assert message in str(caught.value)


def test_an_empty_section_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("data:\nrun: {seed: 1}\n")
    with pytest.raises(UserError, match="malformed, perhaps an empty section"):
        pretrain.main(["--config", str(tmp_path / "empty.yaml")])


@pytest.mark.skipif(not Path("/dev/shm").exists(), reason="looks at /dev/shm")
def test_evaluating_again_and_again_takes_no_more_shared_memory(dataset: Path, tmp_path: Path) -> None:
    def held() -> int:
        return os.statvfs("/dev/shm").f_blocks - os.statvfs("/dev/shm").f_bfree

    config = parse_options(TrainConfig, options(dataset, tmp_path / "run"), prog="p", description="d")
    run = resolve(config, Distributed())
    model, manifest = build_model(run, num_classes=0).eval(), Manifest(dataset / "m")
    with (
        open_pool(config.data) as pool,
        open_evaluator(run, model, manifest=manifest, pool=pool) as evaluate_now,
    ):
        first = evaluate_now(None).metrics()
        before = held()
        for _ in range(4):
            assert evaluate_now(None).metrics() == first
        assert held() <= before


def test_an_unknown_key_in_a_file_lists_the_allowed_ones(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("data: {num_frame: 8}\n")
    with pytest.raises(UserError, match=rf"unknown key data.num_frame in {bad}; data has: .*num_frames"):
        pretrain.main(["--config", str(bad)])
    bad.write_text("optimizer: {name: lamb}\n")
    with pytest.raises(UserError, match=rf"unknown key optimizer.name in {bad}; top-level keys are: .*optim"):
        pretrain.main([f"--config={bad}"])


def test_errors_reach_the_console_without_a_traceback() -> None:
    done = launch([sys.executable, "-m", "train.pretrain", "--data.crop_scale", "[0.5,2]"])
    assert done.returncode == 2
    assert done.stderr.startswith("error: data.crop_scale = (0.5, 2.0) is not allowed")
    assert "Traceback" not in done.stderr


def test_a_checkpoint_of_another_model_is_refused(dataset: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    pretrain.main(options(dataset, output, "--run.max_steps", "1"))
    with pytest.raises(UserError, match="another|mismatch|shape"):
        pretrain.main(options(dataset, output, "--run.max_steps", "2", "--model.embed_dim", "64"))
    with pytest.raises(UserError, match="resume"):
        pretrain.main(options(dataset, output, "--resume", "never"))
    for change in (["--model.activation", "quick_gelu"], ["--data.normalization", "imagenet"]):
        with pytest.raises(UserError, match=change[0].removeprefix("--")):
            pretrain.main(options(dataset, output, "--run.max_steps", "2", *change))


def test_chunks_that_change_or_vanish_are_replaced_and_listed(dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset / "chunks", tmp_path / "chunks")
    build_captions_manifest(tmp_path / "chunks", dataset / "captions.csv", output=tmp_path / "m", jobs=1)
    (tmp_path / "chunks" / "a.mp4" / "0.mp4").unlink()
    settings = ["--data.train_manifest", str(tmp_path / "m"), "--data.max_bad_fraction", "0.5"]
    pretrain.main(options(dataset, tmp_path / "run", *settings, "--optim.epochs", "1"))
    lines = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    bad = {json.loads(line)["sample_id"] for line in lines}
    manifest = Manifest(tmp_path / "m")
    assert {manifest.chunk(manifest.sample(i).first_chunk).video for i in bad} == {"a.mp4"}
    assert train_rows(tmp_path / "run")[-1]["replaced"] == 8
