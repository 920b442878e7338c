"""Savings of each idea of the paper in a training step: rows of AVION's table 4 (arXiv 2309.16669).

python -m benchmarks.train.ablation [--rounds 2] [--videos FILE ...] [--folder DIR]

Chunk length, crop merged into decoding or not, attention kernel and batch size, each through the project's own
loader and training loop; below them what this project adds, reading and decoding only the packets a clip needs.
A tiny model on a CPU, ViT-B on a GPU. Files are read from the page cache: a disk that is too slow for whole
five-minute files, the paper's first bottleneck, shows in the bytes read, not in the times.

Workers import this module: what needs torch is imported late.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from avion_dali.cores import available_cores
from avion_dali.decode.clip import ClipDecoder
from avion_dali.decode.decoders import DecodeClip
from avion_dali.decode.reading import read_spanned
from avion_dali.decode.rendering import ReferenceView
from benchmarks.report import Benchmark, Row, markdown, names, parser_of, select

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from avion_dali.config import AttentionBackend, ModelSize
    from avion_dali.data.manifest import Manifest
    from avion_dali.data.profiles import ProfileName
    from avion_dali.engine.loop import TrainLoop
    from avion_dali.engine.protocols import BatchSource
    from avion_dali.engine.timing import WindowTiming

LONG_REPEATS = 20  # of a chunk of 15 seconds: five minutes
WARM_STEPS = 2
SAMPLES = 4_000


crop_afterwards = ClipDecoder("crop-afterwards", read_spanned, ReferenceView)
"""Decodes from the keyframe on, converts full frames, then crops and resizes: before the paper's third idea."""


# A decoder's name, or a function in its place.
DECODERS: dict[str, str | DecodeClip] = {
    "after decoding": crop_afterwards,
    "merged": "paper-fused",
    "merged, packet plan": "cpu-fused",
    "by DALI": "dali",  # `benchmarks.gpu` trains with it
}


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    chunk: str  # `300 s` or `15 s`
    crop: str  # key of `DECODERS`
    # Of the video tower: `math` stores the attention matrix; `sdpa` takes the kernel that torch finds best.
    attention: AttentionBackend
    profile: ProfileName = "compat"  # how the chunks are encoded


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
    """Model, batches and length."""

    device: str  # where the model is trained
    size: ModelSize  # of the model
    frame_size: int  # side of a frame in pixels
    batches: tuple[int, ...]  # clips of a step
    workers: int  # decode processes
    steps: int = 4  # measured after `WARM_STEPS` others


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
    """Train a few steps and return how their time is spent."""
    import torch

    from avion_dali.loading.frames_strategy import FramesStrategy
    from benchmarks.corpus import FOUR
    from benchmarks.loader.measure import LoaderBench, open_loader

    loading = LoaderBench(micro_batch=batch, frame_size=bench.frame_size, device=bench.device)
    what: Row = {"measured": "training", "batch": batch, **vars(case)}
    how = DECODERS[case.crop]
    decoder = how if isinstance(how, str) else FramesStrategy(how)
    with open_loader(manifest, FOUR, loading, decoder=decoder, workers=bench.workers) as loader:
        try:
            loop = build_loop(loader, bench, batch=batch, folder=folder, attention=case.attention)
            rates, timing = train(loop, warm_steps=WARM_STEPS, steps=bench.steps)
            numbers = step_row(rates, timing, on_gpu=bench.device == "cuda")
        except torch.OutOfMemoryError:
            numbers = {"out_of_memory": True}
    model = {name: getattr(bench, name) for name in ("size", "device", "frame_size", "workers")}
    return {**what, **numbers, "model": model.pop("size"), **model}


def run_round(manifests: dict[tuple[str, str], Manifest], bench: AblationBench, folder: Path) -> list[Row]:
    """Every case with every batch size, once."""
    return [
        run_case(case, manifests[case.chunk, case.profile], bench, batch=batch, folder=folder)
        for batch in bench.batches
        for case in CASES
    ]


def build_loop(
    loader: BatchSource, bench: AblationBench, *, batch: int, folder: Path, attention: AttentionBackend = "auto"
) -> TrainLoop:
    """The training loop of `avion-dali pretrain`, without its files."""
    import torch

    from avion_dali.assembly.resolve import resolve
    from avion_dali.assembly.run_model import build_model
    from avion_dali.config import DataConfig, ModelConfig, OptimConfig, TrainConfig
    from avion_dali.engine.distributed import Distributed
    from avion_dali.engine.loop import TrainLoop
    from avion_dali.engine.loop_settings import LoopSettings
    from avion_dali.engine.optimizers import build_optimizer, parameter_groups
    from avion_dali.objectives.contrastive import Contrastive
    from benchmarks.loader.measure import CONTEXT_LENGTH

    config = TrainConfig(
        output_dir=str(folder),
        decoder="cpu-fused",  # of no effect: the loader is open
        data=DataConfig(num_frames=4, frame_size=bench.frame_size),
        model=ModelConfig(size=bench.size, context_length=CONTEXT_LENGTH, attention=attention),
        optim=OptimConfig(global_batch=batch, micro_batch=batch),
    )
    run = resolve(config, Distributed(device=torch.device(bench.device)))
    model = build_model(run, num_classes=0)
    return TrainLoop(
        model,
        build_optimizer(parameter_groups(model, config.optim.weight_decay), config.optim),
        objective=Contrastive(config.data.normalization),
        loader=loader,
        settings=LoopSettings.from_config(run.config),
        distributed=run.distributed,
        after_step=lambda: run.task.after_step(model),
    )


def train(loop: TrainLoop, *, warm_steps: int, steps: int) -> tuple[Row, WindowTiming]:
    """Train until loading is in a steady state, then measure some steps.

    Returns:
        What the machine did meanwhile, and the loop's own timing.
    """
    from avion_dali.loading.faults import LoaderStats
    from benchmarks.loader.measure import Reading

    stats = loop.loader.stats
    assert isinstance(stats, LoaderStats)
    numbers = loop.steps(0, loop.last_step)
    for _ in islice(numbers, warm_steps):
        pass
    loop.timer.window()
    before = Reading.now(stats)
    for _ in islice(numbers, steps):
        pass
    timing = loop.timer.window()
    return Reading.now(stats).since(before), timing


def step_row(rates: Row, timing: WindowTiming, *, on_gpu: bool) -> Row:
    """Time of a step, and how much of it waits for clips."""
    return {
        "load_overhead_s": timing.data_wait_s,
        "load_share": timing.data_wait_share,
        "step_s": timing.step_s,
        "clips_per_s": timing.clips_per_s,
        **({"memory_mib": timing.memory_mb} if on_gpu else {}),
        **{name: rates[name] for name in ("kb_read_per_clip", "cores_taken_by_other_programs")},
    }


def tables(rows: list[Row]) -> str:
    """The columns of the paper's table 4."""
    what = ("batch", "chunk", "crop", "attention", "profile")
    lines = []
    for row in select(rows, "training"):
        numbers = ["out of memory", None, None, None]
        if "step_s" in row:
            wait = f"{row['load_overhead_s']:.3f} ({row['load_share']:.0%})"
            rates = f"{row['clips_per_s']:.0f}", f"{row['kb_read_per_clip']:.0f}"
            numbers = [wait, f"{row['step_s']:.3f}", *rates]
        lines.append([*(row[name] for name in what), *numbers])
    heads = (
        "batch",
        "chunks",
        "crop",
        "attention",
        "profile",
        "load overhead, s",
        "step, s",
        "clips/s",
        "kB read",
    )
    return markdown(heads, lines)


def draw(rows: list[Row]) -> Figure:
    """Draw each case's time per clip: working and waiting, one panel for each batch size."""
    from matplotlib.figure import Figure

    rows = select(rows, "training")
    batches = names(rows, "batch")
    figure = Figure(figsize=(5.5 * len(batches), 4), layout="constrained")
    axes = figure.subplots(1, len(batches), squeeze=False, sharey=True)
    for axis, batch in zip(axes[0], batches, strict=True):
        own = [row for row in rows if row["batch"] == batch and "step_s" in row]
        cases = [f"{r['profile']}, {r['chunk']}, crop {r['crop']}, {r['attention']}" for r in own]
        waits = [1000 * row["load_overhead_s"] / batch for row in own]
        works = [1000 * (row["step_s"] - row["load_overhead_s"]) / batch for row in own]
        axis.barh(cases, works, color="C0", label="model")
        bars = axis.barh(cases, waits, left=works, color="C3", label="waiting for clips")
        axis.bar_label(bars, [f"{row['clips_per_s']:.0f}/s" for row in own], fontsize=7, padding=2)
        axis.set(title=f"batch {batch}, {rows[0]['model']} on {rows[0]['device']}", xlabel="ms per clip")
        axis.tick_params(axis="y", labelsize=7)
        axis.margins(x=0.12)
    axes[0][0].invert_yaxis()
    axes[0][0].legend(fontsize=7)
    return figure


BENCHMARK = Benchmark("ablation", tables, draw)


def main() -> None:
    from benchmarks.media import add_video_options, measure_videos

    parser = parser_of(__doc__)
    add_video_options(parser)
    parser.add_argument("--rounds", type=int, default=2, help="repetitions of the table; the best counts")
    options = parser.parse_args()

    def measure(videos: list[Path], folder: Path) -> list[Row]:
        from benchmarks.loader.report import best_of_rounds

        bench = choose_bench()
        manifests = prepare(videos, folder, {case.profile for case in CASES})
        rows = [row for _ in range(options.rounds) for row in run_round(manifests, bench, folder / "run")]
        return best_of_rounds(rows, ("batch", *Case.__dataclass_fields__))

    measure_videos(BENCHMARK, options, measure)


if __name__ == "__main__":
    main()
