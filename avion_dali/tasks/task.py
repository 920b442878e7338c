"""Defines a task: everything that belongs to one value of `objective.name`."""

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
    """Return no class names, for tasks without classes.

    Args:
        manifest: the training manifest.
    """
    del manifest
    return ()


def no_constraint(model: nn.Module) -> None:
    """Do not constrain the weights after an optimizer step.

    Args:
        model: the bare model.
    """


@dataclass(frozen=True)
class Task:
    """The model, objective and evaluation of a training.

    Args:
        command: the subcommand that trains it.
        best_metric: name of the evaluation metric that selects the best checkpoint; larger is better.
        build_model: maps (configuration, number of classes) to a new model on the CPU, with weights drawn from
            torch's default generator; raises `UserError` when options contradict each other.
        build_objective: maps (configuration, model, training manifest) to the objective.
        build_scorer: maps (configuration, model, evaluation manifest) to the scorer of an evaluation.
        check: takes (configuration, training manifest); raises `UserError` when the manifest lacks what the
            objective needs.
        class_names: maps the training manifest to the names of the model's classes, in label order.
        after_step: called with the model after every change of its weights, to apply constraints.
        reads_texts: whether batches contain token ids.
        hides_tubes: whether the encoder sees only what `objective.masked_video` leaves of a clip.
        embeds_as: `objective.name` of the task whose model embeds clips with the weights of this one; empty for
            its own model.
        has_frozen_control: whether an evaluation with frozen frames is meaningful.
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
    hides_tubes: bool = False
    has_frozen_control: bool = True
    embeds_as: str = ""
