"""Parts of the GPU suite about models alone, their clips on the GPU already: speed of a step, and memory.

`benchmarks.train.step` and `benchmarks.train.memory` say what a step is and how memory is counted; here is
which of it fits into the suite's time, and what only a GPU's profiler and allocator can tell.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.parts import NotRunError, Record, Suite, attempt, first_line
from benchmarks.report import Row, read_rows, select
from benchmarks.train.memory import METHODS, MIB, Method, Subject
from benchmarks.train.step import Case, Step, measure_case

MOST = 4096  # clips that are tried
# Kernels of PyTorch's attention that can be demanded.
FORCED = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
_OTHERS = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)  # for what a demanded one refuses, such as masks
_ATTENTION = re.compile("attention|flash|fmha|sdpa", re.IGNORECASE)


@dataclass(frozen=True)
class StepCase:
    """A training step, and the attention kernel that is demanded of PyTorch; empty for its own choice."""

    case: Case
    forced: str = ""


def step_cases(suite: Suite) -> list[StepCase]:
    """List timed steps by importance: kernels, compilation, recomputation, size, encoders, length, tuning."""
    short = Case(batch=128)
    large, masked = replace(short, size="vit_l14", batch=32), replace(short, encoder="videomae", frames=16)
    cases = [
        *(StepCase(short, forced) for forced in ("", *FORCED)),
        StepCase(replace(short, compile=True)),
        StepCase(replace(short, checkpoint_every=1)),
        StepCase(replace(short, compile=True, batch=256)),
        StepCase(large),
        StepCase(replace(short, encoder="timesformer")),
        StepCase(masked),
        StepCase(replace(short, attention="math", batch=64)),
        StepCase(replace(short, frames=16, batch=16)),
        *(StepCase(replace(case, compile=True)) for case in (large, masked)),
        *(StepCase(replace(short, attention=name)) for name in ("flash-attn", "xformers")),
        StepCase(replace(short, compile=True, compile_mode="max-autotune-no-cudagraphs")),
    ]
    if suite.device == "cpu":  # compilation would take longer than all others, and only flash can be demanded
        kept = [step for step in cases if not step.case.compile and step.forced != "cudnn"]
        tiny = {"size": suite.scale.model, "frames": 4, "batch": 2, "frame_size": suite.scale.frame_size}
        cases = [StepCase(replace(step.case, **tiny), step.forced) for step in kept]
    return list(dict.fromkeys(cases))


def steps(suite: Suite, record: Record) -> None:
    """Speed of a whole training step by kernel, recomputation, compilation, encoder, size and length."""
    for step in step_cases(suite):
        numbers = attempt(partial(measure_step, suite, step))
        record({"measured": "train step", **vars(step.case), "forced": step.forced, **numbers})


def measure_step(suite: Suite, step: StepCase) -> Row:
    """Time a step, then look at the kernels of one."""
    if step.case.compile:
        torch.compiler.reset()  # blocks of all cases share their code, whose compilations are limited
    warm, count = (3, 6) if suite.device == "cuda" else (1, 2)
    with sdpa_kernel([FORCED[step.forced], *_OTHERS], set_priority=True) if step.forced else nullcontext():
        return measure_case(step.case, suite.device, warm=warm, steps=count, inspect=kernels)


def kernels(step: Step) -> Row:
    """Run a step under the profiler: its attention kernels, and what takes most of its time."""
    on_gpu = step.device.type == "cuda"
    try:
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
            step.run()
            if on_gpu:
                torch.cuda.synchronize()
    except RuntimeError as error:  # the profiler may not be allowed here; the step's time counts without it
        return {"attention_kernels": f"not seen: {first_line(error)}"}
    column = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    spent = {event.key: getattr(event, column) for event in profiler.key_averages()}
    top, total = sorted(spent, key=lambda name: -spent[name]), sum(spent.values()) or 1
    return {
        "attention_kernels": [_short(name) for name in top if _ATTENTION.search(name)][:6],
        "top_kernels": [f"{_short(name)} {spent[name] / total:.0%}" for name in top[:6]],
    }


def _short(name: str) -> str:
    return name.removeprefix("void ").partition("(")[0][:60]


def memory(suite: Suite, record: Record) -> None:
    """Memory of a clip beside what was counted on a CPU, and the largest batches that train."""
    vit, other = (
        Subject(name, suite.scale.model, 4, suite.scale.frame_size) for name in ("vit", "timesformer")
    )
    cases: list[tuple[str, Callable[..., Row], Subject, Method]]
    cases = [("memory", memory_of_clip, vit, method) for method in METHODS]
    cases += [
        ("largest batch", largest_batch, subject, method) for subject in (vit, other) for method in METHODS[1:]
    ]
    for measured, measure, subject, method in cases:
        what = {"encoder": f"{subject.encoder} {subject.size}", "frames": 4, "method": method.name}
        record({"measured": measured, **what, **attempt(partial(measure, suite, subject, method))})


def memory_of_clip(suite: Suite, subject: Subject, method: Method) -> Row:
    """What the GPU's allocator gives one more clip for the backward pass, beside the committed count."""
    if suite.device == "cpu":
        raise NotRunError("no allocator of a GPU (--device cpu)")
    model, held = subject.build(method, "cuda"), []
    for number in (2, 4):
        clips = subject.clips(number, "cuda")
        before = torch.cuda.memory_allocated()
        output = model(clips)
        held.append(torch.cuda.memory_allocated() - before)
        del output, clips
    what = {"encoder": f"{subject.encoder} {subject.size}", "frames": 4, "method": method.name}
    counted = [row["MiB a clip"] for row in select(read_rows("memory"), "saved for the backward pass", **what)]
    allocated = round((held[1] - held[0]) / 2 / MIB, 1)
    return {"allocated_mib_per_clip": allocated, "counted_mib_per_clip": counted[0] if counted else None}


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


def largest_batch(suite: Suite, subject: Subject, method: Method) -> Row:
    """Find the largest batch that trains, and time it; without a GPU nothing ends the search but its limit."""
    on_gpu = suite.device == "cuda"
    model = subject.build(method, suite.device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def run(batch: int) -> float:
        clips, start = subject.clips(batch, suite.device), time.perf_counter()
        model(clips).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def fits(batch: int) -> bool:
        try:
            run(batch)
        except torch.OutOfMemoryError:
            optimizer.zero_grad()
            torch.cuda.empty_cache()
            return False
        return True

    batch = largest(fits, most=MOST if on_gpu else 2)
    if not batch:
        raise NotRunError("not even one clip fits")
    seconds = statistics.median([run(batch) for _ in range(3)][1:])
    return {"clips": batch, "clips_per_s": round(batch / seconds, 1)}
