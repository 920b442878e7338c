"""Matches weights with a model: which entries are loaded, resized, missing or unused.

Axes: T frames, N patch positions, D width, L text tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from avion_dali.config import TemporalResize
from avion_dali.contracts import UserError
from avion_dali.models.convert_videomae import encoder_of
from avion_dali.models.layout import TowerLayout, declared_layouts
from avion_dali.models.masked_video import MaskedVideo
from avion_dali.models.positions import resize_spatial_positions, resize_temporal_embedding
from avion_dali.models.towers import ENCODERS, encoder_name
from avion_dali.models.weight_facts import WeightFacts

PROJECTIONS: Final = ("visual.image_projection", "textual.text_projection")
_BETWEEN_TOWERS: Final = ("textual.", "logit_scale", "visual.image_projection")


@dataclass
class Fit:
    """The match between weights and a model.

    Args:
        tensors: parameter name to value, in the model's shapes, for the parameters to load.
        resized: descriptions of the parameters whose shape was changed.
        fresh: parameters that keep their initial values, name to reason.
        unused: entries of the weights that the model does not use, name to reason.
        problems: descriptions of entries that do not match; empty if the weights may be loaded.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    resized: list[str] = field(default_factory=list)
    fresh: dict[str, str] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def fit_weights(
    model: nn.Module, state: Mapping[str, Tensor], *, facts: WeightFacts, temporal_resize: TemporalResize
) -> Fit:
    """Find the value of each parameter of a model in the weights.

    Args:
        model: a dual encoder, classifier or masked-video model; it is not changed.
        state: the weights, our name to tensor.
        facts: facts about the weights.
        temporal_resize: how frame positions are adapted if the model has fewer frames.

    Returns:
        The match; it may be used only if it has no problems.

    Raises:
        UserError: when the weights belong to another kind of model.
    """
    own, layouts, fit = model.state_dict(), declared_layouts(model), Fit()
    source = _in_role(model, state, facts=facts, fit=fit)
    resizes = _resizes(layouts, temporal_resize)
    for name, target in own.items():
        if name in source:
            _fit_entry(name, source[name], target=target, fit=fit, facts=facts, resize=resizes.get(name))
            continue
        reason = _why_fresh(name, source, facts=facts, layouts=layouts)
        if reason:
            fit.fresh[name] = reason
        else:
            fit.problems.append(f"{name} is missing")
    for name in source:
        if name not in own:
            reason = _why_unused(name, own, layouts=layouts)
            if reason:
                fit.unused[name] = reason
            else:
                fit.problems.append(f"{name} is unexpected")
    _keep_space_whole(fit, facts)
    return fit


def _in_role(
    model: nn.Module, state: Mapping[str, Tensor], *, facts: WeightFacts, fit: Fit
) -> Mapping[str, Tensor]:
    """Return the weights renamed for the kind of the model."""
    if isinstance(model, MaskedVideo):
        if facts.role != "masked-video":
            raise UserError(f"masked-video training cannot start from the weights of a {facts.role}")
        return state
    source = state
    if facts.role == "masked-video":
        source, left_over = encoder_of(state)
        fit.unused |= left_over
    assert isinstance(model.visual, nn.Module)
    wanted = encoder_name(model.visual)
    if wanted == facts.encoder:
        return source
    from_vit = ENCODERS[wanted].layout.from_vit
    if from_vit and facts.family == "open_clip":
        return from_vit(source)
    raise UserError(
        f"the weights are those of a {facts.encoder} encoder, the model has {wanted}; "
        f"set model.encoder: {facts.encoder}"
    )


_Resize = Callable[[Tensor, torch.Size], Tensor | None]


def _resizes(layouts: Mapping[str, TowerLayout], temporal_resize: TemporalResize) -> dict[str, _Resize]:
    """Return the tables that may have another shape in the weights, parameter name to resizing function."""
    found: dict[str, _Resize] = {}
    for prefix, layout in layouts.items():
        by_kind: tuple[tuple[tuple[str, ...], _Resize], ...] = (
            (layout.frame_positions, partial(_frames, shrink=temporal_resize)),
            (layout.place_positions, partial(_places, extra=int(layout.class_token))),
            (layout.text_positions, _text_positions),
            (layout.vocabulary, _vocabulary),
        )
        for tables, resize in by_kind:
            found |= {prefix + table: resize for table in tables}
    return found


def _fit_entry(
    name: str, value: Tensor, *, target: Tensor, fit: Fit, facts: WeightFacts, resize: _Resize | None
) -> None:
    """Add one entry to the match, resized if it is a table that supports it."""
    if value.shape == target.shape:
        fit.tensors[name] = value
        return
    resized = resize(value, target.shape) if resize else None
    if resized is not None and resized.shape == target.shape:
        fit.tensors[name] = resized
        fit.resized.append(f"{name} {tuple(value.shape)} -> {tuple(target.shape)}")
    elif name in PROJECTIONS and facts.family == "open_clip" and value.shape[0] == target.shape[0]:
        fit.fresh[name] = f"the weights' shared space has another width, {value.shape[1]}"
    elif name.startswith("fc_cls."):
        fit.fresh[name] = f"the weights' head has another number of classes, {value.shape[0]}"
    else:
        fit.problems.append(f"{name} is {tuple(value.shape)} instead of {tuple(target.shape)}")


def _frames(value: Tensor, shape: torch.Size, *, shrink: TemporalResize) -> Tensor:
    """Resize frame positions (T, D) or (1, T, D) to another T."""
    resized = resize_temporal_embedding(value.reshape(value.shape[-2:]), shape[-2], shrink=shrink)
    return resized if value.ndim == 2 else resized.unsqueeze(0)


def _places(value: Tensor, shape: torch.Size, *, extra: int) -> Tensor | None:
    """Resize place positions (extra + N, D) or (1, extra + N, D) to another square grid."""
    grid = math.isqrt(shape[-2] - extra)
    if grid * grid + extra != shape[-2]:
        return None
    resized = resize_spatial_positions(value.reshape(value.shape[-2:]), grid=grid, extra=extra)
    return resized if value.ndim == 2 else resized.unsqueeze(0)


def _text_positions(value: Tensor, shape: torch.Size) -> Tensor:
    """Cut text positions (L, D), or pad them with zeros."""
    return _padded(value[: shape[0]], shape[0])


def _vocabulary(value: Tensor, shape: torch.Size) -> Tensor | None:
    """Pad token vectors (V, D) with zeros; return None if they would have to be cut."""
    return _padded(value, shape[0]) if value.shape[0] <= shape[0] else None


def _padded(value: Tensor, rows: int) -> Tensor:
    return functional.pad(value, (0, 0, 0, rows - value.shape[0]))


def _why_fresh(
    name: str, source: Mapping[str, Tensor], *, facts: WeightFacts, layouts: Mapping[str, TowerLayout]
) -> str | None:
    """Return why a parameter may be missing in the weights, or None if it must not be missing."""
    layout = layouts.get("visual.", TowerLayout())
    tower_part = name.removeprefix("visual.").split(".")[0]
    has_text = any(key.startswith("textual.") for key in source)
    rules: tuple[tuple[bool, str], ...] = (
        (name.startswith("fc_cls."), "a new head"),
        (
            _is_frame_table(name, layouts) and facts.num_frames == 1,
            "an image model's weights have no frame positions",
        ),
        (
            tower_part in layout.not_pretrained and facts.role == "masked-video",
            "masked-video pre-training has no such part",
        ),
        (
            any(f".{part}." in name for part in layout.time_parts) and facts.family == "open_clip",
            "an image model's weights have no attention over time",
        ),
        (name.startswith(_BETWEEN_TOWERS) and not has_text, "the weights have no text tower that fits"),
    )
    return next((reason for applies, reason in rules if applies), None)


def _why_unused(name: str, own: Mapping[str, Tensor], *, layouts: Mapping[str, TowerLayout]) -> str | None:
    """Return why the model may ignore an entry, or None if it must not."""
    if "fc_cls.weight" in own and name.startswith(_BETWEEN_TOWERS):
        return "for retrieval only"
    if "logit_scale" in own and name.startswith("fc_cls."):
        return "the head of another task"
    if _is_frame_table(name, layouts):
        return "a model of one frame has no frame positions"
    return None


def _is_frame_table(name: str, layouts: Mapping[str, TowerLayout]) -> bool:
    return any(name == prefix + table for prefix, layout in layouts.items() for table in layout.frame_positions)


def _keep_space_whole(fit: Fit, facts: WeightFacts) -> None:
    """Keep both projections and the temperature of open_clip's weights, or none of them (as in LaViLa)."""
    replaced = [name for name in PROJECTIONS if name in fit.fresh]
    if facts.family != "open_clip" or not replaced:
        return
    for name in (*PROJECTIONS, "logit_scale"):
        if name in fit.tensors:
            del fit.tensors[name]
            fit.fresh[name] = "belongs to the weights' shared space, which is not used"
