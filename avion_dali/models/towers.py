"""The table of video towers, the resolution of their automatic settings, and their construction.

A new encoder is a class derived from `VideoEncoder` that declares its `layout`, and one line in `ENCODERS`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from torch import nn

from avion_dali.config import DEFAULT_NORM_EPS, ModelConfig
from avion_dali.contracts import UserError
from avion_dali.models.blocks import VideoEncoder, VideoTowerConfig
from avion_dali.models.presets import PRESETS
from avion_dali.models.timesformer import TimeSformer
from avion_dali.models.videomae import VideoMAETower
from avion_dali.models.vit import VideoTower
from avion_dali.models.weight_facts import WeightFacts

ENCODERS: Final[dict[str, type[VideoEncoder]]] = {
    "vit": VideoTower,
    "timesformer": TimeSformer,
    "videomae": VideoMAETower,
}
"""Value of `model.encoder` to the class of the video tower."""


def encoder_class(name: str) -> type[VideoEncoder]:
    """Look up the class of a video tower.

    Args:
        name: `model.encoder`.

    Raises:
        UserError: when there is no such encoder; lists all encoders.
    """
    if name not in ENCODERS:
        raise UserError(f"model.encoder = {name!r} is not an encoder; choose one of {', '.join(ENCODERS)}")
    return ENCODERS[name]


def encoder_name(tower: nn.Module) -> str:
    """Look up the name of a video tower.

    Args:
        tower: an instance of one of the `ENCODERS`.

    Raises:
        UserError: when its class is not in the table.
    """
    for name, kind in ENCODERS.items():
        if isinstance(tower, kind):
            return name
    raise UserError(f"{type(tower).__name__} is not a known encoder; add it to ENCODERS in towers.py")


def resolve_model(config: ModelConfig, facts: WeightFacts | None = None) -> ModelConfig:
    """Resolve the automatic settings of a model.

    Resolving a resolved configuration changes nothing.

    Args:
        config: the configuration of the model.
        facts: facts about the initial weights; None for random weights.

    Returns:
        The configuration with resolved `activation`, `norm_eps` and `pre_norm`, as a run should record it.

    Raises:
        UserError: when the encoder is unknown, lacks an option that is set, or is not that of the weights; or
            when the weights have another size. The message names the setting to change.
    """
    encoder = encoder_class(config.encoder)
    activation, norm_eps = config.activation, config.norm_eps
    if facts is not None:
        _require_fit(config, facts)
        config = replace(config, pre_norm=facts.pre_norm)
        activation = facts.activation if activation == "auto" and facts.activation else activation
        norm_eps = norm_eps or facts.norm_eps
    if config.patch_dropout and not encoder.can_drop_patches:
        able = ", ".join(name for name, kind in ENCODERS.items() if kind.can_drop_patches)
        raise UserError(f"model.patch_dropout is for model.encoder {able}; set it to 0 with {config.encoder}")
    if not config.pre_norm and not encoder.layout.optional_pre_norm:
        able = ", ".join(name for name, kind in ENCODERS.items() if kind.layout.optional_pre_norm)
        raise UserError(f"model.pre_norm = false is for model.encoder {able}; remove it for {config.encoder}")
    return replace(
        config,
        activation=encoder.default_activation if activation == "auto" else activation,
        norm_eps=norm_eps or DEFAULT_NORM_EPS,
    )


def _require_fit(config: ModelConfig, facts: WeightFacts) -> None:
    """Reject weights of another encoder or size, or with a norm that the model does not have."""
    weights = config.weights or "the weights"
    takes_images = facts.family == "open_clip" and encoder_class(config.encoder).layout.from_vit is not None
    if config.encoder != facts.encoder and not takes_images:
        raise UserError(
            f"model.encoder = {config.encoder}, but {weights} are those of a {facts.encoder}; "
            f"set model.encoder: {facts.encoder}"
        )
    if not facts.fits(config.size):
        preset = PRESETS[config.size]
        way_out = f"set model.size: {facts.size}" if facts.size else "no model.size has these dimensions"
        raise UserError(
            f"model.size = {config.size} has width {preset.video_width}, {preset.video_layers} blocks and "
            f"patches of {preset.patch_size} pixels, but {weights} have width {facts.width}, "
            f"{facts.layers} blocks and patches of {facts.patch_size}; {way_out}"
        )
    if facts.pre_norm and not config.pre_norm:
        raise UserError(
            f"model.pre_norm = false, but {weights} have a norm before their first block; remove model.pre_norm"
        )


def tower_config(
    config: ModelConfig, *, num_frames: int, frame_size: int, embed_dim: int | None
) -> VideoTowerConfig:
    """Combine the size and options of a model; automatic settings are resolved as for random weights.

    Args:
        config: size and options.
        num_frames: frames per clip (T).
        frame_size: side length of a frame in pixels.
        embed_dim: width of the output; None for no projection.

    Raises:
        UserError: when the encoder is unknown or lacks an option that is set.
    """
    config = resolve_model(config)
    assert config.activation != "auto" and config.checkpoint_every != "auto"
    preset = PRESETS[config.size]
    return VideoTowerConfig(
        image_size=frame_size,
        patch_size=preset.patch_size,
        num_frames=num_frames,
        width=preset.video_width,
        layers=preset.video_layers,
        heads=preset.video_heads,
        embed_dim=embed_dim,
        activation=config.activation,
        norm_eps=config.norm_eps,
        pre_norm=config.pre_norm,
        drop_path=config.drop_path,
        drop_path_schedule=config.drop_path_schedule,
        patch_dropout=config.patch_dropout,
        attention=config.attention,
        residual_dtype=config.residual_dtype,
        checkpoint_every=config.checkpoint_every,
        compile=config.compile,
        compile_mode=config.compile_mode,
    )


def build_video_tower(
    config: ModelConfig, *, num_frames: int, frame_size: int, embed_dim: int | None
) -> VideoEncoder:
    """Create a video tower with weights drawn from torch's default generator.

    Args:
        config: encoder, size and options.
        num_frames: frames per clip (T).
        frame_size: side length of a frame in pixels; a multiple of the patch size.
        embed_dim: width of the output; None for no projection.

    Returns:
        A module that maps float frames (B, 3, T, H, W) to (B, embed_dim), or to (B, width) without projection.
        Its `features(frames_BCTHW)` are (B, width) in both cases.

    Raises:
        UserError: when the encoder is unknown, lacks an option that is set, or does not support such frames.
    """
    tower = tower_config(config, num_frames=num_frames, frame_size=frame_size, embed_dim=embed_dim)
    return encoder_class(config.encoder)(tower)
