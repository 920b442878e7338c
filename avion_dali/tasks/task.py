"""What a task is: everything that one value of `objective.name` means, in one place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from avion_dali.config import TrainConfig
from avion_dali.data.manifest import Manifest
from avion_dali.engine.protocols import Objective
from avion_dali.tasks.evaluation import Scorer

Command = Literal["pretrain", "finetune"]


def no_requirement(config: TrainConfig, manifest: Manifest) -> None:
    """Accept any manifest.

    Args:
        config: the run's configuration.
        manifest: the training manifest.
    """


def no_classes(manifest: Manifest) -> tuple[str, ...]:
    """Say that a task has no classes, whatever its manifest.

    Args:
        manifest: the training manifest.
    """
    del manifest
    return ()


def no_constraint(model: nn.Module) -> None:
    """Leave the weights as the optimizer made them.

    Args:
        model: the bare model.
    """


@dataclass(frozen=True)
class Task:
    """Model, objective and evaluation that belong together.

    Args:
        command: the subcommand that trains it.
        best_metric: the number of an evaluation that the best checkpoint is chosen by; larger is better.
        build_model: (configuration, number of classes) to a fresh model on the CPU, with weights drawn from
            torch's default generator; raises `UserError` where options do not go together.
        build_objective: (configuration, model, training manifest) to the objective.
        build_scorer: (configuration, model, evaluation manifest) to what scores the model on it.
        check: (configuration, training manifest); raises `UserError` when the manifest lacks what the objective
            needs.
        class_names: training manifest to the names of the classes that the model distinguishes, in label order.
        after_step: called with the model after every change of its weights, for constraints.
        reads_texts: whether batches carry token ids.
        has_frozen_control: whether an evaluation with frozen frames means something.
    """

    command: Command
    best_metric: str
    build_model: Callable[[TrainConfig, int], nn.Module]
    build_objective: Callable[[TrainConfig, nn.Module, Manifest], Objective]
    build_scorer: Callable[[TrainConfig, nn.Module, Manifest], Scorer[Any]]
    check: Callable[[TrainConfig, Manifest], None] = no_requirement
    class_names: Callable[[Manifest], tuple[str, ...]] = no_classes
    after_step: Callable[[nn.Module], None] = no_constraint
    reads_texts: bool = False
    has_frozen_control: bool = True
