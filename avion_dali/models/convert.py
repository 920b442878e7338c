"""Converts the parameter names of other projects to ours and back; files are recognized by their names.

Families: `avion` (dual encoders and classifiers), `open_clip` (including OpenAI's models), `lavila` and
    `egovlp`
(TimeSformer), `videomae` (the original's and AVION's), `avion_dali` (this project's files).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from avion_dali.contracts import UserError
from avion_dali.models.convert_clip import (
    TEXT_ROOTS,
    open_clip_to_ours,
    remap_avion_keys,
    strip_wrappers,
    to_avion_flash,
    to_open_clip,
)
from avion_dali.models.convert_lavila import egovlp_to_ours, lavila_to_ours, to_lavila
from avion_dali.models.convert_videomae import to_avion_videomae, to_videomae, videomae_to_ours
from avion_dali.models.weight_facts import Family, Layout
from avion_dali.wording import few


def identify(state_dict: Mapping[str, Tensor]) -> Family:
    """Identify the project that named the parameters of a state dict.

    Args:
        state_dict: parameter name to tensor.

    Returns:
        The family; never `avion_dali`, whose files are marked by their header.

    Raises:
        UserError: when the names belong to no known family; the message shows some of them.
    """
    names = {strip_wrappers(key) for key in state_dict}
    if any(name.startswith(("video_model.", "image_projection.")) for name in names):
        return "egovlp"
    if any(".timeattn." in name for name in names):
        return "lavila"
    if names & {"mask_token", "encoder.patch_embed.proj.weight", "patch_embed.proj.weight"}:
        return "videomae"
    if any(name.startswith("backbone.blocks.") for name in names):
        return "videomae"
    if "visual.conv1.weight" in names:
        foreign = "visual.proj" in names or any(name.startswith(("text.", *TEXT_ROOTS)) for name in names)
        return "open_clip" if foreign else "avion"
    raise UserError(
        f"weights: the parameter names ({few(sorted(names), 4)}) are not those of AVION, LaViLa, EgoVLP, "
        "VideoMAE, or an open_clip model with a plain ViT; other models cannot be loaded"
    )


def to_ours(state_dict: Mapping[str, Tensor], family: Family) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Rename and reshape weights to this project's names.

    Args:
        state_dict: parameter name to tensor, with the names of the family.
        family: output of `identify`.

    Returns:
        Our name to tensor, and the entries that are not used, name to reason. Tensors share memory if possible.
        Video towers are `visual.*`, text towers `textual.*`, heads `fc_cls.*`; masked-video models keep
        `encoder.*` and `decoder.*`.

    Raises:
        UserError: when the weights are damaged or an unsupported variant; lists the supported ones.
    """
    if family == "avion_dali":
        return {strip_wrappers(name): tensor for name, tensor in state_dict.items()}, {}
    if family == "avion":
        return remap_avion_keys(state_dict), {}
    if family == "open_clip":
        return open_clip_to_ours(state_dict)
    if family == "lavila":
        return lavila_to_ours(state_dict)
    if family == "egovlp":
        return egovlp_to_ours(state_dict)
    pretraining = any(strip_wrappers(name).startswith(("mask_token", "decoder.")) for name in state_dict)
    if not pretraining:  # an encoder that was saved separately keeps its prefix
        state_dict = {strip_wrappers(name).removeprefix("encoder."): t for name, t in state_dict.items()}
    return videomae_to_ours(state_dict, pretraining=pretraining), {}


def from_ours(state: Mapping[str, Tensor], layout: Layout, *, encoder: str) -> dict[str, Tensor]:
    """Rename and reshape this project's weights to another project's names.

    Args:
        state: our name to tensor.
        layout: the names to use: `avion-flash` and `avion-plain` (AVION with and without flash attention and
            fast patch embedding, including its VideoMAE), `open_clip`, `lavila`, or `videomae` (the
            original's).
        encoder: name of the video tower in `ENCODERS`.

    Returns:
        Their name to tensor. `to_ours` restores the same weights, except for key biases, which VideoMAE lacks.

    Raises:
        UserError: when that project has no such model.
    """
    if encoder == "videomae" and layout in ("avion-plain", "videomae"):
        return to_videomae(state)
    if encoder == "videomae" and layout == "avion-flash":
        return to_avion_videomae(state)
    if encoder == "timesformer" and layout == "lavila":
        return to_lavila(state)
    if encoder == "vit" and layout in ("avion-flash", "avion-plain"):
        return to_avion_flash(state) if layout == "avion-flash" else dict(state)
    if encoder == "vit" and layout == "open_clip" and "logit_scale" in state:
        return to_open_clip(state)
    kind = "dual encoder" if "logit_scale" in state else "classifier" if "fc_cls.weight" in state else "model"
    raise UserError(
        f"a {kind} with the {encoder} encoder cannot be written as {layout}, which has no such model"
    )


def encoder_of_names(state: Mapping[str, Tensor]) -> str:
    """Find the video encoder to which weights of another project belong.

    Args:
        state: our name to tensor, renamed by `to_ours`.

    Raises:
        UserError: when the weights have no video encoder.
    """
    if "visual.class_embedding" in state:
        return "vit"
    if "visual.cls_token" in state:
        return "timesformer"
    if "visual.patch_embed.proj.weight" in state or "encoder.patch_embed.proj.weight" in state:
        return "videomae"
    raise UserError(f"weights: there is no video encoder in ({few(state, 4)})")
