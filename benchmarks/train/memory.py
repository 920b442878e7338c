"""Activation memory of a video encoder, by the part that saves it: figure 3 of AVION (arXiv 2309.16669).

python -m benchmarks.train.memory [--frames 4 16]

Counted, not sampled: while one clip passes forwards, every tensor that autograd keeps for the backward pass is
looked at (`torch.autograd.graph.saved_tensors_hooks`). Each piece of memory counts once, for the part that
saved it first, however many tensors view it; parameters do not count. So the input of a LayerNorm counts for
the norm, its output for the attention or MLP that multiplies it. All is bfloat16, as in the paper's figure, and
the same on a CPU as on a GPU; training in autocast keeps the sums between blocks in float32 and takes more.
`benchmarks.gpu` compares the counts with a GPU's allocator and finds the largest batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from avion_dali.config import AttentionBackend, ModelConfig, ModelSize
from avion_dali.models.presets import PRESETS
from avion_dali.models.towers import build_video_tower
from benchmarks.report import Benchmark, Row, markdown, names, parser_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIB = 2**20
# What the paper's figure 3 shows for ViT-B, 4 frames, MiB per clip.
PAPER_MIB = {"baseline": 418, "memory-efficient attention": 221, "and checkpointing": 14}
KINDS = {"attn": "attention", "timeattn": "attention", "mlp": "MLP"}
NORMS = ("ln_", "norm")
REST = "block inputs, patches"  # of blocks that are recomputed
PARTS = ("LayerNorm", "attention", "MLP", REST)


@dataclass(frozen=True)
class Method:
    """A bar of the figure."""

    name: str  # what the paper calls it
    attention: AttentionBackend  # `math` keeps the attention matrix
    checkpoint_every: int  # recompute blocks


METHODS = (
    Method("baseline", "math", 0),
    Method("memory-efficient attention", "sdpa", 0),
    Method("and checkpointing", "sdpa", 1),
)


@dataclass(frozen=True)
class Subject:
    """What is measured."""

    encoder: str = "vit"  # which
    size: ModelSize = "vit_b16"  # of it
    frames: int = 4  # of a clip
    frame_size: int = 0  # side of a frame in pixels; 0 takes that of the size

    def build(self, method: Method, device: str) -> nn.Module:
        """Create the encoder in bfloat16."""
        options = ModelConfig(
            encoder=self.encoder,
            size=self.size,
            attention=method.attention,
            checkpoint_every=method.checkpoint_every,
        )
        with torch.device(device):
            tower = build_video_tower(options, num_frames=self.frames, frame_size=self.side, embed_dim=256)
        return tower.to(torch.bfloat16).train()

    def clips(self, number: int, device: str) -> Tensor:
        """Create clips in bfloat16."""
        return torch.randn(number, 3, self.frames, self.side, self.side, device=device, dtype=torch.bfloat16)

    @property
    def side(self) -> int:
        """Side of a frame in pixels."""
        return self.frame_size or PRESETS[self.size].image_size


class SavedBytes:
    """Adds up what autograd keeps, by the part of the model that runs."""

    def __init__(self, model: nn.Module) -> None:
        self.by_part: Counter[str] = Counter()
        self._model = model
        self._running: list[str] = []
        self._kept: list[Tensor] = []  # kept alive, so that no address is reused
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
        "measured": "saved for the backward pass",
        "encoder": f"{subject.encoder} {subject.size}",
        "frames": subject.frames,
        "method": method.name,
        "MiB a clip": round(sum(saved.values()) / MIB, 1),
        **{f"{part} MiB": round(saved[part] / MIB, 1) for part in PARTS},
    }


def measure(frames: tuple[int, ...] = (4, 16)) -> list[Row]:
    """Count for ViT-B, all methods and lengths."""
    return [count(Subject(frames=number), method) for number in frames for method in METHODS]


def tables(rows: list[Row]) -> str:
    """Memory of a clip for the backward pass, by method and part."""
    heads = ("ViT-B, MiB per clip", "frames", *PARTS, "all")
    lines = []
    for row in rows:
        parts = [f"{row[f'{part} MiB']:.0f}" for part in PARTS]
        lines.append([row["method"], row["frames"], *parts, f"{row['MiB a clip']:.0f}"])
    return markdown(heads, lines)


def draw(rows: list[Row]) -> Figure:
    """Draw a stacked bar for each method, one panel for each number of frames."""
    from matplotlib.figure import Figure

    numbers = names(rows, "frames")
    figure = Figure(figsize=(4.5 * len(numbers), 3.2), layout="constrained")
    axes = figure.subplots(1, len(numbers), squeeze=False)
    for axis, number in zip(axes[0], numbers, strict=True):
        own = [row for row in rows if row["frames"] == number]
        methods = [row["method"].replace(" ", "\n", 1) for row in own]
        bottom = [0.0] * len(own)
        for part in PARTS:
            heights = [row[f"{part} MiB"] for row in own]
            bars = axis.bar(methods, heights, bottom=bottom, label=part)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        axis.bar_label(bars, [f"{row['MiB a clip']:.0f}" for row in own], padding=2)
        axis.set(title=f"ViT-B, {number} frames", ylabel="MiB per clip kept for the backward pass")
        axis.margins(y=0.12)
        axis.tick_params(axis="x", labelsize=8)
    axes[0][0].legend(fontsize=7)
    return figure


BENCHMARK = Benchmark("memory", tables, draw, {"paper, ViT-B, 4 frames, MiB a clip": PAPER_MIB})


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--frames", type=int, nargs="+", default=[4, 16], help="frames of a clip")
    options = parser.parse_args()
    BENCHMARK.run(options, lambda: measure(tuple(options.frames)))


if __name__ == "__main__":
    main()
