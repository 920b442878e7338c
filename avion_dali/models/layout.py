"""Declarations of a tower about its parameters, so that other modules need not know their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class TowerLayout:
    """The roles of a tower's parameters, given by their names within the tower.

    A module has its layout in the attribute `layout`. Weight decay, layer-wise learning rates and the loading
    of weights use it; parameters that are not declared have no special role.
    Axes: T frames, N patch positions of a frame, L text tokens, V vocabulary, D width, P side length of a
        patch.

    Args:
        blocks: the module list of the repeated blocks; empty for a module without blocks.
        stem: modules in front of the blocks, such as the patch embedding and the norm after it. Together with
            the tokens and position tables they are the first layer for layer-wise learning rates.
        tokens: learned single tokens, such as a class token.
        frame_positions: position tables with one row per frame, (T, D) or (1, T, D). They are interpolated for
            clips of another length.
        place_positions: position tables with one row per patch of a square frame, (N, D) or (1, N, D). They are
            interpolated for frames of another size.
        class_token: whether the first row of `place_positions` belongs to a class token.
        text_positions: position tables with one row per text token, (L, D). They are cut, or padded with zeros.
        vocabulary: tables with one row per token id, (V, D). They may be padded with zeros but never cut.
        patches: the weight of the patch embedding, (D, 3, ..., P, P), from which sizes are read.
        optional_pre_norm: the norm in front of the first block, if the tower can be built without it.
        time_parts: modules within a block that only videos need; weights of image models lack them.
        not_pretrained: modules that weights of masked-video pre-training lack.
        from_vit: function that renames the weights of an image model with a `vit` encoder, in our names, to
            initialize the tower; None if this is not supported.
    """

    blocks: str = ""
    stem: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    frame_positions: tuple[str, ...] = ()
    place_positions: tuple[str, ...] = ()
    class_token: bool = False
    text_positions: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] = ()
    patches: str = ""
    optional_pre_norm: str = ""
    time_parts: tuple[str, ...] = ()
    not_pretrained: tuple[str, ...] = ()
    from_vit: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None

    @property
    def undecayed(self) -> tuple[str, ...]:
        """Position tables and learned tokens, which are exempt from weight decay.

        They are added to activations and, unlike the weights of a matrix product, have no scale that weight
        decay could regularize.
        """
        return self.tokens + self.frame_positions + self.place_positions + self.text_positions

    def in_stem(self, name: str) -> bool:
        """Return whether a parameter precedes the blocks.

        Args:
            name: name of the parameter within the tower.
        """
        return name in self.undecayed or any(name.startswith(f"{module}.") for module in self.stem)


def declared_layouts(model: nn.Module) -> dict[str, TowerLayout]:
    """Collect the layouts that the modules of a model declare.

    Args:
        model: any module; it may be a tower itself.

    Returns:
        Prefix of a module's parameter names, such as `visual.` (empty for the model itself), to its layout.
    """
    found = {}
    for name, module in model.named_modules():
        layout = getattr(module, "layout", None)
        if isinstance(layout, TowerLayout):
            found[f"{name}." if name else ""] = layout
    return found
