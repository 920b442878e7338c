"""The run log: rows, resume without repeated steps, JSON that stays JSON, TensorBoard."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from avion_dali.contracts import UserError
from avion_dali.engine.run_log import (
    LOG_NAME,
    TENSORBOARD_FOLDER,
    RunLog,
    command_line,
    read_rows,
)
from avion_dali.engine.timing import WindowTiming
from avion_dali.engine.train_row import TrainRow


def write_run(folder, steps, *, resume_step=0, **more):
    with RunLog(folder, total_steps=9, resume_step=resume_step, tensorboard=False, **more) as log:
        log.header(resume_step, {"world_size": 1})
        for step in steps:
            log.train(step, {"loss": 1.0 / step})
            if step % 3 == 0:
                log.evaluation(step, {"map_avg": step / 10})
            log.advance()


def kinds_and_steps(folder):
    return [(row["kind"][0], row["step"]) for row in read_rows(folder / LOG_NAME)]


def test_rows_carry_kind_step_and_values(tmp_path, capsys):
    write_run(tmp_path, [1, 2, 3])
    rows = read_rows(tmp_path / LOG_NAME)
    assert kinds_and_steps(tmp_path) == [("h", 0), ("t", 1), ("t", 2), ("t", 3), ("e", 3)]
    assert rows[2] == {"kind": "train", "step": 2, "loss": 0.5}
    assert rows[0]["command"] == command_line() and rows[0]["versions"]["torch"]
    printed = capsys.readouterr().out
    assert "world_size: 1" in printed and "train step 2  loss 0.5" in printed and "map_avg 0.3" in printed


def test_command_line_can_be_pasted():
    assert shlex.split(command_line()) == sys.orig_argv


def test_resume_drops_what_will_be_written_again(tmp_path):
    write_run(tmp_path, [1, 2, 3, 4, 5])
    write_run(tmp_path, [4, 5, 6], resume_step=3)
    steps = [("h", 0), ("t", 1), ("t", 2), ("t", 3), ("e", 3), ("h", 3), ("t", 4), ("t", 5), ("t", 6), ("e", 6)]
    assert kinds_and_steps(tmp_path) == steps


def test_pending_evaluation_is_not_kept_twice(tmp_path):
    write_run(tmp_path, [1, 2, 3])
    write_run(tmp_path, [], resume_step=3, evaluation_pending=True)
    assert kinds_and_steps(tmp_path) == [("h", 0), ("t", 1), ("t", 2), ("t", 3), ("h", 3)]


def test_line_cut_by_a_kill_is_ignored_and_repaired(tmp_path):
    write_run(tmp_path, [1, 2])
    path = tmp_path / LOG_NAME
    path.write_text(path.read_text() + '{"kind": "train", "st')
    assert kinds_and_steps(tmp_path)[-1] == ("t", 2)
    write_run(tmp_path, [3], resume_step=2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 2, 3, 3]


def test_missing_log_has_no_rows(tmp_path):
    assert read_rows(tmp_path / "none.jsonl") == []


def test_values_json_cannot_hold_become_null_or_text(tmp_path):
    with RunLog(tmp_path, total_steps=1, tensorboard=False) as log:
        log.train(1, {"loss": float("nan"), "nested": {"a": (1, float("inf"))}, "path": tmp_path, "none": None})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    row = json.loads((tmp_path / LOG_NAME).read_text(), parse_constant=refuse)
    assert row["loss"] is None and row["nested"] == {"a": [1, None]}
    assert row["path"] == str(tmp_path) and row["none"] is None


def test_other_ranks_are_silent(tmp_path, capsys):
    write_run(tmp_path / "x", [1, 2, 3], enabled=False)
    assert not (tmp_path / "x").exists() and capsys.readouterr().out == ""


def test_rows_are_on_disk_at_once_and_close_may_repeat(tmp_path):
    log = RunLog(tmp_path, total_steps=1, tensorboard=False)
    log.train(1, {"loss": 1.0})
    assert len(read_rows(tmp_path / LOG_NAME)) == 1
    log.close()
    log.close()


def test_unwritable_folder_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="log.jsonl could not be written"):
        RunLog(tmp_path / "file", total_steps=1, tensorboard=False)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_is_a_user_error(tmp_path):
    with open("/dev/full", "w") as full, RunLog(tmp_path, total_steps=1, tensorboard=False) as log:
        log._file.close()
        log._file = full
        with pytest.raises(UserError, match="log.jsonl could not be written: No space left"):
            log.train(1, {"loss": 1.0})


def test_tensorboard_gets_the_numbers(tmp_path):
    with RunLog(tmp_path, total_steps=2) as log:
        log.train(1, {"loss": 0.5, "decoder": "toy"})
        log.evaluation(2, {"map_avg": 0.25})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / TENSORBOARD_FOLDER))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "evaluation/map_avg"}
    assert [(e.step, e.value) for e in events.Scalars("evaluation/map_avg")] == [(2, 0.25)]


TIMING = WindowTiming(
    steps=2, step_s=0.5, data_wait_s=0.1, data_wait_share=0.2, clips_per_s=64.0, memory_mb=9.0
)


def row_of(loss: float) -> TrainRow:
    return TrainRow({"loss": torch.tensor(loss)}, TIMING, counts={}, facts={})


def test_row_of_a_single_process():
    numbers = {"loss": torch.tensor(2.0), "accuracy": torch.tensor(0.5)}
    counts, facts = {"delivered": 8, "replaced": 1, "energy_j": 0}, {"epoch": 3, "energy_j": None}
    row = TrainRow(numbers, TIMING, counts=counts, facts=facts).values()
    assert row == {
        "loss": 2.0,
        "accuracy": 0.5,
        "clips_per_s": 64.0,
        "clips_per_s_per_rank": 64.0,
        "step_s": 0.5,
        "data_wait_s": 0.1,
        "data_wait_share": pytest.approx(0.2),
        "memory_mb": 9.0,
        "delivered": 8,
        "replaced": 1,
        "epoch": 3,
    }
    on_gpu = TrainRow(numbers, replace(TIMING, gpu_idle_share=0.125), counts=counts, facts=facts).values()
    assert on_gpu == row | {"gpu_idle_share": 0.125}


def test_a_row_whose_numbers_are_on_their_way_is_written_before_what_follows(tmp_path):
    def late(loss: float) -> TrainRow:
        row = row_of(loss)
        row._over_ranks._arrived = SimpleNamespace(synchronize=lambda: None)
        return row

    with RunLog(tmp_path, total_steps=9, tensorboard=False) as log:
        log.queue(1, row_of(1.0))
        assert kinds_and_steps(tmp_path) == [("t", 1)] and log.loss == 1.0
        log.queue(2, late(2.0))
        assert kinds_and_steps(tmp_path) == [("t", 1)] and log.loss == 1.0
        log.advance()
        assert kinds_and_steps(tmp_path) == [("t", 1), ("t", 2)] and log.loss == 2.0
        log.queue(3, late(3.0))
        log.queue(4, late(4.0))
        log.evaluation(4, {})
        log.queue(5, late(5.0))
        log.end(5, {"stopped_by": ""})
        log.queue(6, late(math.nan))  # the step that ends the run with an error
    steps = [("t", 1), ("t", 2), ("t", 3), ("t", 4), ("e", 4), ("t", 5), ("e", 5)]
    assert kinds_and_steps(tmp_path) == steps
