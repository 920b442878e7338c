"""Between two optimizer steps: writes checkpoints, evaluates, and keeps the best weights."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch

from avion_dali.contracts import UserError
from avion_dali.engine.checkpoint import (
    BEST_NAME,
    LATEST_NAME,
    numbered_checkpoints,
    numbered_name,
    save_checkpoint,
)
from avion_dali.engine.distributed import Distributed, barrier
from avion_dali.engine.loop_settings import LoopSettings
from avion_dali.engine.loss_guard import FiniteGuard
from avion_dali.engine.run_log import RunLog
from avion_dali.engine.sharding import unsharded
from avion_dali.engine.timing import StepTimer
from avion_dali.engine.train_state import TrainState
from avion_dali.files import partial_path, put_in_place


class Checkpointer:
    """Saves and evaluates a run at the intervals that its settings state.

    Args:
        state: what is saved; its step is read here, and its best metric is kept here.
        settings: folder and intervals.
        distributed: this rank among all.
        guard: checks the outstanding steps before anything is saved or evaluated.
        timer: saving and evaluating are excluded from its step times.
        evaluate: called on every rank, with the model in evaluation mode; returns metrics.
        last_step: the number of optimizer steps at the run's end.
    """

    def __init__(
        self,
        state: TrainState,
        *,
        settings: LoopSettings,
        distributed: Distributed,
        guard: FiniteGuard,
        timer: StepTimer,
        evaluate: Callable[[], dict[str, float]] | None,
        last_step: int,
    ) -> None:
        self.state, self.settings, self.distributed = state, settings, distributed
        self.guard, self.timer, self.evaluate, self.last_step = guard, timer, evaluate, last_step
        self.metrics: dict[str, float] = {}
        self._saved_at = time.monotonic()
        self.saved_step = -1

    def is_late(self) -> bool:
        """Return whether the last checkpoint is older than `save_minutes`."""
        minutes = self.settings.run.save_minutes
        return minutes > 0 and time.monotonic() - self._saved_at >= minutes * 60

    def after_step(self, log: RunLog, *, saves: bool, stops: bool) -> None:
        """Save and evaluate at epoch ends and at the end of the run; between them save when it is due.

        Args:
            log: takes the metrics.
            saves: some rank found the last checkpoint to be too old, see `is_late`.
            stops: the run is to stop after this step: save it, and leave an evaluation to the next start.
        """
        run, step = self.settings.run, self.state.step
        epoch, rest = divmod(step, self.state.order["steps_per_epoch"])
        if step == self.last_step or not rest:
            evaluates = step == self.last_step or epoch % run.eval_every == 0
            self.state.pending_evaluation = evaluates and self.evaluate is not None
            # Before the evaluation, so that a failure in it loses no training.
            self.save_latest()
            if not stops:
                self.evaluate_if_due(log)
            return
        # Among several ranks a vote on saving arrives a step late, and once more before the save is known.
        is_late = saves and step - self.saved_step > 1
        if is_late or stops or (run.save_every and step % run.save_every == 0):
            self.save_latest()

    def save_latest(self) -> None:
        """Write `checkpoint.pt`, and keep it under its number too when the run keeps numbered ones.

        Raises:
            NonFiniteLossError: an outstanding step is not finite; nothing is written.
            UserError: the file could not be written; an older one is intact.
        """
        self.save(LATEST_NAME)
        self._saved_at, self.saved_step = time.monotonic(), self.state.step
        if self.distributed.is_main and self.settings.run.keep_last:
            keep_numbered(self.settings.output_dir, self.state.step, keep_last=self.settings.run.keep_last)

    def save(self, name: str) -> None:
        """Write a checkpoint of the current step into the output folder, on rank 0; every rank calls it.

        Args:
            name: file name.

        Raises:
            NonFiniteLossError: an outstanding step is not finite; nothing is written.
            UserError: the file could not be written; an older one is intact.
        """
        self.guard.check()
        with self.timer.excluded():
            checkpoint = self.state.capture(
                config=self.settings.config,
                world_size=self.distributed.world_size,
                keep=self.distributed.is_main,
            )
            if self.distributed.is_main:
                save_checkpoint(self.settings.output_dir / name, checkpoint)
            # Otherwise the other ranks would wait in their next collective, and count it as time of a step.
            barrier()

    def evaluate_if_due(self, log: RunLog) -> None:
        """Do an evaluation that is due, save the best weights, and record in the checkpoint that it is done.

        Where the run averages its weights, the average is evaluated.

        Args:
            log: takes the metrics.
        """
        if self.evaluate is None or not self.state.pending_evaluation:
            return
        self.guard.check()
        model, average = self.state.model, self.state.average
        model.eval()
        with (
            self.timer.excluded(),
            average.applied() if average else nullcontext(),
            unsharded(model),
            torch.no_grad(),
        ):
            self.metrics = self.evaluate()
        model.train()
        log.evaluation(self.state.step, self.metrics)
        self.state.pending_evaluation = False
        # The best file is written first: a kill in between repeats the evaluation and does not lose the best.
        if self._is_best():
            self.save(BEST_NAME)
        self.save_latest()

    def _is_best(self) -> bool:
        """Return whether the last evaluation is better than all before, and record it."""
        name, best = self.settings.best_metric, self.state.best_metric
        if not name:
            return False
        if name not in self.metrics:
            raise UserError(f"best metric {name!r} is not evaluated; choose from {', '.join(self.metrics)}")
        # NaN compares as false, so it is never the best.
        if not self.metrics[name] > (-math.inf if best is None else best):
            return False
        self.state.best_metric = self.metrics[name]
        return True


def keep_numbered(folder: Path, step: int, *, keep_last: int) -> None:
    """Give the latest checkpoint a second name with its step, and remove the oldest of these names.

    The second name is a hard link where the file system supports them: it takes no time, and no space until the
    latest is replaced. The newest names are in place before an old one is removed.

    Args:
        folder: the folder of the run.
        step: of the latest checkpoint.
        keep_last: number of numbered checkpoints that are kept.

    Raises:
        UserError: the folder is full or may not be written.
    """
    path = folder / numbered_name(step)
    partial = partial_path(path)
    try:
        partial.unlink(missing_ok=True)
        try:
            os.link(folder / LATEST_NAME, partial)
        except OSError:  # a file system without links
            shutil.copyfile(folder / LATEST_NAME, partial)
        put_in_place(partial, path)
        # Renaming onto another name of the same file does nothing and leaves both names.
        partial.unlink(missing_ok=True)
        for old in numbered_checkpoints(folder)[keep_last:]:
            old.unlink()
    except OSError as error:
        raise UserError(
            f"{path} could not be kept beside {LATEST_NAME}: {error.strerror}; free space or choose "
            "another output_dir, then resume"
        ) from error
