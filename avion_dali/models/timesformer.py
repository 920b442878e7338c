"""The video tower of LaViLa and EgoVLP: attention over time, then over the patches of each frame.

Sources: Bertasius et al. 2021 (TimeSformer), arXiv 2102.05095, section 3; Bain et al. 2021 (Frozen in Time),
arXiv 2104.00650, section 3.2, for the residual around both. Parameter names and results are those of LaViLa's
released models (Zhao et al. 2022, arXiv 2212.04501) and, without `pre_norm`, of EgoVLP's (Lin et al. 2022,
arXiv 2206.01670), which have a bias in the patch embedding instead.
Axes: B clips, C channels, T frames, S patches of a frame, H heads (H W pixels in frames), K width of one head,
G groups of L patches that attend to each other, N = 1 + T S tokens, D width.
"""

from __future__ import annotations

from typing import ClassVar, Final, Literal

import torch
from torch import Tensor, nn

from avion_dali.config import Activation, AttentionBackend
from avion_dali.models.attention import attend, check_heads, join_heads, split_heads
from avion_dali.models.blocks import (
    NamedPatchEmbedding,
    VideoEncoder,
    VideoTowerConfig,
    build_mlp,
    check_clip_shape,
    init_linear_layers,
)
from avion_dali.models.convert_lavila import vit_to_timesformer
from avion_dali.models.layout import TowerLayout
from avion_dali.models.residual import DropPathBlock, add_branch, compile_blocks, run_blocks

Over = Literal["time", "space"]

# The norm before the blocks has CLIP's epsilon; the others have timm's.
PRE_NORM_EPS: Final = 1e-5


class DividedAttention(nn.Module):
    """Attention of each patch to the class token and to the patches at the same position or in the same frame.

    The class token attends to all tokens. Groups are rows of a batch, so no mask is needed.
    """

    def __init__(self, width: int, heads: int, *, over: Over, places: int, backend: AttentionBackend) -> None:
        """Create the projections; the tower initializes them.

        Args:
            width: token width D.
            heads: number of heads; divides `width`.
            over: `time`: patches at the same position attend to each other; `space`: patches of the same frame.
            places: patches per frame (S).
            backend: attention kernel.

        Raises:
            UserError: when the width is not a multiple of the number of heads.
        """
        super().__init__()
        check_heads(width, heads)
        self.heads, self.over, self.places, self.backend = heads, over, places, backend
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Mix the tokens of each clip: float (B, 1 + T * places, D) -> same shape."""
        q_BHNK, k_BHNK, v_BHNK = split_heads(self.qkv(x_BND), self.heads)
        class_BH1K = attend(q_BHNK[:, :, :1], k_BHNK, v_BHNK, self.backend)
        mixed_BGHLK = attend(
            self._groups(q_BHNK).flatten(0, 1),
            self._with_class(k_BHNK),
            self._with_class(v_BHNK),
            self.backend,
        ).unflatten(0, (x_BND.shape[0], -1))
        # Groups are frames or positions; restore the order by frame and then by position.
        order = (0, 2, 1, 3, 4) if self.over == "space" else (0, 2, 3, 1, 4)
        patches_BHNK = mixed_BGHLK.permute(order).flatten(2, 3)
        projected: Tensor = self.proj(join_heads(torch.cat([class_BH1K, patches_BHNK], dim=2)))
        return projected

    def _groups(self, t_BHNK: Tensor) -> Tensor:
        """Arrange patch tokens by group: (B, H, 1 + T S, K) -> (B, G, H, L, K), a view."""
        t_BHTSK = t_BHNK[:, :, 1:].unflatten(2, (-1, self.places))
        return t_BHTSK.permute((0, 2, 1, 3, 4) if self.over == "space" else (0, 3, 1, 2, 4))

    def _with_class(self, t_BHNK: Tensor) -> Tensor:
        """Arrange patch tokens by group, each preceded by the class token: (B * G, H, 1 + L, K)."""
        groups_BGHLK = self._groups(t_BHNK)
        class_BGH1K = t_BHNK[:, None, :, :1].expand(-1, groups_BGHLK.shape[1], -1, -1, -1)
        return torch.cat([class_BGH1K, groups_BGHLK], dim=3).flatten(0, 1)


class DividedBlock(DropPathBlock):
    """Attention over time, then over space, then the MLP; both attentions share one residual connection."""

    def __init__(self, config: VideoTowerConfig, *, drop_path_rate: float) -> None:
        """Create one block of the tower that the config describes."""
        super().__init__(drop_path_rate)
        width, eps, places = config.width, config.norm_eps, config.patches_per_frame
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = DividedAttention(width, config.heads, over="space", places=places, backend=config.attention)
        self.timeattn = DividedAttention(
            width, config.heads, over="time", places=places, backend=config.attention
        )
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = build_mlp(width, config.activation, names=("fc1", "fc2"))
        self.norm3 = nn.LayerNorm(width, eps=eps)

    def forward(
        self, x_BND: Tensor, first_B11: Tensor | None = None, second_B11: Tensor | None = None
    ) -> Tensor:
        """Apply the block to float (B, N, D), with the drop path factors of its two branches -> (B, N, D)."""
        over_time_BND = self.timeattn(self.norm3(x_BND))
        over_space_BND = self.attn(self.norm1(x_BND + over_time_BND))
        x_BND = add_branch(x_BND, over_space_BND, first_B11)
        return add_branch(x_BND, self.mlp(self.norm2(x_BND)), second_B11)


class TimeSformer(VideoEncoder):
    """A video tower with divided space-time attention.

    Token order is the class token, then frame by frame, row by row. A clip may have fewer frames than the tower
    was built for; it then uses the first frame positions. Without `pre_norm` the patch embedding has a bias.
    """

    # LaViLa's models start from OpenAI's weights and keep OpenAI's activation.
    default_activation: ClassVar[Activation] = "quick_gelu"
    layout: ClassVar[TowerLayout] = TowerLayout(
        blocks="blocks",
        stem=("patch_embed", "ln_pre"),
        tokens=("cls_token",),
        frame_positions=("temporal_embed",),
        place_positions=("pos_embed",),
        class_token=True,
        patches="patch_embed.proj.weight",
        optional_pre_norm="ln_pre",
        time_parts=("timeattn", "norm3"),
        from_vit=vit_to_timesformer,
    )

    def __init__(self, config: VideoTowerConfig) -> None:
        """Create and initialize the tower that the config describes."""
        super().__init__(config)
        width = config.width
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.patches_per_frame, width))
        self.temporal_embed = nn.Parameter(torch.empty(1, config.num_frames, width))
        self.add_projection()
        self.patch_embed = NamedPatchEmbedding(config.patch_size, width, bias=not config.pre_norm)
        if config.pre_norm:
            self.ln_pre = nn.LayerNorm(width, eps=PRE_NORM_EPS)
        self.blocks = nn.ModuleList(
            DividedBlock(config, drop_path_rate=config.drop_path_rate(i)) for i in range(config.layers)
        )
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        compile_blocks(self.blocks, enabled=config.compile, mode=config.compile_mode)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialize the weights, so that attention over time has no effect at first.

        Frame positions are zero, and so is the output of attention over time: as in LaViLa, its queries, keys
        and values are zero, and its last matrix is all ones, which lets gradients reach the values.
        """
        init_linear_layers(self)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.zeros_(self.temporal_embed)
        for part in self.modules():
            if isinstance(part, DividedAttention) and part.over == "time":
                nn.init.zeros_(part.qkv.weight)
                nn.init.ones_(part.proj.weight)
        self.init_projection()

    def features(self, frames_BCTHW: Tensor) -> Tensor:
        """Return the class token after the last norm: float (B, 3, T, H, W) -> (B, width)."""
        channels, most, height, width = self.config.clip_shape
        frames = min(most, frames_BCTHW.shape[2]) if frames_BCTHW.ndim == 5 else most
        check_clip_shape(frames_BCTHW, (channels, frames, height, width))
        # (1, T, 1, D) + (1, S, D): frame position plus place position of each patch.
        positions_1TSD = self.temporal_embed[:, :frames].unsqueeze(2) + self.pos_embed[:, 1:]
        x_BND = self.patch_embed(frames_BCTHW) + positions_1TSD.flatten(1, 2)
        class_11D = self.cls_token + self.pos_embed[:, :1]
        x_BND = torch.cat([class_11D.expand(x_BND.shape[0], -1, -1), x_BND], dim=1)
        if self.config.pre_norm:
            x_BND = self.ln_pre(x_BND)
        x_BND = self.config.as_residual(x_BND)
        x_BND = run_blocks(self.blocks, x_BND, checkpoint_every=self.config.checkpoint_every)
        pooled: Tensor = self.norm(x_BND[:, 0])
        return pooled
