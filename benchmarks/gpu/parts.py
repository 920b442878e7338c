"""What the parts of `benchmarks.gpu.suite` share: how much they do, and a file each for what they found.

Light: the suite's own process and decode workers import it.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from avion_dali.config import ModelSize
from avion_dali.cores import available_cores
from avion_dali.files import atomic_write_text

if TYPE_CHECKING:
    from benchmarks.report import Row
    from pipelines.codecs import Device

Outcome = Literal["under way", "done", "not run", "failed", "killed"]


class NotRunError(Exception):
    """Something cannot be measured on this machine; the message says why."""


def attempt(measure: Callable[[], Row]) -> Row:
    """Measure one of several cases; if it fails, the others continue, and the log has the details.

    Returns:
        What it measured; else `not_run` or `failure` and the reason.
    """
    try:
        return measure()
    except NotRunError as error:
        return {"not_run": str(error)}
    except Exception as error:  # the process boundary: drivers and libraries raise errors of any type
        traceback.print_exc()
        return {"failure": first_line(error)}


def first_line(error: Exception) -> str:
    """Shorten the message of an exception to one line."""
    lines = str(error).strip().splitlines() or ["no reason given"]
    return f"{type(error).__name__}: {lines[0]}"


@dataclass(frozen=True)
class Scale:
    """Size of the measurement."""

    seconds: int = 10  # length of a chunk
    size: tuple[int, int] = (512, 288)  # (width, height) of the chunks in pixels, multiples of 16
    # A size that is none, so that NVDEC codes it larger than it is shown.
    other_size: tuple[int, int] = (382, 288)
    sources: int = 4  # chunks of every profile
    samples: int = 4_000  # rows of a manifest
    frame_size: int = 224  # side of the clips in pixels
    batch: int = 64  # clips of a batch
    # Clips that DALI decodes at the same time, the usual number first.
    threads: tuple[int, ...] = (16, 4, 8, 32)
    warm_s: float = 1.0  # loading before a rate is measured
    measure_s: float = 2.0  # length of a rate measurement
    checked: int = 32  # clips compared for every profile
    model: ModelSize = "vit_b16"  # that is trained
    micro_batches: tuple[int, ...] = (128, 64, 32)  # clips of a training step; the first that fits
    warm_steps: int = 6  # training steps that are not counted
    steps: int = 30  # training steps that are
    workers: tuple[int, ...] = tuple(sorted({1, 4, 8, available_cores()}))  # decode processes


QUICK = Scale(
    seconds=2,
    size=(128, 96),
    other_size=(126, 96),
    sources=2,
    samples=32,
    frame_size=64,
    batch=4,
    threads=(2, 1),
    warm_s=0.02,
    measure_s=0.05,
    checked=8,
    model="tiny",
    micro_batches=(4,),
    warm_steps=1,
    steps=2,
    workers=(1,),
)


@dataclass(frozen=True)
class Suite:
    """Folder and inputs of a part."""

    folder: Path  # of the whole suite
    device: Literal["cuda", "cpu"]  # `cpu` does what can be done without a GPU, to try the suite
    scale: Scale = field(default_factory=Scale)  # size of the measurement

    @property
    def backend(self) -> Device:
        """What DALI decodes on."""
        return "mixed" if self.device == "cuda" else "cpu"

    @property
    def training_style(self) -> str:
        """The chunks that are loaded and trained on; without a GPU those that DALI decodes."""
        return "balanced" if self.device == "cuda" else "vp9"

    def require_device(self) -> None:
        """Check that the device to measure exists.

        Raises:
            NotRunError: when it is a GPU, and there is none.
        """
        from pipelines.support import cuda_problem

        problem = cuda_problem(0) if self.device == "cuda" else None
        if problem:
            raise NotRunError(problem)

    def require_gpu(self) -> None:
        """Check that there is a GPU.

        Raises:
            NotRunError: when there is none, or it was not asked for.
        """
        if self.device == "cpu":
            raise NotRunError("no GPU (--device cpu)")
        self.require_device()

    def manifest_folder(self, style: str, size: tuple[int, int]) -> Path:
        """Where the manifest of chunks of a style and size is."""
        return self.folder / "media" / f"{style}_{size[0]}x{size[1]}.manifest"


Record = Callable[["Row"], None]
PartFunction = Callable[[Suite, Record], None]


@dataclass(frozen=True)
class Part:
    """One part of the suite, which runs in a separate process."""

    name: str  # of the part and of its file
    module: str  # where its function is
    function: str  # a `PartFunction` of the module
    limit_s: float  # seconds after which it is killed
    expected_s: float = 0.0  # seconds it should take


@dataclass
class PartResult:
    """Result of a part, and how it ended."""

    part: str  # its name
    outcome: Outcome = "under way"  # how it ended
    reason: str = ""  # reason of a failure
    seconds: float = 0.0  # how long it took
    output_tail: str = ""  # last lines that it printed, where it did not end well
    rows: list[Row] = field(default_factory=list)  # its rows

    @classmethod
    def read(cls, path: Path) -> PartResult:
        """Read what a part's process wrote, perhaps before it was killed."""
        return cls(**json.loads(path.read_text())) if path.exists() else cls(path.stem)


class Recorder:
    """Writes rows to the part's file as they come, so that a part which is killed leaves them."""

    def __init__(self, path: Path) -> None:
        self._path, self._start = path, time.monotonic()
        self._result = PartResult(path.stem)

    def add(self, row: Row) -> None:
        """Add what was found."""
        self._result.rows.append(row)
        self._write()

    def finish(self, outcome: Outcome, reason: str = "") -> None:
        """Record how the part ended."""
        self._result.outcome, self._result.reason = outcome, reason
        self._write()

    def _write(self) -> None:
        self._result.seconds = round(time.monotonic() - self._start, 1)
        atomic_write_text(self._path, json.dumps(vars(self._result), indent=1))
