"""Builds the video tower that a configuration names."""

from __future__ import annotations

from avion_dali.config import Activation, ModelConfig
from avion_dali.contracts import UserError
from avion_dali.models.blocks import VideoTowerConfig
from avion_dali.models.presets import PRESETS
from avion_dali.models.timesformer import TimeSformer
from avion_dali.models.videomae import VideoMAETower
from avion_dali.models.vit import VideoTower

VideoEncoder = VideoTower | TimeSformer | VideoMAETower


def settled_activation(config: ModelConfig) -> Activation:
    """The activation of both towers: LaViLa's TimeSformers run OpenAI's weights with the one of OpenAI."""
    if config.activation != "auto":
        return config.activation
    return "quick_gelu" if config.encoder == "timesformer" else "gelu"


def tower_config(
    config: ModelConfig, *, num_frames: int, frame_size: int, embed_dim: int | None
) -> VideoTowerConfig:
    """Put a model's size and options together.

    Args:
        config: size and options.
        num_frames: frames of a clip (T).
        frame_size: side of a frame in pixels.
        embed_dim: width of the output; None for none of its own.

    Raises:
        UserError: when the options do not go together.
    """
    if config.patch_dropout and config.encoder != "vit":
        raise UserError(f"model.patch_dropout is for model.encoder vit; set it to 0 with {config.encoder}")
    if not config.pre_norm and config.encoder != "timesformer":
        raise UserError(
            f"model.pre_norm = false is for model.encoder timesformer; leave it out for {config.encoder}"
        )
    preset = PRESETS[config.size]
    return VideoTowerConfig(
        image_size=frame_size,
        patch_size=preset.patch_size,
        num_frames=num_frames,
        width=preset.video_width,
        layers=preset.video_layers,
        heads=preset.video_heads,
        embed_dim=embed_dim,
        activation=settled_activation(config),
        norm_eps=config.norm_eps or 1e-6,
        pre_norm=config.pre_norm,
        drop_path=config.drop_path,
        drop_path_schedule=config.drop_path_schedule,
        patch_dropout=config.patch_dropout,
        attention=config.attention,
        checkpoint_every=config.checkpoint_every,
        compile=config.compile,
    )


def build_video_tower(
    config: ModelConfig, *, num_frames: int, frame_size: int, embed_dim: int | None
) -> VideoEncoder:
    """Create a video tower with fresh weights, drawn from torch's default generator.

    Args:
        config: encoder, size and options.
        num_frames: frames of a clip (T).
        frame_size: side of a frame in pixels; any multiple of the size's patch.
        embed_dim: width of the output; None for the encoder's features themselves.

    Returns:
        A module that maps float frames (B, 3, T, H, W) to (B, embed_dim), or to (B, width) without projection,
        and has `width` and `features(frames_BCTHW)`, (B, width) in any case.

    Raises:
        UserError: when frames do not fit the encoder, or options do not go together.
    """
    tower = tower_config(config, num_frames=num_frames, frame_size=frame_size, embed_dim=embed_dim)
    if config.encoder == "vit":
        return VideoTower(tower)
    if config.encoder == "timesformer":
        return TimeSformer(tower)
    if config.encoder == "videomae":
        return VideoMAETower(tower)
    raise UserError(f"model.encoder = {config.encoder!r} is none of vit, timesformer, videomae")
