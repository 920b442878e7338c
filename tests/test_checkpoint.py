"""Checkpoints: whole or absent, clear errors, and resuming to identical weights after a kill."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from toy_training import ToyLoader, assert_same, make_loop, make_settings, weights

from avion_dali.contracts import UserError
from avion_dali.engine import checkpoint as module
from avion_dali.engine.checkpoint import (
    BEST_NAME,
    LATEST_NAME,
    Checkpoint,
    atomic_write,
    export_safetensors,
    find_checkpoint,
    load_checkpoint,
    restore_model,
    restore_optimizer,
    save_checkpoint,
    software_versions,
)
from avion_dali.engine.run_log import LOG_NAME, read_rows
from avion_dali.engine.sharding import gathered
from avion_dali.models.safetensors_files import read_safetensors


def make_checkpoint(step: int = 4, size: int = 3) -> Checkpoint:
    return Checkpoint(
        model={"weight": torch.arange(size, dtype=torch.float32)},
        optimizer={"state": {}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0]}]},
        scaler={},
        step=step,
        order={"seed": 1},
        best_metric=0.25,
        pending_evaluation=True,
        config={"data": {"crop_scale": (0.5, 1.0), "train_manifest": ""}, "none": None},
        world_size=2,
    )


def test_round_trip_and_safe_to_load(tmp_path):
    path = tmp_path / "new" / "c.pt"
    save_checkpoint(path, make_checkpoint())
    loaded = load_checkpoint(path)
    assert torch.equal(loaded.model["weight"], torch.arange(3.0))
    assert (loaded.step, loaded.best_metric, loaded.pending_evaluation) == (4, 0.25, True)
    assert loaded.config["data"]["crop_scale"] == (0.5, 1.0)
    assert loaded.versions["torch"] and loaded.world_size == 2
    raw = torch.load(path, weights_only=True)
    assert raw["format"] == "avion_dali checkpoint" and raw["format_version"] == 2


def test_versions_name_what_numbers_depend_on():
    versions = software_versions()
    assert {"avion_dali", "python", "torch", "numpy", "av"} <= versions.keys()


class FullDisk:
    """Stands in for torch.save: writes a little, then the disk is full."""

    def __call__(self, content: object, file: object) -> None:
        file.write(b"some bytes")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_keeps_the_old_file_and_names_the_path(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    save_checkpoint(path, make_checkpoint(step=1))
    monkeypatch.setattr(module.torch, "save", FullDisk())
    with pytest.raises(UserError, match="c.pt could not be written: No space left.*existing file is unchanged"):
        save_checkpoint(path, make_checkpoint(step=2))
    monkeypatch.undo()
    assert load_checkpoint(path).step == 1
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


LIMIT_SCRIPT = """
import resource, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_checkpoint import make_checkpoint
from avion_dali.contracts import UserError
from avion_dali.engine.checkpoint import load_checkpoint, save_checkpoint
folder = Path(sys.argv[1])
save_checkpoint(folder / "c.pt", make_checkpoint(step=1))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for name in ("c.pt", "new.pt"):
    try:
        save_checkpoint(folder / name, make_checkpoint(step=2, size=200_000))
    except UserError as error:
        sys.stdout.write(str(error) + chr(10))
assert load_checkpoint(folder / "c.pt").step == 1
"""


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_real_write_failure_inside_torch_is_a_user_error(tmp_path):
    script = LIMIT_SCRIPT.format(tests=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert "c.pt could not be written: File too large; the existing file is unchanged" in first
    assert "new.pt could not be written: File too large; no file was created" in second
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_interrupted_write_leaves_nothing(tmp_path):
    def interrupt(file: object) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "x", interrupt)
    assert list(tmp_path.iterdir()) == []


def test_errors_that_are_not_the_disks_are_not_hidden(tmp_path):
    def fail(file: object) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        atomic_write(tmp_path / "x", fail)


def test_unwritable_folder_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        atomic_write(tmp_path / "file" / "x", lambda file: None)


def damaged(kind: str, whole: bytes) -> bytes:
    flipped = bytearray(whole)
    position = whole.index(torch.arange(1000.0).numpy().tobytes()) + 100
    flipped[position] ^= 0xFF
    return {
        "empty": b"",
        "truncated": whole[: len(whole) // 2],
        "without its last byte": whole[:-1],
        "bit flip in the weights": bytes(flipped),
        "text": b"hello",
    }[kind]


@pytest.mark.parametrize(
    "kind", ["empty", "truncated", "without its last byte", "bit flip in the weights", "text"]
)
def test_damaged_files_are_user_errors(tmp_path, kind):
    path = tmp_path / "c.pt"
    save_checkpoint(path, make_checkpoint(size=1000))
    path.write_bytes(damaged(kind, path.read_bytes()))
    with pytest.raises(UserError, match="c.pt cannot be read as a checkpoint"):
        load_checkpoint(path)


def test_missing_foreign_newer_and_incomplete_files_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint file at .*x.pt"):
        load_checkpoint(tmp_path / "x.pt")
    torch.save({"state_dict": {}}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="x.pt is not an avion_dali checkpoint"):
        load_checkpoint(tmp_path / "x.pt")
    torch.save({"format": module.FORMAT, "format_version": 99}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="format version 99"):
        load_checkpoint(tmp_path / "x.pt")
    torch.save({"format": module.FORMAT, "format_version": 1}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="lacks the entry 'model'"):
        load_checkpoint(tmp_path / "x.pt")


def test_pickled_code_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "boom"),)

    torch.save({"format": module.FORMAT, "format_version": 1, "model": Bomb()}, tmp_path / "c.pt")
    with pytest.raises(UserError, match="cannot be read"):
        load_checkpoint(tmp_path / "c.pt")
    assert not (tmp_path / "boom").exists()


def test_another_model_is_named_by_its_keys_and_changes_nothing():
    model = nn.Linear(2, 2)
    before = weights(model)
    state = {"weight": torch.ones(3, 2), **{f"extra{i}": torch.ones(1) for i in range(5)}}
    with pytest.raises(UserError) as caught:
        restore_model(model, state, source="f.pt")
    message = str(caught.value)
    assert "f.pt contains another model" in message and "missing: bias" in message
    assert "unexpected: extra0, extra1, extra2 and 2 more" in message
    assert "weight (3, 2) instead of (2, 2)" in message
    assert_same(before, weights(model))


def test_other_parameter_groups_are_a_user_error():
    one = torch.optim.AdamW(nn.Linear(2, 2).parameters())
    two = torch.optim.AdamW(nn.Linear(2, 2, bias=False).parameters())
    with pytest.raises(UserError, match="other parameter groups"):
        restore_optimizer(one, two.state_dict(), source="f.pt")
    split = torch.optim.AdamW([{"params": [p]} for p in nn.Linear(2, 2).parameters()])
    with pytest.raises(UserError, match="other parameter groups"):
        restore_optimizer(one, split.state_dict(), source="f.pt")


def test_only_parameters_that_had_a_gradient_have_moments_after_a_resume(tmp_path):
    """A parameter's first step is its first: nothing invents moments or step counts for it."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    for used in (0, 1):
        saved = gathered(optimizer.state_dict(), keep=True)
        assert len(optimizer.state) == len(saved["state"]) == 2 * used
        resumed = torch.optim.AdamW(model.parameters())
        restore_optimizer(resumed, saved, source="f.pt")
        assert len(resumed.state) == 2 * used
        model[0](torch.ones(1, 2)).sum().backward()
        optimizer.step()


def test_moments_are_restored_but_options_stay_the_runs_own():
    model = nn.Linear(2, 2)
    saved = torch.optim.AdamW(model.parameters(), weight_decay=0.5)
    model(torch.ones(1, 2)).sum().backward()
    saved.step()
    current = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    restore_optimizer(current, saved.state_dict(), source="f.pt")
    assert current.param_groups[0]["weight_decay"] == 0.1
    key = next(iter(model.parameters()))
    assert torch.equal(current.state[key]["exp_avg"], saved.state[key]["exp_avg"])


def test_find_checkpoint_follows_resume_and_removes_leftovers(tmp_path):
    assert find_checkpoint(tmp_path / "none", "auto") is None
    assert find_checkpoint(tmp_path, "never") is None
    leftover = tmp_path / f".{LATEST_NAME}.partial"
    leftover.write_bytes(b"half")
    save_checkpoint(tmp_path / LATEST_NAME, make_checkpoint())
    leftover.write_bytes(b"half")
    assert find_checkpoint(tmp_path, "auto") == tmp_path / LATEST_NAME
    assert not leftover.exists()
    with pytest.raises(UserError, match="resume = never"):
        find_checkpoint(tmp_path, "never")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(3, 3, bias=False)
        self.right = nn.Linear(3, 3, bias=False)
        self.right.weight = self.left.weight


def test_safetensors_describe_themselves_and_load_back(tmp_path):
    path, model = tmp_path / "w.safetensors", Tied()
    export_safetensors(model, path, header={"config": {"model": {"size": "tiny"}}, "step": 3})
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["avion_dali"])
    assert header["config"]["model"]["size"] == "tiny" and header["versions"]["torch"]
    state, described = read_safetensors(path)
    assert described == header
    other = Tied()
    restore_model(other, state, source="w")
    assert_same(weights(model), weights(other))


def test_weights_that_cannot_be_read_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="none.safetensors"):
        read_safetensors(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"12345678 nothing")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        read_safetensors(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("accum_steps", [1, 2])
def test_resume_anywhere_gives_identical_weights_and_log(tmp_path, accum_steps):
    straight = make_loop(tmp_path / "a", loader=ToyLoader(accum_steps=accum_steps))
    straight.run()
    settings = make_settings(tmp_path / "b", save_every=1)
    for stop in (1, 2, 4, 6):
        part = replace(settings, run=replace(settings.run, max_steps=stop))
        resumed = make_loop(tmp_path / "b", loader=ToyLoader(accum_steps=accum_steps), settings=part)
        path = find_checkpoint(tmp_path / "b", "auto")
        if path is not None:
            resumed.restore(path)
        resumed.run()
    assert_same(weights(straight.model), weights(resumed.model))
    left, right = (load_checkpoint(tmp_path / name / LATEST_NAME) for name in "ab")
    for key, state in left.optimizer["state"].items():
        for name, value in state.items():
            assert torch.equal(value, right.optimizer["state"][key][name])
    losses = [[r["loss"] for r in read_rows(tmp_path / n / LOG_NAME) if r["kind"] == "train"] for n in "ab"]
    assert losses[0] == losses[1]


KILL_SCRIPT = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from toy_training import make_loop, make_settings
from avion_dali.engine import checkpoint
folder = Path(sys.argv[1])
train_loop = make_loop(folder, settings=make_settings(folder, save_every=1))
save = torch.save

def die_in_the_middle_of_the_fifth_save(content, file):
    if content["step"] < 5:
        return save(content, file)
    file.write(b"half a checkpoint")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

checkpoint.torch.save = die_in_the_middle_of_the_fifth_save
train_loop.run()
"""


def test_sigkill_while_saving_then_resume_gives_identical_weights(tmp_path):
    killed = tmp_path / "killed"
    script = KILL_SCRIPT.format(tests=str(Path(__file__).parent))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(killed)], env=environment, capture_output=True, timeout=60
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    leftover = killed / f".{LATEST_NAME}.partial"
    assert leftover.exists()
    path = find_checkpoint(killed, "auto")
    assert path is not None and not leftover.exists()
    resumed = make_loop(killed, settings=make_settings(killed, save_every=1))
    resumed.restore(path)
    assert resumed.step == 4
    resumed.run()
    straight = make_loop(tmp_path / "straight")
    straight.run()
    assert_same(weights(straight.model), weights(resumed.model))
    steps = [r["step"] for r in read_rows(killed / LOG_NAME) if r["kind"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_resume_refuses_another_order(tmp_path):
    make_loop(tmp_path).run()
    settings = make_settings(tmp_path)
    other = make_loop(tmp_path, settings=replace(settings, run=replace(settings.run, seed=4)))
    with pytest.raises(UserError, match="seed was 3, is 4"):
        other.restore(tmp_path / LATEST_NAME)


def test_files_of_the_first_format_still_load(tmp_path):
    save_checkpoint(tmp_path / "c.pt", make_checkpoint())
    content = torch.load(tmp_path / "c.pt", weights_only=True)
    for name in ("average", "spikes"):
        del content[name]
    torch.save({**content, "format_version": 1}, tmp_path / "c.pt")
    assert load_checkpoint(tmp_path / "c.pt").average == {}


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_lonely_best_checkpoint_is_not_overwritten(tmp_path, resume):
    (tmp_path / BEST_NAME).write_bytes(b"precious")
    with pytest.raises(UserError, match="a new run would overwrite it"):
        find_checkpoint(tmp_path, resume)
    assert (tmp_path / BEST_NAME).read_bytes() == b"precious"


def test_ctrl_c_while_saving_stays_ctrl_c(tmp_path):
    path = tmp_path / LATEST_NAME
    path.write_bytes(b"old")

    def write(file):
        file.write(b"half")
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("unexpected position")  # as torch's zip writer says when it is closed early

    with pytest.raises(KeyboardInterrupt):
        module.atomic_write(path, write)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
