"""The fault policy: counts and records failed clips, chooses substitutes, and limits the number of failures."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path

from avion_dali.contracts import ClipError, ClipRequest, DecodeError, FailureKind, UserError
from avion_dali.data.randomness import generator
from avion_dali.loading.pool import WorkerDiedError

# Even in a small dataset, a single bad file must not stop the run.
ALWAYS_TOLERATED = 8
MAX_ATTEMPTS = 8


@dataclass(slots=True)
class LoaderStats:
    """Counts of a loader since it was opened.

    Args:
        delivered: delivered clips.
        replaced: delivered clips that are substitutes for unreadable ones.
        invalid: rows delivered as invalid (evaluation only).
        failures: failed clips by kind.
        decode_s: seconds that workers spent on delivered clips.
        decoded_on_cpu: clips that `cpu-fused` decoded because DALI cannot, with `--decoder dali`.
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
        num_samples: rows of the manifest, regardless of the number of clips per row.
        max_bad_fraction: fraction of these rows that may fail before the run stops; 0 stops at the first one.
        seed: seed of the run, which determines substitutes.
        quarantine: file to which one JSON line per failed clip is appended; None writes no file.
    """

    def __init__(
        self, num_samples: int, *, max_bad_fraction: float, seed: int, quarantine: Path | None
    ) -> None:
        self.num_samples, self.seed, self.quarantine = num_samples, seed, quarantine
        self.allowed = max(ALWAYS_TOLERATED, max_bad_fraction * num_samples) if max_bad_fraction else 0
        self._bad_samples: set[int] = set()

    def substitute(self, sample_id: int, epoch: int, attempt: int) -> int:
        """Return the sample to read instead, which does not depend on workers, ranks or resuming.

        Args:
            sample_id: the planned sample.
            epoch: its epoch.
            attempt: 0 for the first substitute, 1 for the second after the first one failed, and so on.
        """
        draws = generator("substitute", seed=self.seed, epoch=epoch, index=sample_id)
        return int(draws.integers(0, self.num_samples, size=attempt + 1)[-1])

    def record(self, error: ClipError) -> None:
        """Record a failed clip in the quarantine, and count its sample unless it is already counted.

        Args:
            error: the failure.

        Raises:
            UserError: when more distinct samples have failed than are allowed.
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
            f"{error.cause}; check that the chunk folder exists; "
            "if it was moved, change chunk_root in the manifest's manifest.json"
        )


def failure_of(error: Exception, request: ClipRequest) -> ClipError:
    """Describe the failure of a clip's task.

    Args:
        error: the exception of the task, or of its process.
        request: the requested clip.

    Returns:
        The clip error, without a substitute.

    Raises:
        Exception: the error itself, when it was not caused by a clip's file or process.
    """
    path, frame_ids = request.parts[0].chunk.path, request.parts[0].frame_ids
    kind: FailureKind
    if isinstance(error, DecodeError):
        path, frame_ids, kind, cause = error.path, error.frame_ids, error.kind, error.cause
    elif isinstance(error, futures.TimeoutError):
        kind, cause = "timeout", "no answer within the clip's time limit"
    elif isinstance(error, WorkerDiedError):
        kind, cause = "worker-died", f"its process ended with code {error.exitcode}"
    else:
        raise error
    return ClipError(request.sample_id, request.epoch, kind, path, frame_ids, cause)
