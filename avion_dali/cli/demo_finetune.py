"""Fine-tuning at small size: retrieval, recognition and VideoMAE on the demo's videos, each with a control.

avion-dali demo-finetune --output-dir runs/demo_finetune
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from avion_dali.cli.arguments import parse_options
from avion_dali.cli.demo import chunk_profile, demo_config, make_data, recipe_config, stage
from avion_dali.config import TrainConfig
from avion_dali.files import atomic_write_text

if TYPE_CHECKING:
    from avion_dali.tasks.evaluation import EvaluationResult

WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class FinetuneDemoOptions:
    """Configuration of the fine-tuning demo.

    Args:
        demo_dir: folder of `avion-dali demo`; missing data and weights are made.
        output_dir: folder for the fine-tuning runs.
        decoder: how clips are decoded; with `dali`, chunks are VP9, which DALI also decodes without a GPU.
    """

    demo_dir: str = "runs/demo"
    output_dir: str = "runs/demo_finetune"
    decoder: str = "cpu-fused"


@dataclass(frozen=True)
class FinetuneNumbers:
    """Results of the demo on the held-out videos, as fractions.

    Args:
        map_before: mAP with relevancies of the pre-trained dual encoder, mean of both directions.
        map_after: the same mAP after retrieval fine-tuning.
        top1: accuracy of recognizing the motion, fine-tuned from the dual encoder.
        top1_scratch: accuracy of the same training from random weights.
        top1_frozen: accuracy of the model of `top1` with each clip's first frame repeated.
        top1_chance: accuracy of always predicting the most frequent motion.
        videomae: accuracy, fine-tuned from VideoMAE pre-training on the same videos without labels.
        videomae_scratch: accuracy of the same training from random weights.
    """

    map_before: float
    map_after: float
    top1: float
    top1_scratch: float
    top1_frozen: float
    top1_chance: float
    videomae: float
    videomae_scratch: float


@dataclass(frozen=True)
class Margin:
    """A difference that fine-tuning must reach.

    Args:
        what: names of the two results, the better one first.
        value: the result that must be better.
        other: the result with which it is compared.
        least: the smallest sufficient difference.
    """

    what: str
    value: float
    other: float
    least: float

    @property
    def is_met(self) -> bool:
        """Whether the difference is large enough."""
        return self.value - self.other >= self.least


def margins(numbers: FinetuneNumbers) -> tuple[Margin, ...]:
    """Return the required differences: about half of the measured ones, since seeds and machines vary.

    Args:
        numbers: results of the demo.
    """
    n = numbers
    return (
        Margin("retrieval mAP: fine-tuned, before", n.map_after, n.map_before, 0.02),
        Margin("recognition: from the dual encoder, from random weights", n.top1, n.top1_scratch, 0.1),
        Margin("recognition: from the dual encoder, chance", n.top1, n.top1_chance, 0.15),
        Margin("recognition: moving, first frame repeated", n.top1, n.top1_frozen, 0.15),
        Margin("VideoMAE: pre-trained, from random weights", n.videomae, n.videomae_scratch, 0.06),
    )


@dataclass(frozen=True)
class Runs:
    """Trains recipes on the demo's videos.

    Args:
        folder: each run writes to a separate folder below it.
        manifests: manifests of the training and the held-out videos.
        decoder: how clips are decoded.
    """

    folder: Path
    manifests: tuple[Path, Path]
    decoder: str

    def train(self, name: str, recipe: str, *, weights: Path | None = None) -> Path:
        """Train, or resume an interrupted run.

        Args:
            name: name of the run and its folder.
            recipe: name of the recipe.
            weights: initial weights; None for random weights.

        Returns:
            File of the final weights.
        """
        config = recipe_config(recipe)
        train, heldout = map(str, self.manifests)
        config = replace(
            config,
            output_dir=str(self.folder / name),
            decoder=self.decoder,
            data=replace(config.data, train_manifest=train, eval_manifest=heldout),
            model=replace(config.model, weights=str(weights or "")),
        )
        return run_training(name, config)

    def score(self, weights: Path, *, frozen_frames: bool = False) -> EvaluationResult:
        """Evaluate on the held-out videos.

        Args:
            weights: file of a run's weights.
            frozen_frames: repeat each clip's first frame.
        """
        from avion_dali.assembly.evaluators import evaluate_checkpoint
        from avion_dali.config import EvaluateConfig
        from avion_dali.engine.distributed import Distributed

        options = EvaluateConfig(
            checkpoint=str(weights),
            manifest=str(self.manifests[1]),
            decoder=self.decoder,
            output_dir=str(self.folder),
            frozen_frames=frozen_frames,
        )
        return evaluate_checkpoint(options, Distributed())


def run_training(name: str, config: TrainConfig) -> Path:
    """Train a configuration.

    Args:
        name: name of the run.
        config: its configuration.

    Returns:
        File of the final weights.
    """
    from avion_dali.assembly.training import training
    from avion_dali.engine.distributed import Distributed
    from avion_dali.engine.signals import exit_status

    with stage(f"training {name}"), training(config, Distributed()) as loop:
        if stopped_by := loop.run().stopped_by:
            sys.exit(exit_status(stopped_by))
    return Path(config.output_dir) / WEIGHTS


def main(argv: list[str] | None = None) -> int:
    """Run the demo; status 1 if fine-tuning gained less than required.

    Args:
        argv: arguments; None uses the arguments of the process.
    """
    options = parse_options(
        FinetuneDemoOptions, argv, prog="avion-dali demo-finetune", description=__doc__ or ""
    )
    demo, output = Path(options.demo_dir), Path(options.output_dir)
    with stage("videos, chunks and manifests"):
        manifests = make_data(demo / "data", chunk_profile(options.decoder))
    runs = Runs(output, manifests, options.decoder)
    dual_encoder = demo / WEIGHTS
    if not dual_encoder.is_file():
        run_training("dual encoder", demo_config(demo, manifests, decoder=options.decoder))
    numbers = measure(runs, dual_encoder)
    atomic_write_text(output / "numbers.json", json.dumps(asdict(numbers), indent=2) + "\n")
    print(f"\n{table(margins(numbers))}\n\nreports: {output}/*/report.html")
    return 0 if all(margin.is_met for margin in margins(numbers)) else 1


def measure(runs: Runs, dual_encoder: Path) -> FinetuneNumbers:
    """Train the models to compare, and score them on the held-out videos.

    Args:
        runs: where and how to train.
        dual_encoder: pre-trained weights of the recipe `demo`.
    """
    retrieval = runs.train("retrieval", "demo_retrieval", weights=dual_encoder)
    recognition = runs.train("recognition", "demo_recognition", weights=dual_encoder)
    recognition_scratch = runs.train("recognition_from_random", "demo_recognition")
    pretrained = runs.train("videomae", "demo_videomae_pretrain")
    videomae = runs.train("videomae_recognition", "demo_videomae_finetune", weights=pretrained)
    videomae_scratch = runs.train("videomae_recognition_from_random", "demo_videomae_finetune")
    with stage("evaluation on held-out videos"):
        return FinetuneNumbers(
            map_before=runs.score(dual_encoder).metrics()["map_avg"],
            map_after=runs.score(retrieval).metrics()["map_avg"],
            top1=runs.score(recognition).metrics()["top1"],
            top1_scratch=runs.score(recognition_scratch).metrics()["top1"],
            top1_frozen=runs.score(recognition, frozen_frames=True).metrics()["top1"],
            top1_chance=most_frequent_share(runs.manifests[1]),
            videomae=runs.score(videomae).metrics()["top1"],
            videomae_scratch=runs.score(videomae_scratch).metrics()["top1"],
        )


def most_frequent_share(folder: Path) -> float:
    """Return the accuracy of always predicting the most frequent class.

    Args:
        folder: a manifest with labels.
    """
    from avion_dali.data.manifest import Manifest

    manifest = Manifest(folder)
    counts = Counter(manifest.label(sample_id) for sample_id in range(manifest.num_samples))
    return max(counts.values()) / manifest.num_samples


def table(rows: tuple[Margin, ...]) -> str:
    """Format margins as a table with one line per margin.

    Args:
        rows: the margins.
    """
    width = max(len(row.what) for row in rows)
    lines = [f"{'held-out videos':<{width}}  {'first':>6}  {'second':>6}  {'gain':>6}  {'needed':>6}"]
    for row in rows:
        numbers = (row.value, row.other, row.value - row.other, row.least)
        shown = "  ".join(f"{number:6.3f}" for number in numbers)
        lines.append(f"{row.what:<{width}}  {shown}  {'met' if row.is_met else 'MISSED'}")
    return "\n".join(lines)
