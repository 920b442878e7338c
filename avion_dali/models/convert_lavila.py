"""Converts names of LaViLa's and EgoVLP's dual encoders (TimeSformer), and of CLIP's ViT to a TimeSformer's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from torch import Tensor

from avion_dali.contracts import UserError
from avion_dali.models.convert_clip import CONSTANTS, TEXT_ROOTS, strip_wrappers

_OTHER_TEXT: Final = "part of a DistilBERT text tower, which this project does not support"
_OTHER_SPACE: Final = "projects into the shared space of the unsupported DistilBERT text tower"
_OTHER_TEXT_ROOTS: Final = ("text_model.", "textual.")
_OTHER_SPACE_ROOTS: Final = ("vid_proj.", "txt_proj.", "image_projection.", "text_projection.", "logit_scale")
_VIT_RENAMES: Final[tuple[tuple[str, str], ...]] = (
    ("transformer.resblocks.", "blocks."),
    (".attn.in_proj_", ".attn.qkv."),
    (".attn.out_proj.", ".attn.proj."),
    (".ln_1.", ".norm1."),
    (".ln_2.", ".norm2."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
    ("visual.ln_post.", "visual.norm."),
    ("visual.conv1.", "visual.patch_embed.proj."),
)


def lavila_to_ours(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Rename the weights of a LaViLa dual encoder, classifier or bare video tower.

    Args:
        state_dict: parameter name to tensor; CLIP's text tower at the top level.

    Returns:
        Our name to tensor, sharing memory; and the entries that are not used, name to reason.

    Raises:
        UserError: when the text tower is not CLIP's.
    """
    names = {strip_wrappers(key): tensor for key, tensor in state_dict.items()}
    if any(name.startswith(("text_decoder.", "img_queries", "img_attn_pool.")) for name in names):
        raise UserError(
            "these are the weights of a LaViLa narrator, which generates texts; supported are LaViLa's "
            "dual encoders with CLIP's text tower (CLIP_OPENAI_TIMESFORMER_BASE, _LARGE, _LARGE_336PX) and its "
            "classifiers"
        )
    if any(".transformer.layer." in name for name in names):
        raise UserError(
            "these weights have a DistilBERT text tower (a LaViLa *_DISTILBERT_BASE model); supported are "
            "CLIP_OPENAI_TIMESFORMER_BASE, _LARGE and _LARGE_336PX, whose text tower is CLIP's, and EgoVLP's "
            "own files, of which only the video tower is used"
        )
    bare = not any(name.startswith("visual.") for name in names)
    state: dict[str, Tensor] = {}
    left_over: dict[str, str] = {}
    for name, tensor in names.items():
        if name in CONSTANTS:
            left_over[name] = "a constant, not a weight"
        elif name.startswith("fc_cls.") and name not in ("fc_cls.weight", "fc_cls.bias"):
            left_over[name] = "one of several heads"
        elif name == "image_projection":
            state["visual.image_projection"] = tensor
        elif name.startswith(TEXT_ROOTS):
            state["textual." + name] = tensor
        else:
            state["visual." + name if bare else name] = tensor
    return state, left_over


def to_lavila(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename our weights to LaViLa's names.

    Args:
        state: a dual encoder or classifier with a `timesformer` encoder, in our names.

    Returns:
        Their name to tensor, sharing memory.
    """
    renamed = {}
    for name, tensor in state.items():
        key = "image_projection" if name == "visual.image_projection" else name.removeprefix("textual.")
        renamed[key] = tensor
    return renamed


def egovlp_to_ours(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Take the video tower of EgoVLP's weights; the text tower and both projections are not used.

    Args:
        state_dict: parameter name to tensor, under `video_model.`, `text_model.`, `vid_proj.`, `txt_proj.`; or
            under `visual.`, `textual.`, `image_projection.`, `text_projection.`, as LaViLa names them.

    Returns:
        Our name to tensor, sharing memory; and the entries that are not used, name to reason.
    """
    state: dict[str, Tensor] = {}
    left_over: dict[str, str] = {}
    for key, tensor in state_dict.items():
        name = strip_wrappers(key)
        if name.startswith("video_model."):
            state["visual." + name.removeprefix("video_model.")] = tensor
        elif name.startswith(_OTHER_TEXT_ROOTS):
            left_over[name] = _OTHER_TEXT
        elif name.startswith(_OTHER_SPACE_ROOTS):
            left_over[name] = _OTHER_SPACE
        else:
            state[name] = tensor
    return state, left_over


def vit_to_timesformer(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the ViT of an image model to initialize a TimeSformer, as LaViLa does with OpenAI's weights.

    Attention over time has no counterpart; it keeps its initial weights, with which it has no effect.
    Source: Zhao et al. 2022 (LaViLa), arXiv 2212.04501.

    Args:
        state: a model with a `vit` encoder, in our names.

    Returns:
        The same weights with the video tower's entries renamed; other entries are unchanged.
    """
    renamed = {}
    for name, tensor in state.items():
        if name == "visual.class_embedding":
            renamed["visual.cls_token"] = tensor[None, None]
        elif name == "visual.positional_embedding":
            renamed["visual.pos_embed"] = tensor[None]
        elif name.startswith("visual."):
            for theirs, ours in _VIT_RENAMES:
                name = name.replace(theirs, ours)
            renamed[name] = tensor
        else:
            renamed[name] = tensor
    return renamed
