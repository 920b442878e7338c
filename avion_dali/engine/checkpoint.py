"""Writes and reads checkpoints.

A checkpoint contains everything that a run needs to continue as if it had never stopped. Random state is not
needed, because every draw is a pure function of (seed, step, rank). Files load with
`torch.load(weights_only=True)`, that is, without running code. `export_safetensors` writes only the weights,
with a header that describes them. Files contain whole tensors, even those of sharded runs.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn

from avion_dali import __version__
from avion_dali.config.plain import require_types
from avion_dali.contracts import UserError
from avion_dali.engine.sharding import gathered, placed_like
from avion_dali.files import atomic_write, partial_path
from avion_dali.models.safetensors_files import HEADER_KEY
from avion_dali.models.torch_files import UNREADABLE, check_archive
from avion_dali.time_limit import bounded_time
from avion_dali.wording import few, first_line

LATEST_NAME = "checkpoint.pt"
BEST_NAME = "checkpoint_best.pt"
NUMBERED_PATTERN = "checkpoint_[0-9]*.pt"
FORMAT = "avion_dali checkpoint"
FORMAT_VERSION = 2
_PACKAGES = ("torch", "torchvision", "numpy", "av", "nvidia-dali-cuda130", "open_clip_torch")


def software_versions() -> dict[str, str]:
    """Return the versions of this library, Python, the packages that affect results, CUDA and the device."""
    versions = {"avion_dali": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        versions["cuda"] = str(torch.version.cuda)
        versions["gpu"] = torch.cuda.get_device_name()
    return versions


@dataclass
class Checkpoint:
    """The state of a training between two optimizer steps.

    Args:
        model: state dict of the bare model.
        optimizer: state dict of the optimizer.
        scaler: state dict of the gradient scaler; empty when unused.
        step: optimizer steps done, over all epochs; the next one is number `step`, counted from 0.
        order: facts that determine the samples of each step (seed, steps per epoch, global batch); they must be
            the same when the run is resumed.
        best_metric: best evaluation so far, or None.
        pending_evaluation: whether the evaluation due at this step has not been done yet.
        config: the run's configuration as plain values.
        world_size: number of processes of the run; for information.
        versions: versions of the software that wrote the file; for information.
        average: running average of the weights, which evaluations use; empty if the run has none.
        spikes: state of `SpikeWatch`; empty if the run has none.
        classes: names of the head's classes in label order; empty if the model has none.
    """

    model: dict[str, Any]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    step: int
    order: dict[str, Any]
    best_metric: float | None = None
    pending_evaluation: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    world_size: int = 1
    versions: dict[str, str] = field(default_factory=software_versions)
    average: dict[str, Any] = field(default_factory=dict)
    spikes: dict[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically; called on rank 0 only.

    Args:
        path: the file to write or replace.
        checkpoint: the state.

    Raises:
        UserError: the file could not be written; an existing checkpoint is unchanged.
    """
    content = {"format": FORMAT, "format_version": FORMAT_VERSION}
    content |= {item.name: getattr(checkpoint, item.name) for item in fields(checkpoint)}
    atomic_write(path, lambda file: torch.save(content, file))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU.

    Args:
        path: a file written by `save_checkpoint`.

    Returns:
        The state.

    Raises:
        UserError: the file is missing, damaged, not a checkpoint of this library or from a newer version.
    """
    content = _read_torch_file(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not an avion_dali checkpoint; give a checkpoint that a training wrote")
    version = content.get("format_version")
    if not isinstance(version, int):
        raise UserError(f"{path} does not say its format version; it is damaged, use another checkpoint")
    if version > FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version}, but avion_dali {__version__} reads versions up to "
            f"{FORMAT_VERSION}; install a newer release"
        )
    try:
        # Files of older versions lack newer fields, whose defaults are correct for them.
        optional = {f.name for f in fields(Checkpoint) if (f.default, f.default_factory) != (MISSING, MISSING)}
        names = [f.name for f in fields(Checkpoint) if f.name in content or f.name not in optional]
        require_types(Checkpoint, content, name="its content")
        return Checkpoint(**{name: content[name] for name in names})
    except KeyError as error:
        raise UserError(f"{path} lacks the entry {error} and is damaged; use another checkpoint") from error
    except UserError as error:
        raise UserError(f"{path}: {error}; it is damaged, use another checkpoint") from error


def _read_torch_file(path: Path) -> Any:
    if not path.is_file():
        raise UserError(
            f"there is no checkpoint file at {path}; give a file such as {BEST_NAME} in the folder of a run"
        )
    try:
        with bounded_time(path):
            check_archive(path)  # torch.load does not detect flipped bits
            return torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise UserError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}: {first_line(error)}); it is "
            f"truncated, damaged or not a checkpoint. Copy {BEST_NAME} to {LATEST_NAME} to continue from it"
        ) from error


def find_checkpoint(output_dir: Path, resume: Literal["auto", "never"]) -> Path | None:
    """Find the checkpoint from which a run in this folder continues, and remove partial files of a killed save.

    Args:
        output_dir: folder of the run; it need not exist.
        resume: `auto` continues from an existing checkpoint, `never` rejects a folder that contains one.

    Returns:
        The file, or None for a new run.

    Raises:
        UserError: with `never`, the folder contains a checkpoint; or it lacks only the latest one.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"output_dir = {output_dir} is a file; give a folder")
    for name in (LATEST_NAME, BEST_NAME):
        partial_path(output_dir / name).unlink(missing_ok=True)
    latest = output_dir / LATEST_NAME
    others = [path for path in (*numbered_checkpoints(output_dir), output_dir / BEST_NAME) if path.exists()]
    if not latest.exists() and others:
        raise UserError(
            f"{output_dir} contains {others[0].name} but no {LATEST_NAME}: copy it to {LATEST_NAME} to "
            "continue from it, or use another output_dir; a new run would overwrite it"
        )
    if not latest.exists():
        return None
    if resume == "never":
        raise UserError(f"{latest} exists and resume = never; use --resume auto or another output_dir")
    return latest


def numbered_name(step: int) -> str:
    """Return the file name of the numbered checkpoint of a step."""
    return f"checkpoint_{step:08d}.pt"


def numbered_checkpoints(output_dir: Path) -> list[Path]:
    """List the numbered checkpoints in a run's folder, newest step first."""
    return sorted(output_dir.glob(NUMBERED_PATTERN), reverse=True)


def restore_model(model: nn.Module, state: Mapping[str, torch.Tensor], *, source: str) -> None:
    """Load weights into a model; on an error the model is unchanged.

    Args:
        model: the bare model, sharded or not.
        state: state dict with whole tensors.
        source: file of the weights, for messages.

    Raises:
        UserError: keys are missing or unexpected, or shapes differ; the message gives examples.
    """
    own = model.state_dict()
    problems = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "shape": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
            for key in own
            if key in state and own[key].shape != state[key].shape
        ],
    }
    found = [f"{kind}: {few(keys, 3)}" for kind, keys in problems.items() if keys]
    if found:
        raise UserError(
            f"{source} contains another model ({'; '.join(found)}). Use the model settings that it was trained "
            "with, which are stored in the file, or use another output_dir"
        )
    model.load_state_dict({key: placed_like(state[key], own[key]) for key in own})


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], *, source: str) -> None:
    """Load the moments of an optimizer; its options (weight decay, betas) keep their values.

    Args:
        optimizer: an optimizer of the same parameters in the same groups.
        state: state dict with whole tensors.
        source: file of the state, for messages.

    Raises:
        UserError: the groups differ.
    """
    own = optimizer.state_dict()["param_groups"]
    try:
        # The options of this run are used while loading, because they determine the device of the step counts.
        groups = [{**saved, **options} for saved, options in zip(state["param_groups"], own, strict=True)]
        if [len(g["params"]) for g in state["param_groups"]] != [len(g["params"]) for g in own]:
            raise ValueError("their sizes differ")
        optimizer.load_state_dict({"state": _placed_moments(optimizer, state["state"]), "param_groups": groups})
    except ValueError as error:
        raise UserError(
            f"{source} has other parameter groups ({error}); train the same parameters, or use another "
            "output_dir"
        ) from error


def _placed_moments(optimizer: torch.optim.Optimizer, state: Mapping[int, Any]) -> dict[int, Any]:
    """Shard the moments like their parameters; values of another shape (step counts) stay whole."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def placed(value: Any, own: torch.Tensor) -> Any:
        is_moment = isinstance(value, torch.Tensor) and value.shape == own.shape
        return placed_like(value, own) if is_moment else value

    return {
        index: {name: placed(value, parameters[index]) for name, value in moments.items()}
        for index, moments in state.items()
    }


def check_order(saved: Mapping[str, Any], current: Mapping[str, Any], *, source: str) -> None:
    """Check that the next step of a resumed run sees the same samples.

    Args:
        saved: `order` of the checkpoint.
        current: the same facts of this run.
        source: file of the checkpoint, for messages.

    Raises:
        UserError: the facts differ; names those that differ.
    """
    # Facts that a file lacks were added by later versions and cannot be compared.
    differing = [f"{k} was {saved[k]}, is {v}" for k, v in current.items() if saved.get(k, v) != v]
    if differing:
        raise UserError(
            f"{source} cannot be continued with other settings ({'; '.join(differing)}). Use the same ones, or "
            "start a new run from its weights"
        )


def export_safetensors(model: nn.Module, path: Path, *, header: Mapping[str, Any]) -> None:
    """Write the weights as safetensors on rank 0; every rank must call it if they are sharded.

    Args:
        model: the bare model.
        path: the file to write.
        header: plain values that describe the weights (configuration, metrics); versions are added. It is
            stored as JSON under `avion_dali` in the file's metadata.

    Raises:
        UserError: the file could not be written.
    """
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    whole = gathered(model.state_dict(), keep=is_main)
    if not is_main:
        return
    # Tensors are copied, because safetensors rejects tensors that share memory, as tied weights do.
    state = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in whole.items()}
    text = json.dumps({**header, "versions": software_versions()})
    content = safetensors.torch.save(state, metadata={"format": "pt", HEADER_KEY: text})
    atomic_write(path, lambda file: file.write(content))
