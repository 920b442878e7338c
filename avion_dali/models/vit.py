"""The video tower: a plain vision transformer over all patches of all frames.

Source: Zhao & Kraehenbuehl 2023, "Training a Large Video Model on a Single Machine in a Day", arXiv
2309.16669, section 3; joint space-time attention, no tubelets. Parameter names are open_clip's.
Axes: B clips, C channels, T frames, H W pixels, N tokens, D width, X pixel values of a patch.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from avion_dali.contracts import UserError
from avion_dali.models.attention import SelfAttention

Activation = Literal["gelu", "quick_gelu"]


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x): the activation OpenAI's CLIP weights were trained with."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply element-wise; shape and dtype are kept."""
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: Final[dict[Activation, type[nn.Module]]] = {"gelu": nn.GELU, "quick_gelu": QuickGELU}


@dataclass(frozen=True)
class VideoTowerConfig:
    """Everything that shapes a video tower.

    Args:
        image_size: side of the square input frames in pixels.
        patch_size: side of a patch in pixels; divides `image_size`.
        num_frames: frames of a clip (T); a tower accepts no other number.
        width: token width (D).
        layers: number of blocks.
        heads: attention heads; divides `width`.
        embed_dim: width of the output.
        activation: `gelu` (exact) or `quick_gelu` (OpenAI weights).
        norm_eps: LayerNorm epsilon; 1e-6 in AVION's checkpoints, 1e-5 in OpenAI's.
        drop_path: stochastic depth rate, the same in every block, as in AVION's published recipes (Huang
            et al. 2016, arXiv 1603.09382, let it grow with depth).
        patch_dropout: share of patch tokens dropped in training, in [0, 1).
        checkpointing: recompute every block's activations in the backward pass.

    Raises:
        UserError: when patches do not tile the frame.
    """

    image_size: int
    patch_size: int
    num_frames: int
    width: int
    layers: int
    heads: int
    embed_dim: int
    activation: Activation = "gelu"
    norm_eps: float = 1e-6
    drop_path: float = 0.0
    patch_dropout: float = 0.0
    checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.image_size < self.patch_size or self.image_size % self.patch_size:
            raise UserError(
                f"video tower: frames of {self.image_size} pixels do not divide into patches of "
                f"{self.patch_size}; set data.frame_size to a multiple of {self.patch_size}"
            )

    @property
    def patches_per_frame(self) -> int:
        """Patch tokens of one frame."""
        side: int = self.image_size // self.patch_size
        return side * side


def drop_path(x_BND: Tensor, *, rate: float, training: bool) -> Tensor:
    """Zero whole clips of a residual branch at random, scaled so that the expectation is kept.

    Args:
        x_BND: a branch's output, float (B, N, D).
        rate: chance that a clip's branch is zeroed, in [0, 1).
        training: False returns the input.

    Returns:
        Float (B, N, D).
    """
    if not training or rate == 0.0:
        return x_BND
    keep = 1.0 - rate
    mask_B11 = x_BND.new_empty(x_BND.shape[0], 1, 1).bernoulli_(keep)
    return x_BND * (mask_B11 / keep)


def drop_patches(x_BND: Tensor, *, rate: float) -> Tensor:
    """Keep a random subset of every clip's patch tokens, drawn for each clip on its own.

    Source: Li et al. 2022, "Scaling Language-Image Pre-training via Masking", arXiv 2212.00794.

    Args:
        x_BND: patch tokens without the class token, float (B, N, D), positions already added.
        rate: share to drop, in [0, 1); at least one token stays.

    Returns:
        Float (B, max(1, floor(N * (1 - rate))), D).
    """
    clips, tokens, width = x_BND.shape
    keep = max(1, int(tokens * (1.0 - rate)))
    kept_BN = torch.rand(clips, tokens, device=x_BND.device).topk(keep, dim=1).indices
    return x_BND.gather(1, kept_BN.unsqueeze(-1).expand(-1, -1, width))


class PatchEmbedding(nn.Module):
    """One linear map for every patch of every frame, without bias.

    The weight is stored as a convolution's, `(D, 3, P, P)`, to match published checkpoints; it is applied
    as one matrix product, which is as fast on GPUs and faster on CPUs than a strided convolution.
    """

    def __init__(self, patch_size: int, width: int) -> None:
        """Create the weight; `VideoTower` initialises it."""
        super().__init__()
        self.patch_size = patch_size
        self.weight = nn.Parameter(torch.empty(width, 3, patch_size, patch_size))

    def forward(self, frames_BCTHW: Tensor) -> Tensor:
        """Float (B, 3, T, H, W) -> (B, T * patches, D), frame by frame, rows before columns."""
        clips, channels, frames, height, width = frames_BCTHW.shape
        side = self.patch_size
        grid = frames_BCTHW.reshape(clips, channels, frames, height // side, side, width // side, side)
        # Channel last within a patch: decoded frames lie so in memory, and the copy runs along whole rows.
        patches_BNX = grid.permute(0, 2, 3, 5, 4, 6, 1).reshape(clips, -1, side * side * channels)
        return functional.linear(patches_BNX, self.weight.permute(0, 2, 3, 1).flatten(1))


class Block(nn.Module):
    """A pre-norm transformer block: attention, then a four times wider MLP."""

    def __init__(self, config: VideoTowerConfig) -> None:
        """Create one block of the tower the config describes."""
        super().__init__()
        width = config.width
        self.drop_path_rate = config.drop_path
        self.ln_1 = nn.LayerNorm(width, eps=config.norm_eps)
        self.attn = SelfAttention(width, config.heads)
        self.ln_2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = nn.Sequential(
            OrderedDict[str, nn.Module](
                c_fc=nn.Linear(width, 4 * width),
                act=ACTIVATIONS[config.activation](),
                c_proj=nn.Linear(4 * width, width),
            )
        )

    def forward(self, x_BND: Tensor) -> Tensor:
        """Float (B, N, D) -> (B, N, D)."""
        rate = self.drop_path_rate
        x_BND = x_BND + drop_path(self.attn(self.ln_1(x_BND)), rate=rate, training=self.training)
        return x_BND + drop_path(self.mlp(self.ln_2(x_BND)), rate=rate, training=self.training)


class BlockStack(nn.Module):
    """The blocks in order; exists so that parameter names read `transformer.resblocks.<i>`."""

    def __init__(self, config: VideoTowerConfig) -> None:
        """Create all blocks of the tower the config describes."""
        super().__init__()
        self.checkpointing = config.checkpointing
        self.resblocks = nn.ModuleList(Block(config) for _ in range(config.layers))

    def forward(self, x_BND: Tensor) -> Tensor:
        """Float (B, N, D) -> (B, N, D)."""
        for block in self.resblocks:
            if self.checkpointing and torch.is_grad_enabled():
                x_BND = checkpoint(block, x_BND, use_reentrant=False)
            else:
                x_BND = block(x_BND)
        return x_BND


class VideoTower(nn.Module):
    """Clips to vectors: patches of all frames and a class token through one transformer.

    Token order is the class token, then frame by frame, row by row. Every patch gets the position of its
    place (shared by the frames) plus the position of its frame; the class token gets no frame position.
    """

    def __init__(self, config: VideoTowerConfig) -> None:
        """Create and initialise the tower the config describes."""
        super().__init__()
        self.config = config
        width = config.width
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(1 + config.patches_per_frame, width))
        if config.num_frames > 1:
            self.temporal_embedding = nn.Parameter(torch.empty(config.num_frames, width))
        self.image_projection = nn.Parameter(torch.empty(width, config.embed_dim))
        self.conv1 = PatchEmbedding(config.patch_size, width)
        self.ln_pre = nn.LayerNorm(width, eps=config.norm_eps)
        self.transformer = BlockStack(config)
        self.ln_post = nn.LayerNorm(width, eps=config.norm_eps)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw fresh weights, sound for training from scratch.

        Matrices of the blocks and the patch embedding are truncated normal with deviation 0.02 (as in
        DeiT, Touvron et al. 2021, arXiv 2012.12877), biases zero, LayerNorms the identity. Frame positions
        start at zero, so that weights of an image model begin as an average over frames.
        """
        for parameter in (self.class_embedding, self.positional_embedding):
            nn.init.normal_(parameter, std=0.02)
        nn.init.normal_(self.image_projection, std=self.config.width**-0.5)
        if self.config.num_frames > 1:
            nn.init.zeros_(self.temporal_embedding)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, (nn.Linear, PatchEmbedding)):
                nn.init.trunc_normal_(module.weight, std=0.02)
            elif isinstance(module, SelfAttention):
                nn.init.trunc_normal_(module.in_proj_weight, std=0.02)
                nn.init.zeros_(module.in_proj_bias)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, frames_BCTHW: Tensor) -> Tensor:
        """Encode clips.

        Args:
            frames_BCTHW: normalised frames, float (B, 3, T, H, W); channel-last memory is fastest.

        Returns:
            Float (B, embed_dim), not normalised.

        Raises:
            ValueError: when T, H or W differ from the config's.
        """
        size, frames = self.config.image_size, self.config.num_frames
        if frames_BCTHW.ndim != 5 or frames_BCTHW.shape[1:] != (3, frames, size, size):
            raise ValueError(
                f"the video tower takes clips (B, 3, {frames}, {size}, {size}), got {tuple(frames_BCTHW.shape)}"
            )
        x_BND = self.conv1(frames_BCTHW) + self._patch_positions()
        if self.training and self.config.patch_dropout > 0.0:
            x_BND = drop_patches(x_BND, rate=self.config.patch_dropout)
        class_D = self.class_embedding + self.positional_embedding[0]
        x_BND = torch.cat([class_D.expand(x_BND.shape[0], 1, -1), x_BND], dim=1)
        x_BND = self.transformer(self.ln_pre(x_BND))
        pooled: Tensor = self.ln_post(x_BND[:, 0]) @ self.image_projection
        return pooled

    def _patch_positions(self) -> Tensor:
        """Positions of all patch tokens, (T * patches, D): place plus frame."""
        place_ND = self.positional_embedding[1:]
        if self.config.num_frames == 1:
            return place_ND
        return (self.temporal_embedding.unsqueeze(1) + place_ND).flatten(0, 1)
