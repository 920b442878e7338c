"""The fault policy: failures are counted, written to a file, replaced deterministically, and bounded."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path

from pebble import ProcessExpired

from avion_dali.contracts import ClipError, ClipRequest, DecodeError, FailureKind, UserError
from avion_dali.data.randomness import generator

# A small data set must survive a single bad file whatever its share.
ALWAYS_TOLERATED = 8
MAX_ATTEMPTS = 8


@dataclass(slots=True)
class LoaderStats:
    """What a loader has done so far.

    Args:
        delivered: clips handed to the model.
        replaced: of these, substitutes for clips that could not be read.
        invalid: rows delivered as invalid (evaluation only).
        failures: failed clips by kind.
        decode_s: seconds workers spent on delivered clips.
        decoded_on_cpu: clips that `--decoder dali` left to `cpu-fused`.
    """

    delivered: int = 0
    replaced: int = 0
    invalid: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    decode_s: float = 0.0
    decoded_on_cpu: int = 0


class FaultPolicy:
    """Chooses substitutes and limits how many samples may fail.

    Args:
        num_samples: rows of the manifest, however many clips are made from each.
        max_bad_fraction: share of these rows that may fail before the run stops; 0 stops at the first.
        seed: the run's seed, for substitutes.
        quarantine: file that gets one JSON line per failed clip; None writes none.
    """

    def __init__(
        self, num_samples: int, *, max_bad_fraction: float, seed: int, quarantine: Path | None
    ) -> None:
        self.num_samples, self.seed, self.quarantine = num_samples, seed, quarantine
        self.allowed = max(ALWAYS_TOLERATED, max_bad_fraction * num_samples) if max_bad_fraction else 0
        self._bad_samples: set[int] = set()

    def substitute(self, sample_id: int, epoch: int, attempt: int) -> int:
        """Return the sample to read instead: the same for any worker count, rank count or resume.

        Args:
            sample_id: the sample of the batch's plan.
            epoch: its epoch.
            attempt: 0 for the first substitute, 1 when that failed too, and so on.
        """
        draws = generator("substitute", seed=self.seed, epoch=epoch, index=sample_id)
        return int(draws.integers(0, self.num_samples, size=attempt + 1)[-1])

    def record(self, error: ClipError) -> None:
        """Count a failed clip's sample, once however many of its clips fail, and write the failure down.

        Args:
            error: the failure.

        Raises:
            UserError: when more distinct samples failed than is allowed.
        """
        if self.quarantine is not None:
            self._write(self.quarantine, json.dumps(dataclasses.asdict(error)))
        self._bad_samples.add(error.sample_id)
        if len(self._bad_samples) > self.allowed:
            where = f"; all are listed in {self.quarantine}" if self.quarantine else ""
            raise UserError(
                f"{len(self._bad_samples)} of {self.num_samples} samples could not be read, more than "
                f"`max_bad_fraction` allows; the last was {error.path}: {error.kind}: {error.cause}{where}"
            )

    @staticmethod
    def _write(path: Path, line: str) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(line + "\n")
        except OSError as error:
            raise UserError(f"a clip could not be read, and {path} could not be written: {error}") from error

    @staticmethod
    def exhausted(error: ClipError) -> UserError:
        """Return the error for a clip whose substitutes failed as well.

        Args:
            error: the last failure.
        """
        return UserError(
            f"{MAX_ATTEMPTS} samples in a row could not be read, the last {error.path}: {error.kind}: "
            f"{error.cause}; is the chunk folder still there? "
            "When it moved, change chunk_root in the manifest's manifest.json"
        )


def failure_of(error: Exception, request: ClipRequest) -> ClipError:
    """Describe the failure of a clip's task.

    Args:
        error: what the task raised, or how its process ended.
        request: the clip that was asked for.

    Returns:
        The failure, without a substitute.

    Raises:
        Exception: the error itself, when no file or process of a clip caused it.
    """
    path, frame_ids = request.parts[0].chunk.path, request.parts[0].frame_ids
    kind: FailureKind
    if isinstance(error, DecodeError):
        path, frame_ids, kind, cause = error.path, error.frame_ids, error.kind, error.cause
    elif isinstance(error, futures.TimeoutError):
        kind, cause = "timeout", "no answer within the clip's time limit"
    elif isinstance(error, ProcessExpired):
        kind, cause = "worker-died", f"its process ended with code {error.exitcode}"
    else:
        raise error
    return ClipError(request.sample_id, request.epoch, kind, path, frame_ids, cause)
