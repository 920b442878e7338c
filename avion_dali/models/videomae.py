"""The encoder of VideoMAE: a plain transformer over tubes of two frames, pooled by their mean.

Source: Tong et al. 2022, "VideoMAE: Masked Autoencoders are Data-Efficient Learners for Self-Supervised Video
Pre-Training", arXiv 2203.12602, section 3 and appendix. Parameter names are those of its published weights.
Axes: B clips, C channels, T frames, H W pixels, N tokens, D width.
"""

from __future__ import annotations

from typing import ClassVar, Final

import torch
from torch import Tensor, nn

from avion_dali.models.attention import FusedAttention
from avion_dali.models.blocks import (
    NamedPatchEmbedding,
    VideoEncoder,
    VideoTowerConfig,
    build_mlp,
    check_clip_shape,
    init_linear_layers,
)
from avion_dali.models.layout import TowerLayout
from avion_dali.models.positions import sincos_positions
from avion_dali.models.residual import DropPathBlock, add_branch, compile_blocks, run_blocks

TUBE_FRAMES: Final = 2
# So small a head starts with nearly equal probabilities of all classes and lets the encoder adapt first.
HEAD_SCALE: Final = 0.001


class FusedBlock(DropPathBlock):
    """A pre-norm transformer block like `vit.Block`, with timm's parameter names."""

    def __init__(self, config: VideoTowerConfig, *, drop_path_rate: float) -> None:
        """Create one block of the tower that the config describes."""
        super().__init__(drop_path_rate)
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attn = FusedAttention(config.width, config.heads, backend=config.attention)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = build_mlp(config.width, config.activation, names=("fc1", "fc2"))

    def forward(
        self, x_BND: Tensor, first_B11: Tensor | None = None, second_B11: Tensor | None = None
    ) -> Tensor:
        """Apply the block to float (B, N, D), with the drop path factors of its two branches -> (B, N, D)."""
        x_BND = add_branch(x_BND, self.attn(self.norm1(x_BND)), first_B11)
        return add_branch(x_BND, self.mlp(self.norm2(x_BND)), second_B11)


def build_blocks(config: VideoTowerConfig) -> nn.ModuleList:
    """Create the blocks of an encoder or decoder."""
    blocks = nn.ModuleList(
        FusedBlock(config, drop_path_rate=config.drop_path_rate(i)) for i in range(config.layers)
    )
    compile_blocks(blocks, enabled=config.compile, mode=config.compile_mode)
    return blocks


def build_tube_embedding(config: VideoTowerConfig) -> NamedPatchEmbedding:
    """Create the map from tubes to tokens."""
    return NamedPatchEmbedding(config.patch_size, config.width, patch_frames=TUBE_FRAMES, bias=True)


class VideoMAETower(VideoEncoder):
    """The video tower of VideoMAE for fine-tuning; its features are the mean of the tokens after a norm.

    Positions are fixed sines and cosines. There is no class token.
    """

    tube_frames: ClassVar[int] = TUBE_FRAMES
    can_hide_tubes: ClassVar[bool] = True
    layout: ClassVar[TowerLayout] = TowerLayout(
        blocks="blocks",
        stem=("patch_embed",),
        patches="patch_embed.proj.weight",
        not_pretrained=("fc_norm",),
    )
    positions_ND: Tensor

    def __init__(self, config: VideoTowerConfig) -> None:
        """Create and initialize the tower that the config describes.

        Args:
            config: sizes and options.
        """
        super().__init__(config)
        tubes = self.time_slots * config.patches_per_frame
        self.patch_embed = build_tube_embedding(config)
        self.register_buffer("positions_ND", sincos_positions(tubes, config.width), persistent=False)
        self.blocks = build_blocks(config)
        self.fc_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.add_projection()
        self.init_weights()

    @staticmethod
    @torch.no_grad()
    def init_head(head: nn.Linear) -> None:
        """Initialize the head of a classifier, with weights as small as in VideoMAE's fine-tuning.

        Args:
            head: maps features to classes.
        """
        VideoEncoder.init_head(head)  # drawn first, so that a seed gives the same weights as before
        nn.init.trunc_normal_(head.weight, std=0.02).mul_(HEAD_SCALE)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialize the weights."""
        init_linear_layers(self)
        self.init_projection()

    def features(self, frames_BCTHW: Tensor) -> Tensor:
        """Return the mean of the tokens after a norm: float (B, 3, T, H, W) -> (B, width)."""
        check_clip_shape(frames_BCTHW, self.config.clip_shape)
        x_BND = self.patch_embed(frames_BCTHW) + self.positions_ND
        x_BND = self.config.as_residual(x_BND)
        x_BND = run_blocks(self.blocks, x_BND, checkpoint_every=self.config.checkpoint_every)
        pooled: Tensor = self.fc_norm(x_BND.mean(dim=1))
        return pooled
