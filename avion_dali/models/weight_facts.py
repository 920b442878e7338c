"""What is known about a file of weights. Light: the command line imports it before torch is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from avion_dali.config import Activation, ModelSize, Normalization
from avion_dali.models.presets import PRESETS

Role = Literal["dual-encoder", "classifier", "masked-video", "video-tower"]
Family = Literal["avion_dali", "avion", "open_clip", "lavila", "egovlp", "videomae"]
"""Whose names the parameters of a file have: those of this project or of another."""
Layout = Literal["avion-flash", "avion-plain", "open_clip", "lavila", "videomae"]
"""Names that this project can write weights in, besides its own."""
LAYOUTS: Final[tuple[Layout, ...]] = ("avion-flash", "avion-plain", "open_clip", "lavila", "videomae")


@dataclass(frozen=True)
class WeightFacts:
    """What is known about weights.

    Args:
        family: which project wrote the file.
        role: what is in it: both towers, a tower with a head, a masked-video model, or a tower alone.
        encoder: name of the video tower in `ENCODERS`.
        activation: what the weights were trained with; None when the file does not say.
        norm_eps: LayerNorm epsilon of the video tower; 0 when the file does not say.
        pre_norm: whether there is a norm in front of the first block.
        normalization: pixel statistics of the training; None when the file does not say.
        num_frames: frames per clip; 1 for image models, 0 when the weights do not say.
        frame_size: side of a frame in pixels; 0 when the weights do not say.
        patch_size: side of a patch in pixels.
        width: width of the video tower.
        layers: blocks of the video tower.
        embed_dim: width of the shared space; 0 without one.
        context_length: text tokens; 0 without a text tower.
        num_classes: classes of the head; 0 without one.
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
        """The model size with these dimensions, by frame size where several fit; None when none fits."""
        fitting = [name for name in PRESETS if self.fits(name)]
        exact = [name for name in fitting if PRESETS[name].image_size == self.frame_size]
        return next(iter(exact + fitting), None)

    def fits(self, size: ModelSize) -> bool:
        """Whether the video tower has the dimensions of a model size.

        Args:
            size: a row of `PRESETS`.
        """
        preset = PRESETS[size]
        own = (self.width, self.layers, self.patch_size)
        return own == (preset.video_width, preset.video_layers, preset.patch_size)
