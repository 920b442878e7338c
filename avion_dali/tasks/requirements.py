"""Requirements of tasks on a manifest, checked before a training starts."""

from __future__ import annotations

from typing import Literal

import pyarrow.compute as pc

from avion_dali.contracts import UserError
from avion_dali.data.classes import ClassTable
from avion_dali.data.manifest import SAMPLES_FILE, Manifest


def class_table(manifest: Manifest) -> ClassTable:
    """Return the classes of a manifest.

    Args:
        manifest: a manifest for recognition.

    Raises:
        UserError: when it has no labels.
    """
    if manifest.classes is None:
        raise UserError(
            f"{manifest.folder} has no class labels, which recognition needs; build it with a `label` column, "
            "or with `avion-dali manifest ek100 --task recognition` or `avion-dali manifest kinetics`"
        )
    return manifest.classes


def require_in_every_row(manifest: Manifest, what: Literal["label", "text"], *, objective: str) -> None:
    """Reject a manifest with rows that lack a label or a text.

    A missing label would stop the training at some step, and a missing text would silently degrade it.

    Args:
        manifest: the training manifest.
        what: the required column.
        objective: name of the objective that requires it, for the message.

    Raises:
        UserError: when rows lack it; the message gives their number.
    """
    batches = manifest.table(SAMPLES_FILE).batches()
    if what == "label":
        missing = sum(pc.sum(pc.less(batch["label"], 0)).as_py() or 0 for batch in batches)
    else:
        counts = (pc.list_value_length(batch["texts"]) for batch in batches)
        missing = sum(pc.sum(pc.equal(count, 0)).as_py() or 0 for count in counts)
    if missing:
        raise UserError(
            f"{manifest.folder}: {missing} of {manifest.num_samples} rows have no {what}, and "
            f"objective.name = {objective} needs one in each row; remove these rows from the annotations"
        )
