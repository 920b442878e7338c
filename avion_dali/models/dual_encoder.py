"""The dual encoder: a video tower and a text tower with a shared space of unit vectors.

Axes: B clips, C channels, T frames, H W pixels, L text tokens, D width of the shared space.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from avion_dali.config import ModelConfig
from avion_dali.models.presets import PRESETS
from avion_dali.models.text_tower import TextTower, TextTowerConfig
from avion_dali.models.towers import build_video_tower, resolve_model

# The temperature starts at 0.07, and the scale is at most 100: Radford et al. 2021, arXiv 2103.00020, section
# 2.5.
INITIAL_LOGIT_SCALE: Final = math.log(1 / 0.07)
MAX_LOGIT_SCALE: Final = math.log(100.0)


class DualEncoder(nn.Module):
    """Video and text encoders with a temperature.

    Parameters are named `visual.*`, `textual.*` and `logit_scale`.
    """

    def __init__(self, visual: nn.Module, textual: nn.Module, *, train_logit_scale: bool = False) -> None:
        """Combine two towers.

        Args:
            visual: maps float frames (B, 3, T, H, W) to (B, D).
            textual: maps int64 tokens (B, L) to (B, D); has an attribute `context_length`, the largest L.
            train_logit_scale: whether to learn the temperature instead of keeping it at 0.07.
        """
        super().__init__()
        self.visual = visual
        self.textual = textual
        self.logit_scale = nn.Parameter(torch.tensor(INITIAL_LOGIT_SCALE), requires_grad=train_logit_scale)

    def encode_video(self, frames_BCTHW: Tensor) -> Tensor:
        """Embed clips: normalized frames, float (B, 3, T, H, W) -> unit vectors, float32 (B, D)."""
        # Vectors are normalized in float32, because a softmax multiplies their cosines by 14 or more.
        return functional.normalize(self.visual(frames_BCTHW).float(), dim=-1)

    def encode_text(self, tokens_BL: Tensor) -> Tensor:
        """Embed texts.

        Args:
            tokens_BL: token ids, int64 (B, L) with L at most the tower's context length, zero padded.

        Returns:
            Unit vectors, float32 (B, D).

        Raises:
            ValueError: when L exceeds the context length.
        """
        return functional.normalize(self.textual(tokens_BL).float(), dim=-1)

    def forward(self, frames_BCTHW: Tensor, tokens_BL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embed clips and their texts, in one call for data-parallel training.

        Args:
            frames_BCTHW: normalized frames, float (B, 3, T, H, W).
            tokens_BL: token ids, int64 (B, L).

        Returns:
            Unit video vectors (B, D), unit text vectors (B, D) and the scale of their products (B,), the same
            number in every row; all float32. The scale is an output of the forward pass, so that its gradient
            is reduced over ranks like any other.
        """
        # As `encode_video` and in float32 too: the similarities feed a softmax at scale 14 and more.
        video_BD = functional.normalize(self.visual(frames_BCTHW).float(), dim=-1)
        text_BD = self.encode_text(tokens_BL)
        scale_B = self.logit_scale.exp().float().expand(video_BD.shape[0])
        return video_BD, text_BD, scale_B

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Clamp the scale to [1, 100] in place; call it after an optimizer step."""
        self.logit_scale.clamp_(0.0, MAX_LOGIT_SCALE)


def build_dual_encoder(config: ModelConfig, *, num_frames: int, frame_size: int) -> DualEncoder:
    """Create a dual encoder with weights drawn from torch's default generator.

    Args:
        config: encoder, size and options.
        num_frames: frames per clip (T).
        frame_size: side length of a frame in pixels; a multiple of the patch size.

    Returns:
        The model on the default device, in training mode.

    Raises:
        UserError: when the encoder is unknown, lacks an option that is set, or does not support such frames.
    """
    config = resolve_model(config)
    assert config.activation != "auto" and config.checkpoint_every != "auto"
    preset = PRESETS[config.size]
    visual = build_video_tower(config, num_frames=num_frames, frame_size=frame_size, embed_dim=config.embed_dim)
    textual = TextTower(
        TextTowerConfig(
            context_length=config.context_length,
            vocab_size=preset.vocab_size,
            width=preset.text_width,
            layers=preset.text_layers,
            heads=preset.text_heads,
            embed_dim=config.embed_dim,
            activation=config.activation,
            checkpoint_every=config.checkpoint_every,
            compile=config.compile,
            compile_mode=config.compile_mode,
        )
    )
    return DualEncoder(visual, textual, train_logit_scale=config.train_logit_scale)
