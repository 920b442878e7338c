"""Video-text pre-training at small size: procedural videos, chunks, manifest, training, retrieval, report.

avion-dali demo --output-dir runs/demo
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from avion_dali.cli.arguments import parse_options
from avion_dali.config import TrainConfig
from avion_dali.config.recipe_files import recipes_folder
from avion_dali.data.profiles import ProfileName
from avion_dali.files import atomic_write_text

if TYPE_CHECKING:
    from avion_dali.data.manifest import Manifest
    from avion_dali.report.html_report import ReportQuery
    from avion_dali.tasks.retrieval_scoring import RetrievalResult

GALLERY_TEXTS = 6
GALLERY_CLIPS = 5


@dataclass(frozen=True)
class DemoOptions:
    """Configuration of the demo.

    Args:
        output_dir: folder for the data, the run and the report.
        decoder: how clips are decoded; with `dali`, chunks are VP9, which DALI also decodes without a GPU.
    """

    output_dir: str = "runs/demo"
    decoder: str = "cpu-fused"


@dataclass(frozen=True)
class DemoNumbers:
    """Results of the demo, as fractions.

    Args:
        map_avg: held-out mAP with relevancies, mean of both directions.
        chance: the same mAP for random similarities, mean of 20.
        frozen: the same mAP with each clip's first frame repeated.
    """

    map_avg: float
    chance: float
    frozen: float

    @property
    def times_chance(self) -> float:
        """The mAP as a multiple of chance."""
        return self.map_avg / self.chance

    @property
    def lost_when_frozen(self) -> float:
        """Fraction of the mAP above chance that is lost without motion."""
        return (self.map_avg - self.frozen) / (self.map_avg - self.chance)


def main(argv: list[str] | None = None) -> int:
    """Run the demo; status 1 if the model learned less than expected.

    Args:
        argv: arguments; None uses the arguments of the process.
    """
    options = parse_options(DemoOptions, argv, prog="avion-dali demo", description=__doc__ or "")
    output = Path(options.output_dir)
    with stage("videos, chunks and manifests"):
        manifests = make_data(output / "data", chunk_profile(options.decoder))
    config = demo_config(output, manifests, decoder=options.decoder)
    numbers = train_and_report(config)
    print(
        f"\nheld-out average mAP {numbers.map_avg:.3f}, chance {numbers.chance:.3f} "
        f"({numbers.times_chance:.1f}x), first frame repeated {numbers.frozen:.3f} "
        f"(loses {numbers.lost_when_frozen:.0%} of what is above chance)\n"
        f"report: {output / 'report.html'}"
    )
    learnt = numbers.times_chance >= 3 and numbers.lost_when_frozen >= 1 / 4
    if not learnt:
        print(
            "the model learned too little: expected at least 3x chance, and a quarter of the gain from motion"
        )
    return 0 if learnt else 1


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Print the start of a stage, and its duration at the end.

    Args:
        name: name of the stage.
    """
    print(f"--- {name}", flush=True)
    start = time.monotonic()
    yield
    print(f"--- {name}: {time.monotonic() - start:.0f} s", flush=True)


def chunk_profile(decoder: str) -> ProfileName:
    """Return the profile of the demo's chunks; for DALI, one that it also decodes without a GPU.

    Args:
        decoder: how clips are decoded.
    """
    return "vp9" if decoder == "dali" else "balanced"


def make_data(folder: Path, profile: ProfileName) -> tuple[Path, Path]:
    """Make the dataset with the same steps as for your own videos; finished parts are kept.

    Args:
        folder: folder for videos; chunks and manifests are written to a folder below it.
        profile: profile of the chunks.

    Returns:
        The training and the held-out manifest.
    """
    from avion_dali.contracts import UserError
    from avion_dali.data.chunking import ChunkSettings, chunk_videos
    from avion_dali.data.synthetic import make_videos
    from avion_dali.datasets.captions import build_captions_manifest

    chunks = folder / profile / "chunks"
    manifests = folder / profile / "manifest_train", folder / profile / "manifest_heldout"
    if all((m / "manifest.json").exists() for m in manifests):
        return manifests
    dataset = make_videos(folder / "videos")
    report = chunk_videos(list(dataset.videos), chunks, settings=ChunkSettings(profile, short_side=128))
    if report.failed:
        raise UserError(f"chunking failed: {report.failed[0].video}: {report.failed[0].failed}")
    build_captions_manifest(chunks, dataset.train_csv, output=manifests[0])
    build_captions_manifest(chunks, dataset.heldout_csv, output=manifests[1], classes_from=manifests[0])
    return manifests


def recipe_config(name: str) -> TrainConfig:
    """Return a recipe that this project ships.

    Args:
        name: name of the recipe.
    """
    arguments = ["--config", str(recipes_folder() / f"{name}.yaml")]
    return parse_options(TrainConfig, arguments, prog="demo", description="")


def demo_config(output: Path, manifests: tuple[Path, Path], *, decoder: str) -> TrainConfig:
    """Return the recipe `demo` with the folders of one run.

    Args:
        output: folder of the run.
        manifests: manifests of the training and the held-out videos.
        decoder: how clips are decoded.
    """
    config = recipe_config("demo")
    train, heldout = map(str, manifests)
    data = replace(config.data, train_manifest=train, eval_manifest=heldout)
    return replace(config, output_dir=str(output), decoder=decoder, data=data)


def train_and_report(config: TrainConfig) -> DemoNumbers:
    """Train, evaluate with moving and frozen frames, and write `report.html` and `numbers.json`.

    Args:
        config: the run's configuration.
    """
    from avion_dali.assembly.evaluators import evaluate_checkpoint
    from avion_dali.assembly.training import training
    from avion_dali.config import EvaluateConfig
    from avion_dali.data.manifest import Manifest
    from avion_dali.engine.checkpoint import LATEST_NAME, software_versions
    from avion_dali.engine.distributed import Distributed
    from avion_dali.engine.run_log import LOG_NAME, command_line, read_rows
    from avion_dali.engine.signals import exit_status
    from avion_dali.metrics.retrieval import chance_scores
    from avion_dali.report.html_report import ReportData, write_report
    from avion_dali.tasks.retrieval_scoring import RetrievalResult

    output, distributed = Path(config.output_dir), Distributed()
    with stage("training"), training(config, distributed) as loop:
        if stopped_by := loop.run().stopped_by:
            sys.exit(exit_status(stopped_by))
    with stage("held-out retrieval"):
        final = EvaluateConfig(checkpoint=str(output / LATEST_NAME), decoder=config.decoder)
        moving = evaluate_checkpoint(final, distributed)
        frozen = evaluate_checkpoint(replace(final, frozen_frames=True), distributed)
    assert isinstance(moving, RetrievalResult)
    numbers = DemoNumbers(
        map_avg=moving.metrics()["map_avg"],
        chance=chance_scores(moving.relevancy_VT).mean_average_precision.average,
        frozen=frozen.metrics()["map_avg"],
    )
    shown = {
        "held-out average mAP": numbers.map_avg,
        "chance": numbers.chance,
        "times chance": numbers.times_chance,
        "mAP, first frame repeated": numbers.frozen,
        "share of the gain lost without motion": numbers.lost_when_frozen,
    }
    write_report(
        output / "report.html",
        ReportData(
            title="Demo: text to video retrieval on procedural videos",
            rows=read_rows(output / LOG_NAME),
            metrics=shown,
            gallery=make_gallery(moving, Manifest(config.data.eval_manifest), config=config),
            command=command_line(),
            versions=software_versions(),
        ),
    )
    atomic_write_text(output / "numbers.json", json.dumps(shown, indent=2) + "\n")
    return numbers


def make_gallery(result: RetrievalResult, manifest: Manifest, *, config: TrainConfig) -> list[ReportQuery]:
    """Return the best clips of a few captions, with their frames.

    Args:
        result: result of the evaluation.
        manifest: the held-out manifest.
        config: the run's configuration.
    """
    import numpy as np

    from avion_dali.data.planner import ClipRules, Planner
    from avion_dali.decode.cpu_fused import decode_clip
    from avion_dali.report.html_report import ReportMatch, ReportQuery

    rules = ClipRules(config.data.num_frames, config.data.frame_size, training=False)
    planner = Planner(manifest, rules, seed=config.run.seed)
    queries = []
    for column in np.linspace(0, len(result.texts) - 1, GALLERY_TEXTS).astype(int):
        matches = []
        for row in np.argsort(-result.similarity_VT[:, column])[:GALLERY_CLIPS]:
            sample_id = int(result.sample_ids[row])
            frames = np.empty(rules.clip_shape, np.uint8)
            decode_clip(planner.plan(sample_id, 0), frames)
            matches.append(
                ReportMatch(
                    frames_THWC=frames[0],
                    score=float(result.similarity_VT[row, column]),
                    label=manifest.sample(sample_id).text,
                    is_right=bool(result.relevancy_VT[row, column] == 1),
                )
            )
        queries.append(ReportQuery(text=result.texts[column], matches=tuple(matches)))
    return queries
