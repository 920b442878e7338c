"""What the parts of `benchmarks.gpu` share: how much they do, and a file each for what they found.

Light: the suite's own process and decode workers import it.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from avion_dali.config import DaliConfig, ModelSize
from avion_dali.contracts import UserError
from avion_dali.cores import available_cores
from avion_dali.files import atomic_write_text

if TYPE_CHECKING:
    from benchmarks.report import Row
    from pipelines.codecs import Device


class NotRunError(Exception):
    """Something cannot be measured on this machine; the message says why."""


def attempt(measure: Callable[[], Row]) -> Row:
    """Measure one of several cases; if it fails, the row is the reason, and the log has the details."""
    try:
        return measure()
    except (NotRunError, UserError) as error:
        return {"not_run": str(error)}
    except Exception as error:  # the process boundary: drivers and libraries raise errors of any type
        traceback.print_exc()
        return {"failure": first_line(error)}


def first_line(error: BaseException) -> str:
    """Shorten the message of an exception to one line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}"


@dataclass(frozen=True)
class Scale:
    """Size of the measurements."""

    samples: int = 8_000  # rows of a manifest
    frame_size: int = 224  # side of the clips in pixels
    batch: int = 128  # clips of a batch, and of a training's step; halved until they fit
    # Graphs, and threads of each; the last are the usual ones. And the same where waiting threads sleep.
    graphs: tuple[DaliConfig, ...] = (DaliConfig(1, 16), DaliConfig(2, 4), DaliConfig(2, 8))
    blocking: tuple[DaliConfig, ...] = (DaliConfig(2, 8, True), DaliConfig(2, 4, True))
    rate_s: float = 2.0  # length of the measurement of a rate
    checked: int = 32  # clips compared for every style
    model: ModelSize = "vit_b16"
    product: int = 8192  # side of the matrices whose product is the yardstick
    warm_steps: int = 8  # training steps that are not counted
    steps: int = 40  # training steps that are
    long_steps: int = 200  # of a training from which hours are extrapolated
    longest_s: float = 45.0  # after which a training is cut short
    workers: tuple[int, ...] = tuple(sorted({1, 8, available_cores()}, reverse=True))  # decode processes


TINY = Scale(
    **{"samples": 64, "frame_size": 64, "batch": 4, "checked": 8, "model": "tiny", "product": 256},
    **{"warm_steps": 1, "steps": 2, "long_steps": 3, "rate_s": 0.05, "workers": (1,)},
    **{"graphs": (DaliConfig(2, 1), DaliConfig(1, 2)), "blocking": (DaliConfig(1, 2, True),)},
)


@dataclass(frozen=True)
class Suite:
    """Folders and inputs of a part."""

    work: Path  # manifests, runs and what parts found; removed at the end
    media: Path  # chunks, see `benchmarks.gpu.chunks`
    device: Literal["cuda", "cpu"]  # `cpu` rehearses: what can be done without a GPU, tiny
    scale: Scale = field(default_factory=Scale)  # size of the measurements

    @property
    def backend(self) -> Device:
        """What DALI decodes on."""
        return "mixed" if self.device == "cuda" else "cpu"

    @property
    def style(self) -> str:
        """The chunks that are loaded and trained on; without a GPU those that DALI decodes."""
        return "balanced" if self.device == "cuda" else "vp9"

    def require_device(self) -> None:
        """Raise `NotRunError` when a GPU is to be measured and there is none."""
        from pipelines.support import cuda_problem

        if self.device == "cuda" and (problem := cuda_problem(0)):
            raise NotRunError(problem)

    def require_dali(self) -> None:
        """Raise `NotRunError` when DALI cannot decode here, as far as that shows without trying."""
        from pipelines.support import dali_problem, nvdec_obstacle

        if problem := nvdec_obstacle(0) if self.device == "cuda" else dali_problem():
            raise NotRunError(problem)


Record = Callable[["Row"], None]


@dataclass(frozen=True)
class Part:
    """One part of a stage, which runs in a separate process."""

    name: str
    function: str  # `.module.function` of this package, called with a `Suite` and a `Record`
    limit_s: float  # seconds after which it is killed


@dataclass
class PartResult:
    """Result of a part, and how it ended."""

    part: str  # its name
    outcome: Literal["under way", "done", "not run", "failed", "killed"] = "under way"
    reason: str = ""  # of a failure
    seconds: float = 0.0  # how long it took
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> PartResult:
        """Read what a part's process wrote, perhaps before it was killed."""
        return cls(**json.loads(path.read_text())) if path.exists() else cls(path.stem)

    def write(self, path: Path) -> None:
        """Write it, whenever there is more, so that a part which is killed leaves its rows."""
        atomic_write_text(path, json.dumps(vars(self)))
