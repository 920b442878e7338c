"""Opens loaders of clips. This is the only module that interprets the option `decoder`.

Training, evaluation, embeddings, plans and benchmarks open their loaders here as well.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import pyarrow.compute as pc
import torch

from avion_dali.assembly.dali_loading import open_dali_strategy
from avion_dali.assembly.dali_room import pipelines_module
from avion_dali.assembly.decoder_choice import INSTEAD, choose_decoder
from avion_dali.config import DaliConfig, LoaderOptions
from avion_dali.config.checks import require, require_integer
from avion_dali.contracts import UserError
from avion_dali.data.manifest import CHUNKS_FILE, SAMPLES_FILE, Manifest
from avion_dali.data.order import BatchSchedule
from avion_dali.data.planner import ClipRules, Planner
from avion_dali.decode.decoders import CPU_DECODERS
from avion_dali.loading.clip_loader import ClipLoader, LoaderSettings
from avion_dali.loading.frames_strategy import FramesStrategy
from avion_dali.loading.pool import WorkerPool, default_workers
from avion_dali.loading.strategy import LoaderStrategy

if TYPE_CHECKING:
    from typing_extensions import Unpack

DEFAULT_CONTEXT_LENGTH = 77
"""Tokens per text unless the caller specifies a number: that of CLIP's text towers."""

MAX_CONTEXT_LENGTH = 1024


class ClipKeywords(TypedDict, total=False):
    """Keywords of `open_clips` and `ClipDataset` that are documented in `ClipOptions`."""

    sampling: Literal["segments", "strided", "dense"]
    stride: int
    crop: str
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    flip_probability: float
    repeats: int
    eval_clips: int
    eval_crops: Literal[1, 3]
    text: Literal["own", "relevant"]
    relevancy_threshold: float


class LoaderKeywords(ClipKeywords, total=False):
    """Further keywords of `open_clips`.

    Args:
        prefetch_batches: see `avion_dali.config.LoaderOptions`.
        clip_timeout_s: see `avion_dali.config.LoaderOptions`.
        max_bad_fraction: see `avion_dali.config.LoaderOptions`.
        worker_niceness: see `avion_dali.config.LoaderOptions`.
        dali: graphs and threads of `decoder` dali.
        accum_steps: batches per optimizer step, 1 by default; training drops the last partial step.
        context_length: tokens per text, 2 to 1024, or 0 for no tokens; by default 77 if the manifest has texts.
        cut_texts: end the token ids of a batch with its longest text, rounded up to a multiple of 16, instead
            of after `context_length` tokens; False by default.
        quarantine: file to which one JSON line per unreadable clip is written; by default none.
        pool: processes that several loaders share and the caller closes; by default each loader starts its own.
    """

    prefetch_batches: int
    clip_timeout_s: float
    max_bad_fraction: float
    worker_niceness: int
    dali: DaliConfig
    accum_steps: int
    context_length: int
    cut_texts: bool
    quarantine: str | Path
    pool: WorkerPool


def open_clips(  # noqa: PLR0913 - the front door: its keywords are what a user chooses
    manifest: str | Path | Manifest,
    *,
    batch_size: int,
    num_frames: int = 4,
    frame_size: int = 224,
    decoder: str = "auto",
    seed: int = 0,
    training: bool = True,
    device: str | torch.device | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    workers: int = 0,
    **options: Unpack[LoaderKeywords],
) -> ClipLoader[Any]:
    """Open a loader of the clips of a manifest.

    Every random choice is a function of the seed, the epoch and the row of the manifest. The clips do not
    depend on the decoder, the number of workers or ranks, or the point from which an interrupted epoch is
    resumed.

    The loader starts processes, which import the main module of the program again, so call this function below
    `if __name__ == "__main__":`. Close the loader, or use it in a `with` statement.

    Args:
        manifest: folder made by `avion-dali manifest`, or an opened manifest.
        batch_size: clips per batch on this rank.
        num_frames: frames per clip (T).
        frame_size: side length of the square frames in pixels.
        decoder: `dali` (NVDEC, or DALI on the CPU), `cpu-fused`, `paper-fused`, `reference`, or `auto`, which
            selects `dali` if NVDEC works and `cpu-fused` otherwise.
        seed: determines every random choice.
        training: True shuffles each epoch, draws clips at random and drops the last partial batch; False keeps
            the order of the manifest, uses fixed clips and drops nothing.
        device: device of the delivered batches; by default this rank's GPU, or the CPU if there is no GPU.
        rank: rank of this process; by default the variable `RANK`, which torchrun sets, or 0.
        world_size: number of processes; by default the variable `WORLD_SIZE`, or 1.
        workers: decode processes; 0 uses this rank's part of the machine's cores.
        **options: the other fields of `avion_dali.config.ClipOptions`, and those of `LoaderKeywords`.

    Returns:
        An iterable of `ClipBatch`, one epoch per loop, with `len`, `set_epoch`, `state_dict` and
        `load_state_dict`.

    Raises:
        UserError: when the manifest, an option or the decoder cannot be used here.
    """
    require_common(manifest, seed=seed, training=training, context_length=options.get("context_length"))
    own = {name: value for name, value in options.items() if name in LoaderOptions.__dataclass_fields__}
    more: dict[str, Any] = {name: value for name, value in options.items() if name not in own}
    if unknown := sorted(more.keys() - LoaderKeywords.__annotations__.keys()):
        raise TypeError(f"open_clips() has no keyword {', '.join(unknown)}")
    chosen = LoaderOptions(num_frames=num_frames, frame_size=frame_size, workers=workers, **own)  # type: ignore[arg-type]
    opened = manifest if isinstance(manifest, Manifest) else Manifest(manifest)
    on, ranks = default_device(device), _place_among_ranks(rank, world_size)
    sizes, dali, pool = (batch_size, more.pop("accum_steps", 1)), more.pop("dali", None), more.pop("pool", None)
    schedule = _schedule(opened, chosen, sizes=sizes, ranks=ranks, seed=seed, training=training)
    strategy = _open_strategy(decoder, opened, chosen, schedule=schedule, device=on, dali=dali)
    settings = _loader_settings(opened, chosen, device=on, **more)
    return _open(opened, chosen, schedule, strategy=strategy, settings=settings, pool=pool)


def _schedule(
    manifest: Manifest,
    options: LoaderOptions,
    *,
    sizes: tuple[int, int],
    ranks: tuple[int, int],
    seed: int,
    training: bool,
) -> BatchSchedule:
    """Return the schedule that assigns clips to batches; `sizes` are clips per batch and batches per step."""
    batch_size, accum_steps = sizes
    require_integer(batch_size, "`batch_size`", least=1)
    require_integer(accum_steps, "`accum_steps`", least=1)
    rank, world_size = ranks
    per_step = batch_size * accum_steps * world_size
    if training and manifest.num_samples < per_step:
        raise UserError(
            f"{manifest.folder} has {manifest.num_samples} samples, fewer than the {per_step} of one step over "
            "all ranks; lower `batch_size` or add data"
        )
    return BatchSchedule(
        num_samples=manifest.num_samples,
        clips_per_sample=ClipRules.from_options(options, training=training).clips_per_row,
        global_batch=per_step,
        micro_batch=batch_size,
        rank=rank,
        world_size=world_size,
        seed=seed,
        training=training,
    )


def _loader_settings(
    manifest: Manifest,
    options: LoaderOptions,
    *,
    device: torch.device,
    context_length: int | None = None,
    cut_texts: bool = False,
    quarantine: str | Path | None = None,
) -> LoaderSettings:
    return LoaderSettings(
        device=device,
        context_length=default_context_length(manifest) if context_length is None else context_length,
        prefetch_batches=options.prefetch_batches,
        max_bad_fraction=options.max_bad_fraction,
        quarantine=_file_to_write(quarantine) if quarantine else None,
        cut_texts=cut_texts,
    )


def _open(
    manifest: Manifest,
    options: LoaderOptions,
    schedule: BatchSchedule,
    *,
    strategy: LoaderStrategy[Any],
    settings: LoaderSettings,
    pool: WorkerPool | None,
) -> ClipLoader[Any]:
    require(pool is None or isinstance(pool, WorkerPool), "`pool`", value=pool, allowed="a WorkerPool")
    rules = ClipRules.from_options(options, training=schedule.training)
    planner = Planner(manifest, rules, seed=schedule.seed)
    owns_pool = pool is None
    pool = pool or open_pool(options)
    try:
        return ClipLoader(
            planner, schedule, pool=pool, strategy=strategy, settings=settings, owns_pool=owns_pool
        )
    except BaseException:
        if owns_pool:
            pool.close()
        raise


def open_pool(options: LoaderOptions) -> WorkerPool:
    """Start the worker processes of this rank.

    Args:
        options: number and niceness of processes, and the time limit per clip.
    """
    return WorkerPool(
        workers=options.workers or default_workers(ranks_on_machine()),
        timeout_s=options.clip_timeout_s,
        niceness=options.worker_niceness,
    )


def ranks_on_machine() -> int:
    """Return the number of training processes on this machine, as set by torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def require_common(manifest: object, *, seed: object, training: object, context_length: object = None) -> None:
    """Check the types of arguments that `open_clips` and `ClipDataset` have in common.

    Args:
        manifest: a path or a manifest.
        seed: the seed.
        training: whether clips are drawn for training.
        context_length: tokens per text, or None.

    Raises:
        UserError: names the first argument that cannot be used.
    """
    named = isinstance(manifest, (str, Path, Manifest)) and manifest != ""
    require(named, "`manifest`", value=manifest, allowed="the path of a manifest, or a Manifest")
    require_integer(seed, "`seed`", least=0)
    require(isinstance(training, bool), "`training`", value=training, allowed="True or False")
    if context_length is not None:
        require_integer(context_length, "`context_length`", least=0, below=MAX_CONTEXT_LENGTH + 1)
        # A text begins and ends with a token of its own.
        allowed = f"0 for no tokens, or in [2, {MAX_CONTEXT_LENGTH}]"
        require(context_length != 1, "`context_length`", value=context_length, allowed=allowed)


def _file_to_write(quarantine: str | Path) -> Path:
    named = isinstance(quarantine, (str, Path)) and not Path(quarantine).is_dir()
    require(named, "`quarantine`", value=quarantine, allowed="the path of a file")
    return Path(quarantine)


def default_device(device: str | torch.device | None) -> torch.device:
    """Return the device of batches: the requested one, else this rank's GPU, else the CPU.

    Args:
        device: the requested device, or None.

    Raises:
        UserError: when PyTorch has no such device here.
    """
    if device is not None:
        try:
            return torch.empty(0, device=device).device
        except (RuntimeError, TypeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"`device` = {device!r} cannot be used here: {reason}") from error
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))
    return torch.device("cpu")


def default_context_length(manifest: Manifest) -> int:
    """Return the number of tokens per text: 77 if the manifest has texts, else 0.

    Args:
        manifest: the manifest.
    """
    batches = manifest.table(SAMPLES_FILE).batches()
    has_texts = any(pc.sum(pc.list_value_length(batch["texts"])).as_py() for batch in batches)
    return DEFAULT_CONTEXT_LENGTH if has_texts else 0


def _place_among_ranks(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise UserError("give both `rank` and `world_size`, or neither to take those that torchrun sets")
    if rank is None or world_size is None:
        rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    require_integer(world_size, "`world_size`", least=1)
    require_integer(rank, "`rank`", least=0)
    if not 0 <= rank < world_size:
        raise UserError(f"`rank` = {rank} must be in [0, `world_size`), and `world_size` is {world_size}")
    return rank, world_size


def _open_strategy(
    decoder: str,
    manifest: Manifest,
    options: LoaderOptions,
    *,
    schedule: BatchSchedule,
    device: torch.device,
    dali: DaliConfig | None,
) -> LoaderStrategy[Any]:
    """Create the loading strategy of a decoder."""
    name = choose_decoder(decoder, device).name
    if name in CPU_DECODERS:
        return FramesStrategy(CPU_DECODERS[name])
    if name != "dali":
        raise UserError(f"`decoder` = {name!r} has no strategy for loading; add it to open_clips.py")
    if device.type != "cuda":
        require_decodable_without_gpu(manifest)
    clip_shape = ClipRules.from_options(options, training=schedule.training).clip_shape
    return open_dali_strategy(
        dali or DaliConfig(),
        manifest,
        schedule=schedule,
        clip_shape=clip_shape,
        device=device,
        ranks_on_machine=ranks_on_machine(),
    )


def require_decodable_without_gpu(manifest: Manifest) -> None:
    """Check that DALI can decode all chunks of a manifest on the CPU.

    Args:
        manifest: the manifest.

    Raises:
        UserError: when it cannot; the message names the alternatives.
    """
    decodable = pipelines_module("codecs").DECODABLE["cpu"]
    others = sorted(chunk_codecs(manifest) - decodable)
    if others:
        raise UserError(
            f"`decoder` dali decodes {', '.join(sorted(decodable))} without a GPU, and {manifest.folder} has "
            f"{' and '.join(others)} chunks; {INSTEAD}, or make chunks for DALI with "
            "`avion-dali chunk --profile vp9`"
        )


def chunk_codecs(manifest: Manifest) -> set[str]:
    """Return the codecs that occur among a manifest's chunks.

    Args:
        manifest: the manifest.
    """
    columns = (batch.column("codec") for batch in manifest.table(CHUNKS_FILE).batches())
    return {codec for column in columns for codec in column.unique().to_pylist()}
