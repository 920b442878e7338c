"""Write embeddings of videos or of a manifest's clips.

torchrun --nproc_per_node=8 -m avion_dali features --checkpoint FILE --manifest M --output features.safetensors
"""

# Decode workers import this module again, so it imports little.

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from avion_dali.cli.arguments import parameters_as_keys
from avion_dali.config import EvaluateConfig
from avion_dali.contracts import UserError
from avion_dali.files import atomic_write, atomic_write_text, whole_or_absent
from avion_dali.wording import few_lines, printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from avion_dali.data.manifest import Manifest
    from avion_dali.engine.distributed import Distributed
    from avion_dali.tasks.sample_means import PerSample

ENDINGS = (".safetensors", ".npy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "videos", nargs="*", type=Path, help="video files or folders of them, without --manifest"
    )
    parser.add_argument(
        "--checkpoint", required=True, help="weights of this project or another, see `avion-dali weights`"
    )
    parser.add_argument("--manifest", default="", help="manifest folder: one embedding per row")
    parser.add_argument("--output", required=True, type=Path, help="file to write, .safetensors or .npy")
    parser.add_argument(
        "--clip-seconds", default=0.0, type=float, help="length of clips (0: one clip per video)"
    )
    parser.add_argument("--num-frames", default=0, type=int, help="frames per clip (default: as trained)")
    parser.add_argument("--eval-clips", default=1, type=int, help="clips averaged per embedding")
    parser.add_argument(
        "--eval-crops", default=1, type=int, choices=(1, 3), help="crop windows averaged per clip"
    )
    projection = "the encoder's features instead of the space shared with texts"
    parser.add_argument("--before-projection", action="store_true", help=projection)
    parser.add_argument("--decoder", default="auto", help="how clips are decoded (default: auto)")
    parser.add_argument("--workers", default=0, type=int, help="decode processes (default: one per core)")
    parser.add_argument("--micro-batch", default=32, type=int, help="clips per forward pass")


def run(options: argparse.Namespace) -> int:
    """Write embeddings; status 1 if videos or clips could not be read."""
    _check(options)
    # Decode workers import this module again, so slow imports are here.
    from avion_dali.engine.distributed import distributed_session

    keys = parameters_as_keys(EvaluateConfig)
    with keys, distributed_session() as distributed, working_folder(options, distributed) as folder:
        from avion_dali.data.manifest import Manifest

        manifest = Manifest(options.manifest or folder / "manifest")
        left_out = left_out_files(folder)
        features = embed_manifest(options, manifest, distributed=distributed, folder=folder)
        if distributed.is_main:
            write_features(options.output, features, manifest=manifest)
            print(f"{options.output}: {len(features.sample_ids)} embeddings, {features.means_SX.shape[1]} wide")
    if (features.unreadable or left_out) and distributed.is_main:
        lost = [f"{len(left_out)} files"] if left_out else []
        lost += [f"{features.unreadable} clips"] if features.unreadable else []
        listed = options.output.with_suffix(".quarantine.jsonl")
        print(f"{' and '.join(lost)} could not be read and have no embedding: {listed}", file=sys.stderr)
    return 1 if features.unreadable or left_out else 0


def _check(options: argparse.Namespace) -> None:
    """Check the options before slow imports."""
    if options.output.suffix not in ENDINGS or not options.output.absolute().parent.is_dir():
        raise UserError(f"--output {options.output} must end in {' or '.join(ENDINGS)}, in an existing folder")
    if bool(options.manifest) == bool(options.videos):
        raise UserError("give either videos or --manifest")
    if not 0 <= options.clip_seconds < float("inf"):
        raise UserError(f"--clip-seconds {options.clip_seconds:g} must be > 0, or 0 for one clip per video")
    for name, least in (("eval_clips", 1), ("micro_batch", 1), ("num_frames", 0), ("workers", 0)):
        if getattr(options, name) < least:
            option = name.replace("_", "-")
            raise UserError(f"--{option} {getattr(options, name)} must be at least {least}")
    missing = [str(path) for path in options.videos if not path.exists()]
    if missing:
        raise UserError("\n".join([f"{len(missing)} of the videos do not exist:", *few_lines(missing)]))


@contextmanager
def working_folder(options: argparse.Namespace, distributed: Distributed) -> Iterator[Path]:
    """Yield a folder beside the output, equal on all ranks; of it only the list of failures is kept."""
    from avion_dali.engine.agreement import shared_folder_lock
    from avion_dali.engine.distributed import barrier

    folder = options.output.with_name(options.output.name + ".work")
    listed = options.output.with_suffix(".quarantine.jsonl")
    with shared_folder_lock(folder, "embedding videos", distributed=distributed):
        try:
            if distributed.is_main:
                _fill(folder, options, listed=listed)
            barrier()
            yield folder
        finally:
            if distributed.is_main:
                _keep_failures(folder, listed)
                shutil.rmtree(folder, ignore_errors=True)


def _fill(folder: Path, options: argparse.Namespace, *, listed: Path) -> None:
    """Remove what a run that was killed left, and make the manifest of videos."""
    shutil.rmtree(folder / "manifest", ignore_errors=True)
    for path in (folder / "quarantine.jsonl", listed):
        path.unlink(missing_ok=True)
    if options.videos:
        _build_manifest(options, folder / "manifest")


def _keep_failures(folder: Path, listed: Path) -> None:
    """Write a list of excluded files and unreadable clips, if there are any."""
    failures = folder / "quarantine.jsonl"
    text = failures.read_text(encoding="utf-8") if failures.exists() else ""
    for file in left_out_files(folder):
        row = {"path": file["path"], "kind": "unusable file", "cause": file["reason"], "sample_id": None}
        text += json.dumps(row) + "\n"
    if text:
        atomic_write_text(listed, text)


def left_out_files(folder: Path) -> list[dict[str, Any]]:
    """Return the videos that are excluded from the working folder's manifest, with `path` and `reason`.

    Args:
        folder: the working folder.
    """
    from avion_dali.datasets.building import UNUSABLE_FILE

    path = folder / "manifest" / UNUSABLE_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def _build_manifest(options: argparse.Namespace, folder: Path) -> None:
    from avion_dali.data.finding import describe_passed_over, find_videos
    from avion_dali.datasets.building import BuildSettings
    from avion_dali.datasets.plain import build_plain_manifest

    found, passed_over = find_videos(options.videos, but_not=folder)
    if passed_over:
        print(describe_passed_over(passed_over), file=sys.stderr)
    videos = [path.resolve() for path in found]
    root = Path(os.path.commonpath([path.parent for path in videos]))
    settings = BuildSettings(chunk_root=root, output=folder, skip_bad_rows=True)
    try:
        report = build_plain_manifest(settings, videos, clip_seconds=options.clip_seconds)
    except UserError as error:
        reasons = [f"{file['path']}: {file['reason']}" for file in left_out_files(folder.parent)]
        if not reasons:
            raise
        raise UserError("\n".join(["none of the videos can be read:", *few_lines(reasons)])) from error
    for file in report.unusable:
        print(printable(f"left out: {file.path}: {file.reason}"), file=sys.stderr)


def embed_manifest(
    options: argparse.Namespace, manifest: Manifest, *, distributed: Distributed, folder: Path
) -> PerSample:
    """Load the weights, decode and embed all clips."""
    from avion_dali.assembly.evaluators import evaluation_config, trained_config
    from avion_dali.assembly.open_clips import open_pool
    from avion_dali.assembly.resolve import resolve
    from avion_dali.assembly.run_clips import open_run_clips
    from avion_dali.assembly.run_model import load_model
    from avion_dali.inference.embeddings import EmbeddingScorer
    from avion_dali.models.starting_weights import open_start
    from avion_dali.tasks.evaluation import evaluate
    from avion_dali.tasks.table import find_task

    start = open_start(options.checkpoint)
    settings = {name: getattr(options, name) for name in ("decoder", "workers", "micro_batch", "num_frames")}
    settings |= {"eval_clips": options.eval_clips, "eval_crops": options.eval_crops, "output_dir": str(folder)}
    config = evaluation_config(trained_config(start), EvaluateConfig(checkpoint=options.checkpoint, **settings))
    if name := find_task(config.objective.name).embeds_as:
        config = replace(config, objective=replace(config.objective, name=name))
    run = resolve(config, distributed, start)
    model = load_model(run, start)
    if distributed.is_main:
        print("\n".join(run.lines()), file=sys.stderr)
    scorer = EmbeddingScorer(
        model, before_projection=options.before_projection, normalization=config.data.normalization
    )
    with open_pool(config.data) as pool, open_run_clips(run, manifest, training=False, pool=pool) as loader:
        return evaluate(model, loader, scorer, precision=run.precision, distributed=distributed)


def write_features(path: Path, features: PerSample, *, manifest: Manifest) -> None:
    """Write embeddings and their clips, which are stored in the safetensors file or next to the npy file."""
    import numpy as np
    from safetensors.numpy import save

    rows = [_origin(manifest, int(sample)) for sample in features.sample_ids]
    if path.suffix == ".safetensors":
        arrays = {"features": features.means_SX, "sample_ids": features.sample_ids}
        atomic_write(path, lambda file: file.write(save(arrays, metadata={"clips": json.dumps(rows)})))
        return
    listed = path.with_suffix(".clips.jsonl")

    def write(file: BinaryIO) -> None:
        np.save(file, features.means_SX)
        file.flush()
        with whole_or_absent(listed) as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            path.unlink(missing_ok=True)  # so that an array never stands beside the list of another one

    atomic_write(path, write)


def _origin(manifest: Manifest, sample_id: int) -> dict[str, Any]:
    sample = manifest.sample(sample_id)
    video = manifest.chunk(sample.first_chunk).video
    return {"sample_id": sample_id, "video": video, "start_s": sample.start_s, "end_s": sample.end_s}
