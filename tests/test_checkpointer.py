"""Between steps: numbered checkpoints, and checkpoints by the clock."""

from __future__ import annotations

import errno
import os

import pytest
from toy_training import ToyLoader, make_loop, make_settings

from avion_dali.contracts import UserError
from avion_dali.engine.checkpoint import (
    find_checkpoint,
    load_checkpoint,
    numbered_checkpoints,
    numbered_name,
)


def test_numbered_checkpoints_are_kept_and_pruned(tmp_path):
    settings = make_settings(tmp_path, save_every=1, keep_last=2)
    scores = iter([0.1, 0.2])
    make_loop(tmp_path, settings=settings, evaluate=lambda: {"score": next(scores)}).run()
    kept = numbered_checkpoints(tmp_path)
    assert [path.name for path in kept] == ["checkpoint_00000006.pt", "checkpoint_00000005.pt"]
    assert [load_checkpoint(path).step for path in kept] == [6, 5]
    assert load_checkpoint(kept[0]).best_metric == 0.2  # written again after the evaluation
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_numbered_checkpoints_work_without_links(tmp_path, monkeypatch):
    def no_links(source: object, target: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_links)
    make_loop(tmp_path, settings=make_settings(tmp_path, save_every=1, keep_last=1, max_steps=2)).run()
    (kept,) = numbered_checkpoints(tmp_path)
    assert load_checkpoint(kept).step == 2


def test_a_lonely_numbered_checkpoint_is_named(tmp_path):
    for step in (9, 12):
        (tmp_path / numbered_name(step)).write_bytes(b"precious")
    with pytest.raises(UserError, match="contains checkpoint_00000012.pt but no checkpoint.pt: copy it"):
        find_checkpoint(tmp_path, "auto")


def test_minutes_between_checkpoints(tmp_path, monkeypatch):
    loop = make_loop(
        tmp_path,
        loader=ToyLoader(steps_per_epoch=100),
        settings=make_settings(tmp_path, save_minutes=1, max_steps=6),
    )
    clock = iter(range(0, 10_000, 25))
    saved = []
    save = loop.checkpointer.save
    monkeypatch.setattr(loop.checkpointer, "save", lambda name: (saved.append(loop.step), save(name)))
    monkeypatch.setattr("avion_dali.engine.checkpointer.time.monotonic", lambda: float(next(clock)))
    loop.checkpointer._saved_at = 0.0
    loop.run()
    assert len(saved) >= 2 and saved[0] < 6 and saved[-1] == 6
