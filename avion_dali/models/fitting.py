"""How weights fit a model: which entries go where, which change shape, which may lack or be left over.

Axes: T frames, N places, D width, L text tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from avion_dali.config import TemporalResize
from avion_dali.contracts import UserError
from avion_dali.models.convert import encoder_of_names
from avion_dali.models.convert_lavila import vit_to_timesformer
from avion_dali.models.convert_videomae import encoder_of
from avion_dali.models.positions import resize_spatial_positions, resize_temporal_embedding
from avion_dali.models.weight_facts import WeightFacts

PROJECTIONS: Final = ("visual.image_projection", "textual.text_projection")
FRAME_POSITIONS: Final = ("visual.temporal_embedding", "visual.temporal_embed")
PLACE_POSITIONS: Final = ("visual.positional_embedding", "visual.pos_embed")
_BETWEEN_TOWERS: Final = ("textual.", "logit_scale", "visual.image_projection")


@dataclass
class Fit:
    """What of the weights goes into a model, in the model's shapes.

    Args:
        tensors: parameter name to value, for those that are loaded.
        resized: how some of them were changed, in words.
        fresh: parameters that stay as the model was created, name to reason.
        unused: entries of the weights that the model has no use for, name to reason.
        problems: what does not fit, in words; empty when the weights may be loaded.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    resized: list[str] = field(default_factory=list)
    fresh: dict[str, str] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def fit_weights(
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    facts: WeightFacts,
    *,
    temporal_resize: TemporalResize,
) -> Fit:
    """Find for each parameter of a model its value in the weights.

    Args:
        own: the model's state dict.
        state: the weights, our name to tensor.
        facts: what the weights are.
        temporal_resize: what to do with frame positions when the model has fewer frames.

    Returns:
        The fit; it may be used when it has no problems.

    Raises:
        UserError: when the weights are of another kind of model.
    """
    fit = Fit()
    source = _in_role(own, state, facts, fit)
    for name, target in own.items():
        if name in source:
            _fit_entry(name, source[name], target, fit, facts=facts, shrink=temporal_resize)
            continue
        reason = _why_fresh(name, source, facts)
        if reason:
            fit.fresh[name] = reason
        else:
            fit.problems.append(f"{name} is missing")
    for name in source:
        if name not in own:
            reason = _why_unused(name, own)
            if reason:
                fit.unused[name] = reason
            else:
                fit.problems.append(f"{name} is unexpected")
    _keep_space_whole(fit, facts)
    return fit


def _in_role(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], facts: WeightFacts, fit: Fit
) -> dict[str, Tensor]:
    """The weights as those of a model of the own one's kind."""
    if "mask_token" in own:
        if "mask_token" not in state:
            raise UserError(f"a masked-video training cannot start from the weights of a {facts.role}")
        return dict(state)
    source = dict(state)
    if "mask_token" in state:
        source, left_over = encoder_of(state)
        fit.unused |= left_over
    wanted, found = encoder_of_names(own), encoder_of_names(source)
    if wanted == "timesformer" and found == "vit" and facts.family == "open_clip":
        return vit_to_timesformer(source)
    if wanted != found:
        raise UserError(
            f"the weights are of a {found} encoder, the model has {wanted}; set model.encoder: {found}"
        )
    return source


def _fit_entry(
    name: str, value: Tensor, target: Tensor, fit: Fit, *, facts: WeightFacts, shrink: TemporalResize
) -> None:
    """Put one entry into the fit, resized where that makes sense."""
    if value.shape == target.shape:
        fit.tensors[name] = value
        return
    resize = _RESIZES.get(name)
    resized = resize(value, target.shape, shrink) if resize else None
    if resized is not None and resized.shape == target.shape:
        fit.tensors[name] = resized
        fit.resized.append(f"{name} {tuple(value.shape)} -> {tuple(target.shape)}")
    elif name in PROJECTIONS and facts.family == "open_clip" and value.shape[0] == target.shape[0]:
        fit.fresh[name] = f"the weights' shared space has another width, {value.shape[1]}"
    elif name.startswith("fc_cls."):
        fit.fresh[name] = f"the weights' head has another number of classes, {value.shape[0]}"
    else:
        fit.problems.append(f"{name} is {tuple(value.shape)} instead of {tuple(target.shape)}")


def _frames(value: Tensor, shape: torch.Size, shrink: TemporalResize) -> Tensor:
    """Frame positions (T, D) or (1, T, D) for another T."""
    resized = resize_temporal_embedding(value.reshape(value.shape[-2:]), shape[-2], shrink=shrink)
    return resized if value.ndim == 2 else resized.unsqueeze(0)


def _places(value: Tensor, shape: torch.Size, _shrink: TemporalResize) -> Tensor | None:
    """Place positions (1 + N, D) or (1, 1 + N, D), the class token's first, for another square."""
    grid = math.isqrt(shape[-2] - 1)
    if grid * grid + 1 != shape[-2]:
        return None
    resized = resize_spatial_positions(value.reshape(value.shape[-2:]), grid=grid, extra=1)
    return resized if value.ndim == 2 else resized.unsqueeze(0)


def _text_positions(value: Tensor, shape: torch.Size, _shrink: TemporalResize) -> Tensor:
    """Text positions (L, D), cut or continued with zeros."""
    return _padded(value[: shape[0]], shape[0])


def _vocabulary(value: Tensor, shape: torch.Size, _shrink: TemporalResize) -> Tensor | None:
    """Token vectors (V, D), continued with zeros; never cut."""
    return _padded(value, shape[0]) if value.shape[0] <= shape[0] else None


def _padded(value: Tensor, rows: int) -> Tensor:
    return functional.pad(value, (0, 0, 0, rows - value.shape[0]))


_Resize = Callable[[Tensor, torch.Size, TemporalResize], Tensor | None]
_RESIZES: Final[dict[str, _Resize]] = {
    **dict.fromkeys(FRAME_POSITIONS, _frames),
    **dict.fromkeys(PLACE_POSITIONS, _places),
    "textual.positional_embedding": _text_positions,
    "textual.token_embedding.weight": _vocabulary,
}


def _why_fresh(name: str, source: Mapping[str, Tensor], facts: WeightFacts) -> str | None:
    """Why a parameter may lack in the weights; None when it may not."""
    has_text = any(key.startswith("textual.") for key in source)
    rules: tuple[tuple[bool, str], ...] = (
        (name.startswith("fc_cls."), "a new head"),
        (name in FRAME_POSITIONS and facts.num_frames == 1, "an image model's weights have no frame positions"),
        (
            name.startswith("visual.fc_norm.") and facts.role == "masked-video",
            "norms the mean of the tokens, which pre-training does not form",
        ),
        (
            (".timeattn." in name or ".norm3." in name) and facts.encoder == "vit",
            "an image model's weights have no attention over time",
        ),
        (name.startswith(_BETWEEN_TOWERS) and not has_text, "the weights have no text tower that fits"),
    )
    return next((reason for applies, reason in rules if applies), None)


def _why_unused(name: str, own: Mapping[str, Tensor]) -> str | None:
    """Why the model may have no use for an entry; None when it should have."""
    if "fc_cls.weight" in own and name.startswith(_BETWEEN_TOWERS):
        return "for retrieval only"
    if "logit_scale" in own and name.startswith("fc_cls."):
        return "the head of another task"
    if name in FRAME_POSITIONS:
        return "a model of one frame has no frame positions"
    return None


def _keep_space_whole(fit: Fit, facts: WeightFacts) -> None:
    """Without both projections the temperature of open_clip's weights means nothing (as in LaViLa)."""
    replaced = [name for name in PROJECTIONS if name in fit.fresh]
    if facts.family != "open_clip" or not replaced:
        return
    for name in (*PROJECTIONS, "logit_scale"):
        if name in fit.tensors:
            del fit.tensors[name]
            fit.fresh[name] = "belongs to the weights' shared space, which is not taken over"
