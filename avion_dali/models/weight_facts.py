"""Facts about a file of weights. The command line imports this module, so it does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from avion_dali.config import Activation, ModelSize, Normalization
from avion_dali.models.presets import PRESETS

Role = Literal["dual-encoder", "classifier", "masked-video", "video-tower"]
Family = Literal["avion_dali", "avion", "open_clip", "lavila", "egovlp", "videomae"]
"""The project whose names the parameters of a file have."""
Layout = Literal["avion-flash", "avion-plain", "open_clip", "lavila", "videomae"]
"""Naming schemes of other projects in which this project can write weights."""
LAYOUTS: Final[tuple[Layout, ...]] = ("avion-flash", "avion-plain", "open_clip", "lavila", "videomae")


@dataclass(frozen=True)
class WeightFacts:
    """Facts about weights.

    Args:
        family: the project that wrote the file.
        role: kind of model: both towers, a tower with a head, a masked-video model, or only a tower.
        encoder: name of the video tower in `ENCODERS`.
        activation: activation of the training; None if unknown.
        norm_eps: LayerNorm epsilon of the video tower; 0 if unknown.
        pre_norm: whether there is a norm in front of the first block.
        normalization: pixel statistics of the training; None if unknown.
        num_frames: frames per clip; 1 for image models, 0 if unknown.
        frame_size: side length of a frame in pixels; 0 if unknown.
        patch_size: side length of a patch in pixels.
        width: width of the video tower.
        layers: number of blocks of the video tower.
        embed_dim: width of the shared space; 0 without one.
        context_length: tokens per text; 0 without a text tower.
        num_classes: number of classes of the head; 0 without a head.
    """

    family: Family
    role: Role
    encoder: str
    activation: Activation | None
    norm_eps: float
    pre_norm: bool
    normalization: Normalization | None
    num_frames: int
    frame_size: int
    patch_size: int
    width: int
    layers: int
    embed_dim: int
    context_length: int
    num_classes: int

    @property
    def size(self) -> ModelSize | None:
        """The model size with these dimensions, selected by frame size if several match, or None."""
        fitting = [name for name in PRESETS if self.fits(name)]
        exact = [name for name in fitting if PRESETS[name].image_size == self.frame_size]
        return next(iter(exact + fitting), None)

    def fits(self, size: ModelSize) -> bool:
        """Return whether the video tower has the dimensions of a model size.

        Args:
            size: a key of `PRESETS`.
        """
        preset = PRESETS[size]
        own = (self.width, self.layers, self.patch_size)
        return own == (preset.video_width, preset.video_layers, preset.patch_size)
