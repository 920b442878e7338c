"""Parts of the GPU suite about models alone, their clips on the GPU already: speed of a step, and memory.

`benchmarks.train.step` and `benchmarks.train.memory` say what a step is and how memory is counted; here is
which of it fits into the suite's time, and what only a GPU's allocator can tell.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from benchmarks.gpu.parts import NotRunError, Record, Suite, attempt
from benchmarks.report import Row
from benchmarks.train.memory import METHODS, MIB, Method, Subject, count
from benchmarks.train.step import Case, measure_case

WARM_STEPS, STEPS = 3, 6
TIMED = 3  # steps of a largest batch, the first of which is not counted
MOST = 4096  # clips that are tried


def step_cases(suite: Suite) -> list[Case]:
    """List the timed cases by importance: kernels, recomputation, encoders, length, size, compilation."""
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
    if suite.device == "cpu":  # compilation would take longer than all other cases
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
    """List the measured models: AVION's tower and the one it replaces, at both lengths."""
    size, side = suite.scale.model, suite.scale.frame_size
    return [Subject(encoder, size, n, side) for n in (4, 16) for encoder in ("vit", "timesformer")]


def model_memory(suite: Suite, record: Record) -> None:
    """Memory of a clip as counted and as allocated, and the largest batches that train."""
    suite.require_device()
    for subject in subjects(suite):
        for method in METHODS:
            numbers = attempt(partial(memory_of_clip, suite, subject, method))
            record({"measured": "model memory", **described(subject, method), **numbers})
    if suite.device == "cuda":
        for method in METHODS[1:]:
            subject = subjects(suite)[0]
            numbers = attempt(partial(largest_batch, subject, method))
            record({"measured": "largest batch", **described(subject, method), **numbers})


def allocated_per_clip(subject: Subject, method: Method) -> float:
    """Measure with the GPU's allocator what one more clip keeps for the backward pass."""
    model, held = subject.build(method, "cuda"), []
    for number in (2, 4):
        clips = subject.clips(number, "cuda")
        before = torch.cuda.memory_allocated()
        output = model(clips)
        held.append(torch.cuda.memory_allocated() - before)
        del output, clips
    return (held[1] - held[0]) / 2 / MIB


class TowerStep:
    """Training steps of an encoder alone, on the GPU."""

    def __init__(self, subject: Subject, method: Method) -> None:
        self.subject = subject
        self.model = subject.build(method, "cuda")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)

    def run(self, batch: int) -> float:
        """Take one step and return its seconds."""
        clips = self.subject.clips(batch, "cuda")
        torch.cuda.synchronize()
        start = time.perf_counter()
        self.model(clips).float().square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    def fits(self, batch: int) -> bool:
        """Whether a batch fits into the GPU's memory."""
        try:
            self.run(batch)
        except torch.OutOfMemoryError:
            self.optimizer.zero_grad()
            torch.cuda.empty_cache()
            return False
        return True


def described(subject: Subject, method: Method) -> Row:
    """Describe the case."""
    encoder = f"{subject.encoder} {subject.size}"
    return {"encoder": encoder, "frames": subject.frames, "method": method.name}


def memory_of_clip(suite: Suite, subject: Subject, method: Method) -> Row:
    """What a clip takes: as counted (short clips only, it is done on the CPU), and on a GPU as allocated."""
    row: Row = {}
    if subject.frames == 4:
        row["counted MiB a clip"] = count(subject, method)["MiB a clip"]
    if suite.device == "cuda":
        row["allocated MiB a clip"] = allocated_per_clip(subject, method)
    return row


def largest(fits: Callable[[int], bool], *, most: int) -> int:
    """The largest number up to `most` that fits, to an eighth of it; 0 when even 1 does not."""
    number = 1
    if not fits(number):
        return 0
    while number * 2 <= most and fits(number * 2):
        number *= 2
    beyond = min(2 * number, most + 1)
    while beyond - number > max(1, number // 8):
        middle = (number + beyond) // 2
        number, beyond = (middle, beyond) if fits(middle) else (number, middle)
    return number


def largest_batch(subject: Subject, method: Method) -> Row:
    """Find the largest batch that trains, and time it.

    Raises:
        NotRunError: when not even one clip fits.
    """
    torch.cuda.empty_cache()
    step = TowerStep(subject, method)
    batch = largest(step.fits, most=MOST)
    if not batch:
        raise NotRunError("not even one clip fits")
    seconds = statistics.median([step.run(batch) for _ in range(TIMED)][1:])
    return {"trained with": batch, "clips_per_s": batch / seconds}
