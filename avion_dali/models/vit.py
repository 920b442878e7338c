"""The video tower: a plain vision transformer over all patches of all frames.

Source: Zhao & Kraehenbuehl 2023, "Training a Large Video Model on a Single Machine in a Day", arXiv
2309.16669, section 3; joint space-time attention, no tubelets. Parameter names are open_clip's.
Axes: B clips, C channels, T frames, H W pixels, N tokens, D width.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from avion_dali.models.attention import SelfAttention
from avion_dali.models.blocks import (
    PatchEmbedding,
    VideoEncoder,
    VideoTowerConfig,
    build_mlp,
    check_clip_shape,
    init_linear_layers,
)
from avion_dali.models.layout import TowerLayout
from avion_dali.models.residual import BlockStack, DropPathBlock, add_branch


def drop_patches(x_BND: Tensor, *, rate: float) -> Tensor:
    """Keep a random subset of the patch tokens, drawn separately per clip.

    Source: Li et al. 2022, "Scaling Language-Image Pre-training via Masking", arXiv 2212.00794.

    Args:
        x_BND: patch tokens without the class token, float (B, N, D), positions already added.
        rate: fraction to drop, in [0, 1); at least one token is kept.

    Returns:
        Float (B, max(1, floor(N * (1 - rate))), D).
    """
    clips, tokens, width = x_BND.shape
    keep = max(1, int(tokens * (1.0 - rate)))
    kept_BN = torch.rand(clips, tokens, device=x_BND.device).topk(keep, dim=1).indices
    return x_BND.gather(1, kept_BN.unsqueeze(-1).expand(-1, -1, width))


class Block(DropPathBlock):
    """A pre-norm transformer block: attention, then an MLP."""

    def __init__(self, config: VideoTowerConfig, *, drop_path_rate: float) -> None:
        """Create one block of the tower that the config describes."""
        super().__init__(drop_path_rate)
        self.ln_1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attn = SelfAttention(config.width, config.heads, backend=config.attention)
        self.ln_2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = build_mlp(config.width, config.activation, names=("c_fc", "c_proj"))

    def forward(
        self, x_BND: Tensor, first_B11: Tensor | None = None, second_B11: Tensor | None = None
    ) -> Tensor:
        """Apply the block to float (B, N, D), with the drop path factors of its two branches -> (B, N, D)."""
        x_BND = add_branch(x_BND, self.attn(self.ln_1(x_BND)), first_B11)
        return add_branch(x_BND, self.mlp(self.ln_2(x_BND)), second_B11)


class VideoTower(VideoEncoder):
    """A video tower with joint attention over the patches of all frames and a class token.

    Token order is the class token, then frame by frame, row by row. A patch has a place position (shared by all
    frames) plus a frame position; the class token has no frame position.
    """

    can_drop_patches: ClassVar[bool] = True
    layout: ClassVar[TowerLayout] = TowerLayout(
        blocks="transformer.resblocks",
        stem=("conv1", "ln_pre"),
        tokens=("class_embedding",),
        frame_positions=("temporal_embedding",),
        place_positions=("positional_embedding",),
        class_token=True,
        patches="conv1.weight",
    )

    def __init__(self, config: VideoTowerConfig) -> None:
        """Create and initialize the tower the config describes."""
        super().__init__(config)
        width = config.width
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(1 + config.patches_per_frame, width))
        if config.num_frames > 1:
            self.temporal_embedding = nn.Parameter(torch.empty(config.num_frames, width))
        self.add_projection()
        self.conv1 = PatchEmbedding(config.patch_size, width)
        self.ln_pre = nn.LayerNorm(width, eps=config.norm_eps)
        self.transformer = BlockStack(
            [Block(config, drop_path_rate=config.drop_path_rate(i)) for i in range(config.layers)],
            checkpoint_every=config.checkpoint_every,
            compile=config.compile,
            compile_mode=config.compile_mode,
        )
        self.ln_post = nn.LayerNorm(width, eps=config.norm_eps)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialize the weights; with zero frame positions, weights of image models treat all frames alike."""
        init_linear_layers(self)
        for part in self.modules():
            if isinstance(part, SelfAttention):
                nn.init.trunc_normal_(part.in_proj_weight, std=0.02)
                nn.init.zeros_(part.in_proj_bias)
        for parameter in (self.class_embedding, self.positional_embedding):
            nn.init.normal_(parameter, std=0.02)
        if self.config.num_frames > 1:
            nn.init.zeros_(self.temporal_embedding)
        self.init_projection()

    def features(self, frames_BCTHW: Tensor) -> Tensor:
        """Return the class token after the last norm: float (B, 3, T, H, W) -> (B, width)."""
        check_clip_shape(frames_BCTHW, self.config.clip_shape)
        x_BND = self.conv1(frames_BCTHW) + self._patch_positions()
        if self.training and self.config.patch_dropout > 0.0:
            x_BND = drop_patches(x_BND, rate=self.config.patch_dropout)
        class_D = self.class_embedding + self.positional_embedding[0]
        x_BND = torch.cat([class_D.expand(x_BND.shape[0], 1, -1), x_BND], dim=1)
        x_BND = self.transformer(self.config.as_residual(self.ln_pre(x_BND)))
        pooled: Tensor = self.ln_post(x_BND[:, 0])
        return pooled

    def _patch_positions(self) -> Tensor:
        """Return the positions of all patch tokens, (T * patches, D): place plus frame position."""
        place_ND = self.positional_embedding[1:]
        if self.config.num_frames == 1:
            return place_ND
        return (self.temporal_embedding.unsqueeze(1) + place_ND).flatten(0, 1)
