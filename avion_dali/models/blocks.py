"""Common parts of the video towers: configuration, patches, MLPs and their base class.

Axes: B clips, C channels, T frames, H W pixels, N tokens, D width, X pixel values of a patch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar, Final, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from avion_dali.config import DEFAULT_NORM_EPS, Activation, AttentionBackend, CompileMode, ResidualDtype
from avion_dali.contracts import UserError
from avion_dali.models.layout import TowerLayout


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation with which OpenAI's CLIP weights were trained."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation element-wise, preserving shape and dtype."""
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: Final[dict[Activation, type[nn.Module]]] = {"gelu": nn.GELU, "quick_gelu": QuickGELU}


@dataclass(frozen=True)
class VideoTowerConfig:
    """Sizes and options of a video tower; `tower_config` makes one from a `ModelConfig`.

    The options from `activation` on are documented in `ModelConfig`; here they have no automatic values.

    Args:
        image_size: side length of the square input frames in pixels.
        patch_size: side length of a patch in pixels; divides `image_size`.
        num_frames: frames per clip (T).
        width: token width (D).
        layers: number of blocks.
        heads: number of attention heads; divides `width`.
        embed_dim: width of the output; None for no projection, with output width `width`.

    Raises:
        UserError: when `image_size` is not a multiple of `patch_size`.
    """

    image_size: int
    patch_size: int
    num_frames: int
    width: int
    layers: int
    heads: int
    embed_dim: int | None
    activation: Activation = "gelu"
    norm_eps: float = DEFAULT_NORM_EPS
    pre_norm: bool = True
    drop_path: float = 0.0
    drop_path_schedule: Literal["constant", "linear"] = "constant"
    patch_dropout: float = 0.0
    attention: AttentionBackend = "auto"
    residual_dtype: ResidualDtype = "fp32"
    checkpoint_every: int = 0
    compile: bool = False
    compile_mode: CompileMode = "default"

    def __post_init__(self) -> None:
        if self.image_size < self.patch_size or self.image_size % self.patch_size:
            raise UserError(
                f"video tower: frames of {self.image_size} pixels cannot be divided into patches of "
                f"{self.patch_size}; set data.frame_size to a multiple of {self.patch_size}"
            )

    @property
    def patches_per_frame(self) -> int:
        """Number of patch tokens per frame."""
        side: int = self.image_size // self.patch_size
        return side * side

    @property
    def clip_shape(self) -> tuple[int, int, int, int]:
        """Shape of one input clip: (3, T, H, W)."""
        return (3, self.num_frames, self.image_size, self.image_size)

    def time_slots(self, tube_frames: int) -> int:
        """Return the number of tubes along time.

        Args:
            tube_frames: frames per tube; 1 for patches of single frames.

        Raises:
            UserError: when `num_frames` is not a multiple of `tube_frames`.
        """
        if self.num_frames < tube_frames or self.num_frames % tube_frames:
            raise UserError(
                f"video tower: clips of {self.num_frames} frames cannot be divided into tubes of "
                f"{tube_frames}; set data.num_frames to a multiple of {tube_frames}"
            )
        return self.num_frames // tube_frames

    def as_residual(self, x_BND: Tensor) -> Tensor:
        """Return the tokens for the first block, float (B, N, D): in bf16 if configured, in a run in bf16."""
        device = x_BND.device.type
        if self.residual_dtype == "fp32" or not torch.amp.is_autocast_available(device):
            return x_BND
        is_bf16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
        return x_BND.bfloat16() if is_bf16 else x_BND

    def drop_path_rate(self, block: int) -> float:
        """Return the stochastic depth rate of a block, counted from 0."""
        if self.drop_path_schedule == "constant":
            return self.drop_path
        return self.drop_path * block / max(1, self.layers - 1)


def cut_patches(frames_BCTHW: Tensor, *, patch_size: int, patch_frames: int = 1) -> Tensor:
    """Cut clips into patches, or into tubes of several frames.

    Args:
        frames_BCTHW: clips of any dtype (B, C, T, H, W).
        patch_size: side length in pixels; divides H and W.
        patch_frames: frames per patch; divides T.

    Returns:
        Same dtype (B, N, X): patches by time, then row by row; within a patch by frame, row, column and
        channel. Channels come last, as in the memory of decoded frames, so that whole rows are copied.
    """
    clips, channels, frames, height, width = frames_BCTHW.shape
    side, depth = patch_size, patch_frames
    grid = frames_BCTHW.reshape(
        clips, channels, frames // depth, depth, height // side, side, width // side, side
    )
    values = depth * side * side * channels
    return grid.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(clips, -1, values)


class PatchEmbedding(nn.Module):
    """A linear map of the patches of a clip to tokens.

    The weight has the shape of a convolution, `(D, 3, P, P)` or `(D, 3, F, P, P)` for tubes of F frames, to
    match published checkpoints. It is applied as one matrix product, which is as fast as a strided convolution
    on GPUs and faster on CPUs.
    """

    def __init__(self, patch_size: int, width: int, *, patch_frames: int = 0, bias: bool = False) -> None:
        """Create the weight; the tower initializes it.

        Args:
            patch_size: side length of a patch in pixels (P).
            width: token width D.
            patch_frames: frames per tube (F); 0 for patches of one frame, whose weight has no frame axis.
            bias: whether to add a bias.
        """
        super().__init__()
        self.patch_size, self.patch_frames = patch_size, max(1, patch_frames)
        frames = (patch_frames,) if patch_frames else ()
        self.weight = nn.Parameter(torch.empty(width, 3, *frames, patch_size, patch_size))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, frames_BCTHW: Tensor) -> Tensor:
        """Embed clips: float (B, 3, T, H, W) -> (B, N, D), in the order of `cut_patches`."""
        return self.embed(self.cut(frames_BCTHW))

    def cut(self, frames_BCTHW: Tensor) -> Tensor:
        """Cut clips into the patches that `embed` takes: (B, 3, T, H, W) -> (B, N, X)."""
        return cut_patches(frames_BCTHW, patch_size=self.patch_size, patch_frames=self.patch_frames)

    def embed(self, patches_BNX: Tensor) -> Tensor:
        """Embed patches: float (B, N, X) -> (B, N, D)."""
        return functional.linear(patches_BNX, self.weight.movedim(1, -1).flatten(1), self.bias)


class NamedPatchEmbedding(nn.Module):
    """A patch embedding whose parameters are named `proj.*`, as in timm."""

    def __init__(self, patch_size: int, width: int, *, patch_frames: int = 0, bias: bool = False) -> None:
        """Create the weight; the arguments are those of `PatchEmbedding`."""
        super().__init__()
        self.proj = PatchEmbedding(patch_size, width, patch_frames=patch_frames, bias=bias)

    def forward(self, frames_BCTHW: Tensor) -> Tensor:
        """Embed clips: float (B, 3, T, H, W) -> (B, N, D)."""
        tokens_BND: Tensor = self.proj(frames_BCTHW)
        return tokens_BND


def build_mlp(width: int, activation: Activation, *, names: tuple[str, str]) -> nn.Sequential:
    """Create the MLP of a block, with a hidden layer four times as wide.

    Args:
        width: token width D.
        activation: activation between the two linear maps.
        names: names of the two linear maps, which become part of the parameter names.
    """
    first, second = names
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            [
                (first, nn.Linear(width, 4 * width)),
                ("act", ACTIVATIONS[activation]()),
                (second, nn.Linear(4 * width, width)),
            ]
        )
    )


class VideoEncoder(nn.Module):
    """Base class of all video towers, with an optional projection of their features.

    A tower declares its `layout` and those of the other class attributes that differ from the defaults here, so
    that other modules need not distinguish towers. It registers `image_projection` with `add_projection`,
    initializes it with `init_projection`, and computes `features`.

    Attributes:
        layout: the roles of its parameters.
        default_activation: activation of both towers if neither the configuration nor the weights specify one.
        tube_frames: frames per token along time; the number of frames must be a multiple.
        can_drop_patches: whether the tower supports `patch_dropout`.
        can_hide_tubes: whether `MaskedVideo` pre-trains its weights.
    """

    layout: ClassVar[TowerLayout]
    default_activation: ClassVar[Activation] = "gelu"
    tube_frames: ClassVar[int] = 1
    can_drop_patches: ClassVar[bool] = False
    can_hide_tubes: ClassVar[bool] = False

    image_projection: nn.Parameter

    def __init__(self, config: VideoTowerConfig) -> None:
        """Store the config; a tower creates its parameters afterwards.

        Args:
            config: sizes and options.

        Raises:
            UserError: when the number of frames is not a multiple of `tube_frames`.
        """
        super().__init__()
        self.config = config
        self.time_slots = config.time_slots(self.tube_frames)

    @staticmethod
    def init_head(head: nn.Linear) -> None:
        """Initialize the head of a classifier.

        Args:
            head: maps features to classes.
        """
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)

    @property
    def width(self) -> int:
        """Width of `features`."""
        return self.config.width

    def add_projection(self) -> None:
        """Register the projection if the config has one."""
        if self.config.embed_dim is not None:
            self.image_projection = nn.Parameter(torch.empty(self.config.width, self.config.embed_dim))

    def init_projection(self) -> None:
        """Initialize the projection if the config has one."""
        if self.config.embed_dim is not None:
            nn.init.normal_(self.image_projection, std=self.config.width**-0.5)

    @abstractmethod
    def features(self, frames_BCTHW: Tensor) -> Tensor:
        """Compute features: normalized frames, float (B, 3, T, H, W) -> (B, width)."""

    def forward(self, frames_BCTHW: Tensor) -> Tensor:
        """Encode clips.

        Args:
            frames_BCTHW: normalized frames, float (B, 3, T, H, W); channels-last memory is fastest.

        Returns:
            Float (B, embed_dim), not normalized; (B, width) without a projection.

        Raises:
            ValueError: when T, H or W differ from the config.
        """
        features_BD = self.features(frames_BCTHW)
        return features_BD if self.config.embed_dim is None else features_BD @ self.image_projection


@torch.no_grad()
def init_linear_layers(module: nn.Module) -> None:
    """Initialize all linear maps and norms of a tower for training from scratch.

    Matrices are truncated normal with standard deviation 0.02 (as in DeiT, Touvron et al. 2021, arXiv
    2012.12877), biases are zero, and LayerNorms are the identity.

    Args:
        module: a tower.
    """
    for part in module.modules():
        if isinstance(part, nn.LayerNorm):
            part.reset_parameters()
        elif isinstance(part, (nn.Linear, PatchEmbedding)):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def check_clip_shape(frames_BCTHW: Tensor, clip_shape: tuple[int, int, int, int]) -> None:
    """Check that clips have the shape for which a tower was built.

    Args:
        frames_BCTHW: clips.
        clip_shape: expected shape of one clip, (3, T, H, W).

    Raises:
        ValueError: when they have another shape.
    """
    if frames_BCTHW.ndim != 5 or frames_BCTHW.shape[1:] != clip_shape:
        wanted = ", ".join(map(str, clip_shape))
        raise ValueError(f"the video tower takes clips (B, {wanted}), got {tuple(frames_BCTHW.shape)}")
