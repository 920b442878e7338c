"""Checks that labels of two manifests, or of a manifest and weights, refer to the same classes."""

from __future__ import annotations

import zlib
from pathlib import Path

from avion_dali.config import TrainConfig
from avion_dali.contracts import UserError
from avion_dali.data.manifest import Manifest
from avion_dali.models.starting_weights import StartWeights
from avion_dali.tasks.requirements import class_table

_SAME_CLASSES = "--classes-from the training manifest; for kinetics --class-names, the same file for both"


def classes_fingerprint(manifest: Manifest) -> int:
    """Return a checksum of a manifest's class names in label order; 0 if it has no classes.

    Args:
        manifest: a manifest.
    """
    return zlib.crc32("\n".join(manifest.classes.names).encode()) if manifest.classes else 0


def require_same_classes(train_manifest: Manifest, eval_manifest: Manifest) -> None:
    """Reject an evaluation manifest whose labels refer to other classes than those of the training manifest.

    Args:
        train_manifest: the training manifest.
        eval_manifest: the evaluation manifest.

    Raises:
        UserError: when their classes differ, or one of them has no classes.
    """
    class_table(train_manifest)
    class_table(eval_manifest)
    if classes_fingerprint(train_manifest) != classes_fingerprint(eval_manifest):
        raise UserError(
            f"{train_manifest.folder} and {eval_manifest.folder} number their classes differently; build the "
            f"held-out manifest with the classes of the training manifest ({_SAME_CLASSES})"
        )


def require_classes_of_weights(config: TrainConfig, manifest: Manifest, *, start: StartWeights) -> None:
    """Reject a manifest whose classes are not those of the weights' head, as far as the weights name them.

    Args:
        config: the training's configuration.
        manifest: the evaluation manifest.
        start: the weights.

    Raises:
        UserError: when the classes differ; names the first class that differs.
    """
    names = class_table(manifest).names
    if len(names) != start.facts.num_classes:
        raise UserError(
            f"the model has {start.facts.num_classes} classes and {manifest.folder} has {len(names)}; "
            f"build the manifest with the classes of the training manifest ({_SAME_CLASSES})"
        )
    differing = (item for item in enumerate(zip(start.classes, names, strict=False)) if len(set(item[1])) > 1)
    if found := next(differing, None):
        label, (trained, own) = found
        raise UserError(
            f"{manifest.folder} numbers its classes differently: class {label} of {start.source} is "
            f"{trained!r}, in the manifest it is {own!r}; build the manifest with the classes of the training "
            f"manifest ({_SAME_CLASSES})"
        )
    if config.data.train_manifest and (Path(config.data.train_manifest) / "manifest.json").is_file():
        require_same_classes(Manifest(config.data.train_manifest), manifest)
