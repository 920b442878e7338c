"""What each idea of the paper saves in a training step: the rows of AVION's table 4 (arXiv 2309.16669).

python -m benchmarks.ablation [--rounds 2] [--videos FILE ...] [--folder DIR]

Chunk length, crop merged into decoding or not, attention kernel and batch size, each through the project's own
loader and training loop; below them what this project adds, reading and decoding only the packets a clip needs.
A tiny model on a CPU, ViT-B on a GPU. Files are read from the page cache: a disk that is too slow for whole
five-minute files, the paper's first bottleneck, shows in the bytes read, not in the times.

Workers import this module: what needs torch is imported late.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from avion_dali.cores import available_cores
from avion_dali.decode import cpu_fused, paper_fused
from avion_dali.decode.clip import ClipDecoder
from avion_dali.decode.reading import read_spanned
from avion_dali.decode.rendering import ReferenceView

if TYPE_CHECKING:
    from avion_dali.config import AttentionBackend, ModelSize
    from avion_dali.data.manifest import Manifest
    from avion_dali.data.profiles import ProfileName
    from avion_dali.engine.loop import TrainLoop
    from avion_dali.loading.clip_loader import ClipLoader
    from benchmarks.machine import Row

LONG_REPEATS = 20  # of a chunk of 15 seconds: five minutes
WARM_STEPS = 2
SAMPLES = 4_000


crop_afterwards = ClipDecoder("crop-afterwards", read_spanned, ReferenceView)
"""Decodes from the keyframe on, converts full frames, then crops and resizes: before the paper's third idea."""

DECODERS = {
    "after decoding": crop_afterwards,
    "merged": paper_fused.decode_clip,
    "merged, packet plan": cpu_fused.decode_clip,
}


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Args:
        chunk: `300 s` or `15 s`.
        crop: key of `DECODERS`.
        attention: of the video tower: `math` stores the attention matrix; `sdpa` takes the kernel that torch
            finds best.
        profile: how the chunks are encoded.
    """

    chunk: str
    crop: str
    attention: AttentionBackend
    profile: ProfileName = "compat"


CASES = (
    Case("300 s", "after decoding", "math"),
    Case("300 s", "after decoding", "sdpa"),
    Case("300 s", "merged", "sdpa"),
    Case("15 s", "after decoding", "sdpa"),
    Case("15 s", "merged", "sdpa"),
    Case("300 s", "merged, packet plan", "sdpa"),
    Case("15 s", "merged, packet plan", "sdpa"),
    Case("300 s", "merged, packet plan", "sdpa", "balanced"),
    Case("15 s", "merged, packet plan", "sdpa", "balanced"),
    Case("15 s", "merged, packet plan", "math", "balanced"),
)


@dataclass(frozen=True)
class AblationBench:
    """Model, batches and length.

    Args:
        device: where the model is trained.
        size: of the model.
        frame_size: side of a frame in pixels.
        batches: clips of a step.
        workers: decode processes.
        steps: measured after `WARM_STEPS` others.
    """

    device: str
    size: ModelSize
    frame_size: int
    batches: tuple[int, ...]
    workers: int
    steps: int = 4


def choose_bench() -> AblationBench:
    """The full size where there is a GPU, else what a CPU trains in seconds; one core is the trainer's."""
    import torch

    workers = max(1, available_cores() - 1)
    if torch.cuda.is_available():
        return AblationBench("cuda", "vit_b16", 224, batches=(64, 256), workers=workers, steps=10)
    return AblationBench("cpu", "tiny", 64, batches=(8, 32), workers=workers)


def prepare(
    videos: list[Path], folder: Path, profiles: set[ProfileName], *, short_side: int = 288
) -> dict[tuple[str, str], Manifest]:
    """Manifests of 15-second chunks and of the same repeated to five minutes, by chunk length and profile."""
    from benchmarks.corpus import FOUR, chunk_sources, kind_manifest, repeat_chunk

    manifests: dict[tuple[str, str], Manifest] = {}
    for profile in sorted(profiles):
        chunks = chunk_sources(videos, folder / f"{profile}_15", profile, short_side=short_side)
        for path in sorted(chunks.glob("*/0.mp4")):
            repeat_chunk(path, folder / f"{profile}_300" / path.parent.name / path.name, LONG_REPEATS)
        for seconds in (15, 300):
            named = folder / f"{profile}_{seconds}"
            manifests[f"{seconds} s", profile] = kind_manifest(
                named, named.with_suffix(".manifest"), FOUR, samples=SAMPLES
            )
    return manifests


def run_case(case: Case, manifest: Manifest, bench: AblationBench, *, batch: int, folder: Path) -> Row:
    """Train a few steps and say where their time went."""
    import torch

    from avion_dali.loading.pool import WorkerPool
    from benchmarks.corpus import FOUR
    from benchmarks.loader_runs import LoaderBench, opened_loader

    loading = LoaderBench(micro_batch=batch, frame_size=bench.frame_size, device=bench.device)
    what = {"batch": batch, "chunk": case.chunk, "crop": case.crop, "attention": case.attention}
    with (
        WorkerPool(workers=bench.workers, timeout_s=120) as pool,
        opened_loader(manifest, FOUR, pool, DECODERS[case.crop], bench=loading) as loader,
    ):
        try:
            loop = build_loop(loader, bench, batch=batch, folder=folder, attention=case.attention)
            numbers = train(loop, loader, bench=bench)
        except torch.OutOfMemoryError:
            numbers = {"out_of_memory": True}
    return {**what, "profile": case.profile, **numbers}


def run_round(manifests: dict[tuple[str, str], Manifest], bench: AblationBench, folder: Path) -> list[Row]:
    """Every case with every batch size, once."""
    return [
        run_case(case, manifests[case.chunk, case.profile], bench, batch=batch, folder=folder)
        for batch in bench.batches
        for case in CASES
    ]


def best_of_rounds(rounds: list[list[Row]]) -> list[Row]:
    """The fastest round of each case: other programs only ever slow one down."""
    best: list[Row] = []
    for same in zip(*rounds, strict=True):
        fastest: Row = min(same, key=lambda row: row.get("step_s", 0.0))
        best.append({**fastest, "rounds": len(rounds)})
    return best


def build_loop(
    loader: ClipLoader[float],
    bench: AblationBench,
    *,
    batch: int,
    folder: Path,
    attention: AttentionBackend = "auto",
) -> TrainLoop:
    """The training loop of `train.pretrain`, without its files."""
    import torch

    from avion_dali.assembly.model import build_model
    from avion_dali.assembly.resolve import resolve
    from avion_dali.config import DataConfig, ModelConfig, OptimConfig, TrainConfig
    from avion_dali.engine.distributed import Distributed
    from avion_dali.engine.loop import LoopSettings, TrainLoop
    from avion_dali.engine.optim import build_optimizer, parameter_groups
    from avion_dali.objectives.contrastive import Contrastive
    from benchmarks.loader_runs import CONTEXT_LENGTH

    config = TrainConfig(
        output_dir=str(folder),
        data=DataConfig(num_frames=4, frame_size=bench.frame_size),
        model=ModelConfig(size=bench.size, context_length=CONTEXT_LENGTH, attention=attention),
        optim=OptimConfig(global_batch=batch, micro_batch=batch),
    )
    distributed = Distributed(device=torch.device(bench.device))
    model = build_model(resolve(config, distributed), num_classes=0)
    return TrainLoop(
        model,
        build_optimizer(parameter_groups(model, config.optim.weight_decay), config.optim),
        objective=Contrastive(config.data.normalization),
        loader=loader,
        settings=LoopSettings.from_config(config),
        distributed=distributed,
        after_step=model.clamp_logit_scale,
    )


def train(loop: TrainLoop, loader: ClipLoader[float], *, bench: AblationBench) -> Row:
    """Time of a step, and how much of it waits for clips, once loading is in full swing."""
    import torch

    from benchmarks.loader_runs import Reading

    steps = loop.steps(0, loop.last_step)
    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM_STEPS):
        next(steps)
    loop.timer.window()
    before = Reading.now(loader)
    for _ in range(bench.steps):
        next(steps)
    timing = loop.timer.window()
    rates = Reading.now(loader).since(before)
    return {
        "load_overhead_s": round(timing.data_wait_s, 4),
        "load_share": round(timing.data_wait_share, 3),
        "step_s": round(timing.step_s, 4),
        "clips_per_s": round(timing.clips_per_s, 1),
        **({"memory_mib": round(timing.memory_mb)} if bench.device == "cuda" else {}),
        **{name: rates[name] for name in ("kb_read_per_clip", "cores_taken_by_other_programs")},
    }


def readme_table(rows: list[Row]) -> str:
    """The README's table, with the columns of the paper's table 4."""
    lines = [
        "| batch | chunks | crop | attention | profile | load overhead, s | step, s | clips/s | kB a clip |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        what = " | ".join(str(row[name]) for name in ("batch", "chunk", "crop", "attention", "profile"))
        if "out_of_memory" in row:
            lines.append(f"| {what} | out of memory | | | |")
            continue
        wait = f"{row['load_overhead_s']:.3f} ({row['load_share']:.0%})"
        rates = f"{row['clips_per_s']:.0f} | {row['kb_read_per_clip']:.0f}"
        lines.append(f"| {what} | {wait} | {row['step_s']:.3f} | {rates} |")
    return "\n".join(lines)


def draw(rows: list[Row], bench: AblationBench, path: Path) -> Path:
    """Draw each case's time a clip: working and waiting, one panel a batch size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1,
        len(bench.batches),
        figsize=(5.5 * len(bench.batches), 4),
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    for axis, batch in zip(axes[0], bench.batches, strict=True):
        own = [row for row in rows if row["batch"] == batch and "step_s" in row]
        names = [f"{r['profile']}, {r['chunk']}, crop {r['crop']}, {r['attention']}" for r in own]
        waits = [1000 * row["load_overhead_s"] / batch for row in own]
        works = [1000 * (row["step_s"] - row["load_overhead_s"]) / batch for row in own]
        axis.barh(names, works, color="C0", label="model")
        bars = axis.barh(names, waits, left=works, color="C3", label="waiting for clips")
        axis.bar_label(bars, [f"{row['clips_per_s']:.0f}/s" for row in own], fontsize=7, padding=2)
        axis.set(title=f"batch {batch}, {bench.size} on {bench.device}", xlabel="ms a clip")
        axis.tick_params(axis="y", labelsize=7)
        axis.margins(x=0.12)
    axes[0][0].invert_yaxis()
    axes[0][0].legend(fontsize=7)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="repetitions of the table; the best counts")
    parser.add_argument("--videos", type=Path, nargs="+", help="train on these instead of procedural videos")
    parser.add_argument("--folder", type=Path, help="keep chunks here; by default they are thrown away")
    options = parser.parse_args()
    from benchmarks.corpus import SourceSettings, write_sources
    from benchmarks.machine import ROOT, machine_facts, print_rows, write_result

    machine, bench = machine_facts(), choose_bench()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        videos = options.videos or write_sources(folder / "videos", SourceSettings())
        manifests = prepare(videos, folder, {case.profile for case in CASES})
        rounds = [run_round(manifests, bench, folder / "run") for _ in range(options.rounds)]
        rows = best_of_rounds(rounds)
    model = {
        "model": bench.size,
        "device": bench.device,
        "frame_size": bench.frame_size,
        "workers": bench.workers,
    }
    rows = [{**row, **model} for row in rows]
    print_rows(rows)
    print(readme_table(rows))
    picture = draw(rows, bench, ROOT / "docs" / "ablation.png")
    print(write_result("ablation", rows, machine=machine, picture=picture))


if __name__ == "__main__":
    main()
