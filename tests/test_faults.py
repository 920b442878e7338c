"""The fault policy by itself: what it counts, what it draws, and what it says."""

from concurrent import futures
from pathlib import Path

import pytest
from dali_clips import clip_request

from avion_dali.contracts import ChunkRef, ClipError, DecodeError, UserError
from avion_dali.loading.faults import ALWAYS_TOLERATED, FaultPolicy, failure_of
from avion_dali.loading.pool import WorkerDiedError

REQUEST = clip_request(4, [(ChunkRef("/chunks/a.mp4", 1, 30, 64, 48), (3, 9))])


def policy_of(num_samples: int, fraction: float, quarantine: Path | None = None) -> FaultPolicy:
    return FaultPolicy(num_samples, max_bad_fraction=fraction, seed=1, quarantine=quarantine)


def failure(sample_id: int) -> ClipError:
    return ClipError(sample_id, 0, "missing", f"/chunks/{sample_id}.mp4", (1,), "not there")


def test_the_21st_of_2000_samples_is_one_too_many() -> None:
    policy = policy_of(2000, 0.01)
    for clip in range(20 * 5):
        policy.record(failure(clip // 5))
    with pytest.raises(
        UserError, match=r"^21 of 2000 samples could not be read.*/chunks/20\.mp4: missing: not there"
    ):
        policy.record(failure(20))


def test_a_few_samples_may_always_fail_unless_none_may() -> None:
    few = policy_of(10, 0.01)
    for sample_id in range(ALWAYS_TOLERATED):
        few.record(failure(sample_id))
    with pytest.raises(UserError, match="9 of 10 samples"):
        few.record(failure(9))
    with pytest.raises(UserError, match="1 of 10 samples"):
        policy_of(10, 0.0).record(failure(0))


def test_substitutes_are_drawn_from_the_samples() -> None:
    policy = policy_of(7, 0.5)
    drawn = [policy.substitute(sample_id, 0, attempt) for sample_id in range(60) for attempt in range(8)]
    assert set(drawn) == set(range(7))
    assert drawn == [
        policy.substitute(sample_id, 0, attempt) for sample_id in range(60) for attempt in range(8)
    ]


def test_a_quarantine_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"could not be read, and .*q\.jsonl could not be written"):
        policy_of(100, 0.5, tmp_path / "file" / "q.jsonl").record(failure(1))


@pytest.mark.parametrize(
    ("error", "kind", "cause"),
    [
        (futures.TimeoutError(), "timeout", "no answer"),
        (WorkerDiedError(-9), "worker-died", "ended with code -9"),
        (
            DecodeError("/b.mp4", (7,), decoder="odd", kind="changed", cause="other size"),
            "changed",
            "other size",
        ),
    ],
)
def test_failures_name_the_chunk(error: Exception, kind: str, cause: str) -> None:
    found = failure_of(error, REQUEST)
    assert (found.sample_id, found.epoch, found.kind, found.substitute_id) == (4, 0, kind, None)
    assert cause in found.cause
    assert (found.path, found.frame_ids) == (
        ("/b.mp4", (7,)) if kind == "changed" else ("/chunks/a.mp4", (3, 9))
    )


def test_what_is_no_clips_failure_is_raised() -> None:
    with pytest.raises(TypeError, match="a mistake in the program"):
        failure_of(TypeError("a mistake in the program"), REQUEST)
