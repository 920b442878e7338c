"""Activation memory of a video encoder, by what saves it: figure 3 of AVION (arXiv 2309.16669), and figure 4.

python -m benchmarks.memory [--frames 4 16]

Counted, not sampled: while one clip passes forwards, every tensor that autograd keeps for the backward pass is
looked at (`torch.autograd.graph.saved_tensors_hooks`). Each piece of memory counts once, for the part that
saved it first, however many tensors view it; parameters do not count. So the input of a LayerNorm counts for
the norm, its output for the attention or MLP that multiplies it. All is bfloat16, as in the paper's figure, and
the same on a CPU as on a GPU; training in autocast keeps the sums between blocks in float32 and takes more. On
a GPU the counts are checked against the allocator, and the largest batch and its speed are measured.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from avion_dali.config import AttentionBackend, ModelConfig, ModelSize
from avion_dali.models.presets import PRESETS
from avion_dali.models.towers import build_video_tower

if TYPE_CHECKING:
    from benchmarks.machine import Row

MIB = 2**20
# What the paper's figure 3 shows for ViT-B, 4 frames, MiB a clip.
PAPER_MIB = {"baseline": 418, "memory-efficient attention": 221, "and checkpointing": 14}
KINDS = {"attn": "attention", "timeattn": "attention", "mlp": "MLP"}
NORMS = ("ln_", "norm")
REST = "block inputs, patches"  # of blocks that are recomputed
PARTS = ("LayerNorm", "attention", "MLP", REST)
WARM_STEPS, STEPS = 3, 8


@dataclass(frozen=True)
class Method:
    """One bar of the figure.

    Args:
        name: what the paper calls it.
        attention: `math` keeps the attention matrix.
        checkpoint_every: recompute blocks.
    """

    name: str
    attention: AttentionBackend
    checkpoint_every: int


METHODS = (
    Method("baseline", "math", 0),
    Method("memory-efficient attention", "sdpa", 0),
    Method("and checkpointing", "sdpa", 1),
)


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Args:
        encoder: which.
        size: of it.
        frames: of a clip.
        frame_size: side of a frame in pixels; 0 takes that of the size.
    """

    encoder: str = "vit"
    size: ModelSize = "vit_b16"
    frames: int = 4
    frame_size: int = 0

    def build(self, method: Method, device: str) -> nn.Module:
        """Create the encoder in bfloat16."""
        options = ModelConfig(
            encoder=self.encoder,
            size=self.size,
            attention=method.attention,
            checkpoint_every=method.checkpoint_every,
        )
        tower = build_video_tower(options, num_frames=self.frames, frame_size=self.side, embed_dim=256)
        return tower.to(device, torch.bfloat16).train()

    def clips(self, number: int, device: str) -> Tensor:
        """Create clips in bfloat16."""
        return torch.randn(number, 3, self.frames, self.side, self.side, device=device, dtype=torch.bfloat16)

    @property
    def side(self) -> int:
        """Side of a frame in pixels."""
        return self.frame_size or PRESETS[self.size].image_size


class SavedBytes:
    """Adds up what autograd keeps, by the part of the model that runs.

    Args:
        model: whose forward passes are watched.
    """

    def __init__(self, model: nn.Module) -> None:
        self.by_part: Counter[str] = Counter()
        self._model = model
        self._running: list[str] = []
        self._kept: list[Tensor] = []  # alive, so that no address is given out twice
        self._counted = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count what is saved inside."""
        handles = []
        for name, module in self._model.named_modules():
            kind = part_of(name)
            if kind:
                handles.append(
                    module.register_forward_pre_hook(lambda *_, kind=kind: self._running.append(kind))
                )
                handles.append(module.register_forward_hook(lambda *_: self._leave()))
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._save, lambda kept: kept):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _leave(self) -> None:
        self._running.pop()

    def _save(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._counted:
            self._counted.add(storage.data_ptr())
            self._kept.append(tensor)
            self.by_part[self._running[-1] if self._running else REST] += storage.nbytes()
        return tensor


def part_of(module_name: str) -> str | None:
    """The bar's part that a module's memory belongs to, by the last part of its name; None for the parent's."""
    last = module_name.rpartition(".")[2]
    if last.startswith(NORMS) or last == "fc_norm":
        return "LayerNorm"
    return KINDS.get(last)


def saved_bytes(subject: Subject, method: Method) -> Counter[str]:
    """Count the bytes that one clip leaves for the backward pass, by part."""
    torch.manual_seed(0)
    model = subject.build(method, "cpu")
    saved = SavedBytes(model)
    clip = subject.clips(1, "cpu")
    with saved.watching():
        model(clip)
    return saved.by_part


def count(subject: Subject, method: Method) -> Row:
    """Count as `saved_bytes` does, in MiB."""
    saved = saved_bytes(subject, method)
    return {
        "encoder": f"{subject.encoder} {subject.size}",
        "frames": subject.frames,
        "method": method.name,
        "MiB a clip": round(sum(saved.values()) / MIB, 1),
        **{f"{part} MiB": round(saved[part] / MIB, 1) for part in PARTS},
    }


def measure(frames: tuple[int, ...] = (4, 16)) -> list[Row]:
    """Count for ViT-B, all methods and lengths."""
    return [count(Subject(frames=number), method) for number in frames for method in METHODS]


def allocated_per_clip(subject: Subject, method: Method) -> Row:
    """Ask the GPU's allocator what one more clip leaves for the backward pass."""
    model, held = subject.build(method, "cuda"), []
    for number in (2, 4):
        clips = subject.clips(number, "cuda")
        before = torch.cuda.memory_allocated()
        output = model(clips)
        held.append(torch.cuda.memory_allocated() - before)
        del output, clips
    return {
        "encoder": f"{subject.encoder} {subject.size}",
        "frames": subject.frames,
        "method": method.name,
        "allocated MiB a clip": round((held[1] - held[0]) / 2 / MIB, 1),
    }


def largest(fits: Callable[[int], bool], *, most: int) -> int:
    """The largest number that fits, to an eighth of it; 0 when even 1 does not.

    Args:
        fits: whether a number fits; once one does not, no larger one does.
        most: not looked beyond.
    """
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


class Step:
    """Training steps of an encoder alone, on the GPU.

    Args:
        subject: the encoder.
        method: how it is run.
    """

    def __init__(self, subject: Subject, method: Method) -> None:
        self.subject = subject
        self.model = subject.build(method, "cuda")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)

    def run(self, batch: int) -> float:
        """Take one step and say how many seconds it took."""
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


def largest_batch(subject: Subject, method: Method, *, most: int = 4096) -> Row:
    """Find the largest batch that trains, and its speed."""
    step = Step(subject, method)
    batch = largest(step.fits, most=most)
    row: Row = {
        "encoder": f"{subject.encoder} {subject.size}",
        "frames": subject.frames,
        "method": method.name,
        "largest batch": batch,
    }
    if batch:
        times = [step.run(batch) for _ in range(WARM_STEPS + STEPS)][WARM_STEPS:]
        row["clips/s"] = round(batch / statistics.median(times), 1)
    return row


def measure_gpu(frames: tuple[int, ...] = (4, 16)) -> list[Row]:
    """On a GPU: counts against the allocator (figure 3), largest batches and their speed (figure 4)."""
    counted = {(row["frames"], row["method"]): row["MiB a clip"] for row in measure(frames)}
    rows: list[Row] = []
    for number in frames:
        for method in METHODS:
            row = allocated_per_clip(Subject(frames=number), method)
            rows.append({**row, "counted MiB a clip": counted[number, method.name]})
    for number in frames:
        encoders: tuple[str, ...] = ("vit", "timesformer")
        subjects = [Subject(encoder=encoder, frames=number) for encoder in encoders]
        rows += [largest_batch(subject, method) for subject in subjects for method in METHODS]
    return rows


def readme_table(rows: list[Row]) -> str:
    """The README's table."""
    lines = [
        "| ViT-B, MiB a clip | frames | " + " | ".join(PARTS) + " | all |",
        "|---" * (len(PARTS) + 3) + "|",
    ]
    for row in rows:
        parts = " | ".join(f"{row[f'{part} MiB']:.0f}" for part in PARTS)
        lines.append(f"| {row['method']} | {row['frames']} | {parts} | {row['MiB a clip']:.0f} |")
    return "\n".join(lines)


def draw(rows: list[Row], path: Path) -> Path:
    """Draw a stacked bar for each method, one panel for each number of frames."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    numbers = sorted({row["frames"] for row in rows})
    figure, axes = plt.subplots(
        1, len(numbers), figsize=(4.5 * len(numbers), 3.2), layout="constrained", squeeze=False
    )
    for axis, number in zip(axes[0], numbers, strict=True):
        own = [row for row in rows if row["frames"] == number]
        names = [row["method"].replace(" ", "\n", 1) for row in own]
        bottom = [0.0] * len(own)
        for part in PARTS:
            heights = [row[f"{part} MiB"] for row in own]
            bars = axis.bar(names, heights, bottom=bottom, label=part)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        axis.bar_label(bars, [f"{row['MiB a clip']:.0f}" for row in own], padding=2)
        axis.set(title=f"ViT-B, {number} frames", ylabel="MiB a clip kept for the backward pass")
        axis.margins(y=0.12)
        axis.tick_params(axis="x", labelsize=8)
    axes[0][0].legend(fontsize=7)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[4, 16], help="frames of a clip")
    options = parser.parse_args()
    from benchmarks.machine import ROOT, machine_facts, print_rows, write_result

    machine, frames = machine_facts(), tuple(options.frames)
    counted = measure(frames)
    picture = draw(counted, ROOT / "docs" / "memory.png")
    rows = [*counted, *(measure_gpu(frames) if torch.cuda.is_available() else [])]
    print_rows(rows)
    print(readme_table(counted))
    baseline = {"paper, ViT-B, 4 frames, MiB a clip": PAPER_MIB}
    print(write_result("memory", rows, machine=machine, baseline=baseline, picture=picture))


if __name__ == "__main__":
    main()
