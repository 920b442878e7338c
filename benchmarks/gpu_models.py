"""Parts of the GPU suite about models alone, their clips on the GPU already: speed of a step, and memory.

What a step is and how memory is counted stand in `benchmarks.train_step` and `benchmarks.memory`; here is which
of it fits into the suite's time, and what only a GPU's allocator can tell.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch

from benchmarks.gpu_parts import NotRunError, Record, Suite, attempt
from benchmarks.machine import Row
from benchmarks.memory import METHODS, MIB, Method, Step, Subject, allocated_per_clip, count
from benchmarks.train_step import Case, measure_case

BASELINE, EFFICIENT, RECOMPUTED = METHODS
WARM_STEPS, STEPS = 3, 6
TIMED = 3  # steps of a largest batch, the first of which is not counted
FILLED = 0.95  # of the memory: what is free lies in pieces
BACK_OFF = 0.93
# Clips whose peaks are compared. Few clips would leave the peak to the gradients of the parameters.
PROBES = {BASELINE: (8, 16), EFFICIENT: (16, 32), RECOMPUTED: (64, 128)}
# Clips that are tried at most by frames: larger batches cost too much time, and are computed from the slope.
MOST = {4: 1024, 16: 256}


class Trainer(Protocol):
    """Takes training steps of any batch."""

    def run(self, batch: int) -> float:
        """Take one step and say how many seconds it took."""

    def fits(self, batch: int) -> bool:
        """Whether a batch fits into memory."""


def step_cases(suite: Suite) -> list[Case]:
    """What is timed, in order of worth: kernels, recomputation, encoders, length, size, compilation."""
    short, long = Case(batch=128), Case(frames=16, batch=16)
    cases = [
        short,
        replace(short, attention="flash-attn"),
        replace(short, attention="math"),
        replace(short, checkpoint_every=1),
        replace(short, encoder="timesformer"),
        long,
        replace(long, attention="math"),
        replace(short, size="vit_l14", batch=64),
        replace(short, size="vit_l14", checkpoint_every=1),
        Case(encoder="videomae", frames=16, batch=128),
        replace(long, size="vit_l14", checkpoint_every=1),
        replace(short, attention="xformers"),
        replace(short, compile=True),
        replace(short, compile=True, checkpoint_every=1, batch=256),
        Case(encoder="videomae", frames=16, batch=128, compile=True),
    ]
    if suite.device == "cpu":  # compilation would take longer than all the rest
        cases = [case for case in cases if not case.compile]
    if suite.scale.model == "tiny":
        side = suite.scale.frame_size
        cases = [replace(case, size="tiny", frames=4, batch=2, frame_size=side) for case in cases]
    return list(dict.fromkeys(cases))


def train_steps(suite: Suite, record: Record) -> None:
    """Speed of a whole training step by kernel, recomputation, compilation, encoder, size and length."""
    suite.require_device()
    warm, steps = min(WARM_STEPS, suite.scale.warm_steps), min(STEPS, suite.scale.steps)
    for case in step_cases(suite):
        numbers = attempt(partial(measure_case, case, suite.device, warm=warm, steps=steps))
        record({"measured": "train step", **vars(case), **numbers})


def subjects(suite: Suite) -> list[Subject]:
    """Whose memory is measured: AVION's tower and the one it replaces, at both lengths."""
    size, side = suite.scale.model, suite.scale.frame_size
    encoders: tuple[str, ...] = ("vit", "timesformer")
    return [Subject(encoder, size, frames, side) for frames in (4, 16) for encoder in encoders]


def model_memory(suite: Suite, record: Record) -> None:
    """Memory of a clip as counted and as allocated, largest batches by it, and whether those train."""
    suite.require_device()
    found: dict[tuple[Subject, Method], Row] = {}
    for subject in subjects(suite):
        for method in METHODS:
            found[subject, method] = attempt(partial(memory_of_clip, suite, subject, method))
            record({"measured": "model memory", **described(subject, method), **found[subject, method]})
    for (subject, method), row in found.items():
        if method != BASELINE and (subject.frames == 4 or method == EFFICIENT):
            numbers = attempt(partial(largest_batch, subject, method, row.get("largest batch by slope")))
            record({"measured": "largest batch", **described(subject, method), **numbers})


def described(subject: Subject, method: Method) -> Row:
    """Say what is measured."""
    encoder = f"{subject.encoder} {subject.size}"
    return {"encoder": encoder, "frames": subject.frames, "method": method.name}


def memory_of_clip(suite: Suite, subject: Subject, method: Method) -> Row:
    """What a clip takes: as counted (short clips only, it is done on the CPU), and on a GPU as allocated."""
    row: Row = {}
    if subject.frames == 4:
        row["counted MiB a clip"] = count(subject, method)["MiB a clip"]
    if suite.device == "cpu":
        return row
    row["allocated MiB a clip"] = allocated_per_clip(subject, method)["allocated MiB a clip"]
    return row | peak_of_clip(Step(subject, method), PROBES[method])


def peak_of_clip(step: Trainer, batches: tuple[int, int]) -> Row:
    """Peak memory of one more clip in a whole step, and the batch that fills the GPU if it goes on so."""
    step.run(batches[0])  # from here on the optimizer's state is there
    peaks = []
    for batch in batches:
        torch.cuda.reset_peak_memory_stats()
        step.run(batch)
        peaks.append(torch.cuda.max_memory_allocated())
    free, _ = torch.cuda.mem_get_info()
    return extrapolated(batches, peaks, room=free + torch.cuda.memory_reserved())


def extrapolated(batches: Sequence[int], peaks: Sequence[int], *, room: float) -> Row:
    """Draw a line through the peaks of two batches.

    Args:
        batches: two numbers of clips.
        peaks: their peak memory in bytes.
        room: bytes there are.

    Raises:
        NotRunError: when the larger batch takes no more memory, which tells nothing.
    """
    slope = (peaks[1] - peaks[0]) / (batches[1] - batches[0])
    if slope <= 0:
        raise NotRunError(f"{batches[1]} clips take no more memory than {batches[0]}")
    fixed = peaks[0] - slope * batches[0]
    return {
        "peak MiB a clip": round(slope / MIB, 1),
        "fixed MiB": round(fixed / MIB),
        "largest batch by slope": max(0, int((FILLED * room - fixed) / slope)),
    }


def largest_batch(subject: Subject, method: Method, expected: int | None) -> Row:
    """Train with the largest batch.

    Raises:
        NotRunError: when it is not known where to look.
    """
    if not expected:
        raise NotRunError("its memory was not measured")
    torch.cuda.empty_cache()
    return train_with_most(Step(subject, method), expected, most=MOST[subject.frames])


def train_with_most(step: Trainer, expected: int, *, most: int) -> Row:
    """Go down from the batch that should fit to one that does, and time it.

    Args:
        step: the training.
        expected: clips that should fit.
        most: clips that are tried at most.

    Raises:
        NotRunError: when not even one clip fits.
    """
    batch = min(expected, most)
    while not step.fits(batch):
        batch = int(batch * BACK_OFF)
        if batch < 1:
            raise NotRunError("not even one clip fits")
    seconds = statistics.median([step.run(batch) for _ in range(TIMED)][1:])
    return {
        "trained with": batch,
        "expected": expected,
        "clips_per_s": round(batch / seconds, 1),
        **({"note": "more fit, not tried"} if expected > most else {}),
    }
