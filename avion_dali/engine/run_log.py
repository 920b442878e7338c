"""Writes the log of a run: one console line and one JSON line per log step, and TensorBoard curves.

`log.jsonl` contains rows of five kinds: `header` (one per start: command, versions, configuration), `train`,
`evaluation`, `spike` (a step whose loss jumped) and `end` (time and energy of one start). When a run resumes at
step s, rows for steps after s are removed, so that each step appears once, as if the run had never stopped.
Only the time and energy of the removed rows are kept, in an `end` row.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from tqdm import tqdm

from avion_dali.contracts import UserError
from avion_dali.engine.checkpoint import software_versions
from avion_dali.engine.distributed import all_gather_rows
from avion_dali.engine.loss_guard import LossSpike
from avion_dali.engine.train_row import TrainRow
from avion_dali.files import atomic_write_text
from avion_dali.wording import printable

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

LOG_NAME = "log.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
_LOG_ROW: Mapping[str, type] = {"kind": str, "step": int}
_BAR_UPDATE_S = 1.0


def command_line() -> str:
    """Return the command that started this process, quoted for a shell."""
    return shlex.join(sys.orig_argv)


def read_rows(path: Path, needs: Mapping[str, type] = _LOG_ROW) -> list[dict[str, Any]]:
    """Read a `log.jsonl`; lines that are not rows are left out, such as one cut off by a kill.

    Args:
        path: the file; it need not exist.
        needs: the entries that every row must have, and their types.

    Returns:
        The rows in order; empty if the file does not exist.
    """
    if not path.exists():
        return []
    found = map(_read_row, path.read_text(encoding="utf-8", errors="replace").split("\n"))
    return [row for row in found if all(isinstance(row.get(key), kind) for key, kind in needs.items())]


def _read_row(line: str) -> dict[str, Any]:
    """Return the row in a line; an empty one when there is none."""
    with suppress(ValueError, RecursionError):
        if isinstance(row := json.loads(line), dict):
            return row
    return {}


def _drop_rows_after(path: Path, step: int, *, evaluation_pending: bool) -> None:
    """Remove the rows that a resumed run will write again, but keep their time and energy."""

    def is_kept(row: dict[str, Any]) -> bool:
        again = evaluation_pending and row["kind"] == "evaluation" and row["step"] == step
        return row["kind"] == "header" or (row["step"] <= step and not again)

    rows = read_rows(path)
    kept = [row for row in rows if is_kept(row)]
    if rows and rows[-1]["step"] > step and "elapsed_s" in rows[-1]:
        used = {name: rows[-1].get(name, 0) for name in ("elapsed_s", "energy_j")}
        kept.append({"kind": "end", "step": step, **used, "stopped_by": "unknown"})
    atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in kept))


def _plain(value: Any) -> Any:
    """Return a value that JSON can represent; numbers that are not finite become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | bool | None) else str(value)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def sum_over_ranks(number: int, device: torch.device) -> int:
    """Add up a number over ranks; every rank must call it.

    Args:
        number: the number of this rank.
        device: device of the process group's tensors.
    """
    return int(all_gather_rows(torch.tensor([number], device=device)).sum())


class RunLog:
    """The log of one run, written by rank 0 only.

    Args:
        output_dir: folder for `log.jsonl` and `tensorboard/`.
        total_steps: number of steps at the end of the run, for the progress bar.
        resume_step: number of steps done before; rows of later steps are removed.
        evaluation_pending: whether the evaluation of `resume_step` will be done again.
        enabled: False on ranks other than 0, where nothing is written or printed.
        tensorboard: whether to write TensorBoard curves.

    Attributes:
        loss: loss of the last row that was queued and written, on every rank; NaN if there was none.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        total_steps: int,
        resume_step: int = 0,
        evaluation_pending: bool = False,
        enabled: bool = True,
        tensorboard: bool = True,
    ) -> None:
        self.enabled = enabled
        self.loss = math.nan
        self._queued: tuple[int, TrainRow] | None = None
        self._writer: SummaryWriter | None = None
        if not enabled:
            return
        self._path = output_dir / LOG_NAME
        if self._path.exists():
            _drop_rows_after(self._path, resume_step, evaluation_pending=evaluation_pending)
        self._file = self._open()
        # disable=None shows no bar if the output is a file or a pipe.
        self._bar = tqdm(
            total=total_steps, initial=resume_step, unit="step", disable=None, mininterval=_BAR_UPDATE_S
        )
        if tensorboard:
            # Imported here because it takes seconds, and tools that only read logs do not need it.
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(output_dir / TENSORBOARD_FOLDER), purge_step=resume_step + 1)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def header(self, step: int, facts: Mapping[str, Any]) -> None:
        """Write and print a header row for this start of the run.

        Args:
            step: number of steps done before.
            facts: plain values (configuration, batch sizes, world size, ...); the command line and versions are
                added.
        """
        row = {
            "kind": "header",
            "step": step,
            "command": command_line(),
            **facts,
            "versions": software_versions(),
        }
        self._write(row)
        for key, value in row.items():
            if key not in ("kind", "config"):
                self._say(f"{key}: {_plain(value)}")

    def train(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one training row.

        Args:
            step: optimizer steps done.
            values: name to number or string.
        """
        self._record("train", step, values)

    def queue(self, step: int, row: TrainRow) -> None:
        """Write one training row, at once or, if its numbers are still on their way, after the next step.

        Args:
            step: optimizer steps done.
            row: the numbers.
        """
        self.flush()
        self._queued = step, row
        if row.is_immediate:
            self.flush()

    def flush(self) -> None:
        """Write the row that is queued, if there is one; this waits for its numbers."""
        if self._queued is not None:
            step, row = self._queued
            self._queued, values = None, row.values()
            self.loss = values["loss"]
            self.train(step, values)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one evaluation row.

        Args:
            step: optimizer steps done.
            metrics: name to number.
        """
        self.flush()
        self._record("evaluation", step, metrics)

    def spikes(self, spikes: Sequence[LossSpike], *, skipped: bool) -> None:
        """Write one row per step whose loss jumped.

        Args:
            spikes: the spikes since the last call.
            skipped: whether the updates of these steps were skipped.
        """
        for spike in spikes:
            self._record("spike", spike.step + 1, {**asdict(spike), "step": spike.step + 1, "skipped": skipped})

    def end(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the time and energy that this process has used, and the signal that stopped it, if any.

        Args:
            step: optimizer steps done.
            values: name to number or string.
        """
        self.flush()
        self._write({"kind": "end", "step": step, **values})
        if values["stopped_by"]:
            self._say(f"{values['stopped_by']}: saved and stopped after step {step}; start again to continue")

    def advance(self) -> None:
        """Note that a step is done: write the row of the step before, and move the progress bar."""
        self.flush()
        if self.enabled:
            self._bar.update()

    def close(self) -> None:
        """Close all files; it may be called more than once. A queued row is dropped."""
        if not self.enabled:
            return
        self._bar.close()
        with suppress(OSError):  # a full disk has already been reported when a row was written
            self._file.close()
        if self._writer is not None:
            self._writer.close()

    def _open(self) -> TextIO:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            return self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"{self._path} could not be written: {error.strerror}; free disk space or choose another output_dir"
        )

    def _record(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        self._write({"kind": kind, "step": step, **values})
        self._say(f"{kind} step {step}  " + "  ".join(f"{name} {_short(v)}" for name, v in values.items()))
        if self._writer is None:
            return
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(f"{kind}/{name}", value, step)

    def _write(self, row: Mapping[str, Any]) -> None:
        if not self.enabled:
            return
        try:
            self._file.write(json.dumps(_plain(row), allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from error

    def _say(self, line: str) -> None:
        if self.enabled:
            tqdm.write(printable(line))
