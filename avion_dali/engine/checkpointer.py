"""Writes checkpoints, evaluates, and keeps the best weights, between optimizer steps."""

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
    """Saves and evaluates a run at the configured intervals.

    Args:
        state: the state to save; this class reads its step and updates its best metric.
        settings: folder and intervals.
        distributed: this process among all processes of the run.
        guard: checks the outstanding steps before anything is saved or evaluated.
        timer: timer that excludes the time of saving and evaluating.
        evaluate: called on every rank, with the model in evaluation mode; returns metrics.
        last_step: number of optimizer steps at the end of the run.
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
        """Save and evaluate at the ends of epochs and of the run; save at other steps when a save is due.

        Args:
            log: log for the metrics; the rows up to a saved step are written before it is saved.
            saves: whether any rank found the last checkpoint too old, see `is_late`.
            stops: whether the run stops after this step; it is then saved, and a due evaluation is left to the
                next start.
        """
        run, step = self.settings.run, self.state.step
        epoch, rest = divmod(step, self.state.order["steps_per_epoch"])
        if step == self.last_step or not rest:
            evaluates = step == self.last_step or epoch % run.eval_every == 0
            self.state.pending_evaluation = evaluates and self.evaluate is not None
            # Save before the evaluation, so that a failure in the evaluation does not lose training steps.
            log.flush()
            self.save_latest()
            if not stops:
                self.evaluate_if_due(log)
            return
        # With several ranks, a vote on saving arrives one step late, and once more after the save.
        is_late = saves and step - self.saved_step > 1
        if is_late or stops or (run.save_every and step % run.save_every == 0):
            log.flush()  # a run that resumes here does not write this step's row again
            self.save_latest()

    def save_latest(self) -> None:
        """Write `checkpoint.pt`, and a numbered copy if the run keeps numbered checkpoints.

        Raises:
            NonFiniteLossError: an outstanding step is not finite; nothing is written.
            UserError: the file could not be written; an existing one is unchanged.
        """
        self.save(LATEST_NAME)
        self._saved_at, self.saved_step = time.monotonic(), self.state.step
        if self.distributed.is_main and self.settings.run.keep_last:
            keep_numbered(self.settings.output_dir, self.state.step, keep_last=self.settings.run.keep_last)

    def save(self, name: str) -> None:
        """Write a checkpoint of the current step into the output folder on rank 0; every rank must call it.

        Args:
            name: file name.

        Raises:
            NonFiniteLossError: an outstanding step is not finite; nothing is written.
            UserError: the file could not be written; an existing one is unchanged.
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
            # Otherwise the other ranks would wait in their next collective and count it as step time.
            barrier()

    def evaluate_if_due(self, log: RunLog) -> None:
        """Evaluate if an evaluation is due, save the best weights, and record the evaluation in the checkpoint.

        If the run averages its weights, the average is evaluated.

        Args:
            log: log for the metrics.
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
        # The best file is written first. If the run is killed in between, it repeats the evaluation.
        if self._is_best():
            self.save(BEST_NAME)
        self.save_latest()

    def _is_best(self) -> bool:
        """Return whether the last evaluation is the best so far, and record it if it is."""
        name, best = self.settings.best_metric, self.state.best_metric
        if not name:
            return False
        if name not in self.metrics:
            raise UserError(
                f"the evaluation does not report the best metric {name!r}; choose one of "
                f"{', '.join(self.metrics)}"
            )
        # A comparison with NaN is false, so NaN is never the best.
        if not self.metrics[name] > (-math.inf if best is None else best):
            return False
        self.state.best_metric = self.metrics[name]
        return True


def keep_numbered(folder: Path, step: int, *, keep_last: int) -> None:
    """Keep the latest checkpoint under a second name with its step, and remove the oldest of these files.

    The second name is a hard link if the file system supports it, which takes no time, and no space until the
    latest checkpoint is replaced. The new name exists before an old one is removed.

    Args:
        folder: the folder of the run.
        step: step of the latest checkpoint.
        keep_last: number of numbered checkpoints to keep.

    Raises:
        UserError: the disk is full or the folder is not writable.
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
        # Renaming a file to another name of the same file does nothing and leaves both names.
        partial.unlink(missing_ok=True)
        for old in numbered_checkpoints(folder)[keep_last:]:
            old.unlink()
    except OSError as error:
        raise UserError(
            f"{path} could not be written next to {LATEST_NAME}: {error.strerror}; free disk space or choose "
            "another output_dir, then resume"
        ) from error
