"""The table of tasks, keyed by `objective.name`."""

from __future__ import annotations

from avion_dali.contracts import UserError
from avion_dali.tasks.masked_pretraining import MASKED_VIDEO
from avion_dali.tasks.recognition import CLASSIFICATION
from avion_dali.tasks.task import Task
from avion_dali.tasks.video_text import CONTRASTIVE, MAX_MARGIN

TASKS: dict[str, Task] = {
    "contrastive": CONTRASTIVE,
    "max-margin": MAX_MARGIN,
    "classification": CLASSIFICATION,
    "masked-video": MASKED_VIDEO,
}


def find_task(name: str) -> Task:
    """Return the task of an objective.

    Args:
        name: the configuration's `objective.name`.

    Raises:
        UserError: when there is no such objective; lists all objectives.
    """
    if name not in TASKS:
        raise UserError(f"objective.name = {name!r} is not an objective; choose one of {', '.join(TASKS)}")
    return TASKS[name]
