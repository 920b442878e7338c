"""The model of VideoMAE pre-training: an encoder of a few visible tubes and a decoder that predicts the others.

Source: Tong et al. 2022, arXiv 2203.12602, section 3: tube masking, an asymmetric encoder and decoder, targets
normalized per tube (He et al. 2021, arXiv 2111.06377, section 3). Parameters have the names of its weights.
Axes: B clips, C channels, T frames, H W pixels, N tubes, U visible tubes, M hidden tubes, D width, E decoder
width, X pixel values of a tube.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar, Final

import torch
from torch import Tensor, nn

from avion_dali.config import ModelConfig
from avion_dali.contracts import UserError
from avion_dali.models.blocks import PatchEmbedding, VideoTowerConfig, check_clip_shape, cut_patches
from avion_dali.models.layout import TowerLayout
from avion_dali.models.positions import sincos_positions
from avion_dali.models.residual import run_blocks
from avion_dali.models.towers import ENCODERS, encoder_class, tower_config
from avion_dali.models.videomae import TUBE_FRAMES, build_blocks, build_tube_embedding

# Added to the standard deviation of a tube, which may be zero; pixel values are 0 to 255.
TARGET_EPS: Final = 1e-6


class MaskedEncoder(nn.Module):
    """The encoder, which processes only the visible tubes."""

    layout: ClassVar[TowerLayout] = TowerLayout(blocks="blocks", stem=("patch_embed",))

    def __init__(self, config: VideoTowerConfig) -> None:
        """Create the encoder that the config describes."""
        super().__init__()
        self.config = config
        self.patch_embed = build_tube_embedding(config)
        self.blocks = build_blocks(config)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, tubes_BUX: Tensor, positions_BUD: Tensor) -> Tensor:
        """Encode the pixels of visible tubes (B, U, X) and their positions (B, U, D) -> float (B, U, D)."""
        x_BUD = self.config.as_residual(self.patch_embed.proj.embed(tubes_BUX) + positions_BUD)
        x_BUD = run_blocks(self.blocks, x_BUD, checkpoint_every=self.config.checkpoint_every)
        encoded: Tensor = self.norm(x_BUD)
        return encoded


class MaskedDecoder(nn.Module):
    """The decoder: a few narrow blocks over visible and hidden tokens, which predict the hidden pixels."""

    layout: ClassVar[TowerLayout] = TowerLayout(blocks="blocks")

    def __init__(self, config: VideoTowerConfig, *, values: int) -> None:
        """Create the decoder that the config describes.

        Args:
            config: sizes of the decoder.
            values: number of pixel values per tube (X).
        """
        super().__init__()
        self.config = config
        self.blocks = build_blocks(config)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, values)

    def forward(self, x_BNE: Tensor, *, hidden: int) -> Tensor:
        """Decode tokens (B, N, E), with the hidden ones last -> predictions (B, hidden, X)."""
        x_BNE = self.config.as_residual(x_BNE)
        x_BNE = run_blocks(self.blocks, x_BNE, checkpoint_every=self.config.checkpoint_every)
        predicted: Tensor = self.head(self.norm(x_BNE[:, -hidden:]))
        return predicted


class MaskedVideo(nn.Module):
    """The model of VideoMAE pre-training.

    Attributes:
        time_slots: number of tubes along time.
        places: number of tubes per time slot. Tokens are ordered by time slot, then row by row.
    """

    layout: ClassVar[TowerLayout] = TowerLayout(tokens=("mask_token",))
    encoder_positions_ND: Tensor
    decoder_positions_NE: Tensor

    def __init__(self, config: VideoTowerConfig, *, decoder_depth: int) -> None:
        """Create and initialize the model.

        The decoder is half as wide as the encoder, with half as many heads, as in VideoMAE.

        Args:
            config: sizes and options of the encoder.
            decoder_depth: number of blocks of the decoder.

        Raises:
            UserError: when the number of frames is not a multiple of the frames per tube.
        """
        super().__init__()
        self.config = config
        self.time_slots, self.places = config.time_slots(TUBE_FRAMES), config.patches_per_frame
        tubes = self.time_slots * self.places
        narrow = replace(
            config,
            width=config.width // 2,
            heads=max(1, config.heads // 2),
            layers=decoder_depth,
            drop_path=0.0,
        )
        self.encoder = MaskedEncoder(config)
        self.decoder = MaskedDecoder(narrow, values=3 * TUBE_FRAMES * config.patch_size**2)
        self.encoder_to_decoder = nn.Linear(config.width, narrow.width, bias=False)
        self.mask_token = nn.Parameter(torch.empty(1, 1, narrow.width))
        self.register_buffer("encoder_positions_ND", sincos_positions(tubes, config.width), persistent=False)
        self.register_buffer("decoder_positions_NE", sincos_positions(tubes, narrow.width), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialize the weights; matrices follow Glorot's rule (He et al. 2021, arXiv 2111.06377, A.1)."""
        for part in self.modules():
            if isinstance(part, nn.LayerNorm):
                part.reset_parameters()
            elif isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
            elif isinstance(part, PatchEmbedding):
                bound = math.sqrt(6.0 / (part.weight[0].numel() + part.weight.shape[0]))
                nn.init.uniform_(part.weight, -bound, bound)
            if isinstance(part, (nn.Linear, PatchEmbedding)) and part.bias is not None:
                nn.init.zeros_(part.bias)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, frames_BCTHW: Tensor, is_masked_BN: Tensor) -> Tensor:
        """Predict the pixels of hidden tubes.

        Args:
            frames_BCTHW: normalized frames, float (B, 3, T, H, W).
            is_masked_BN: bool (B, N), True for hidden tubes, the same number in every clip; on the CPU, so that
                this number is known without waiting for the device.

        Returns:
            Float (B, M, X), hidden tubes in token order, values as in `tube_targets`.

        Raises:
            ValueError: when clips or masks have wrong shapes.
        """
        check_clip_shape(frames_BCTHW, self.config.clip_shape)
        if is_masked_BN.shape != (frames_BCTHW.shape[0], self.time_slots * self.places):
            raise ValueError(f"masks {tuple(is_masked_BN.shape)} do not fit clips {tuple(frames_BCTHW.shape)}")
        seen_BU, hidden_BM = (_sent(ids, frames_BCTHW.device) for ids in split_tubes(is_masked_BN))
        # Only visible tubes are embedded; embedding all would increase the encoder's work by a ninth.
        tubes_BUX = _take(self.encoder.patch_embed.proj.cut(frames_BCTHW), seen_BU)
        encoded_BUD = self.encoder(tubes_BUX, self.encoder_positions_ND[seen_BU])
        seen_BUE = self.encoder_to_decoder(encoded_BUD) + self.decoder_positions_NE[seen_BU]
        hidden_BME = self.mask_token + self.decoder_positions_NE[hidden_BM]
        tokens_BNE = torch.cat([seen_BUE, hidden_BME.to(seen_BUE.dtype)], dim=1)
        predicted: Tensor = self.decoder(tokens_BNE, hidden=hidden_BM.shape[1])
        return predicted


def split_tubes(is_masked_BN: Tensor) -> tuple[Tensor, Tensor]:
    """List the visible and the hidden tubes of each clip.

    Args:
        is_masked_BN: bool (B, N), True for hidden tubes.

    Returns:
        Int64 (B, U) and (B, M): their token indices, increasing, on the mask's device.

    Raises:
        ValueError: when clips hide different numbers of tubes, no tube, or all tubes.
    """
    hidden_B = is_masked_BN.sum(dim=1)
    hidden = int(hidden_B[0])
    if not bool((hidden_B == hidden).all()) or not 0 < hidden < is_masked_BN.shape[1]:
        raise ValueError(
            f"every clip must hide the same number of its tubes, got {sorted(set(hidden_B.tolist()))}"
        )
    ids_BN = is_masked_BN.to(torch.uint8).argsort(dim=1, stable=True)
    seen = is_masked_BN.shape[1] - hidden
    return ids_BN[:, :seen], ids_BN[:, seen:]


def tube_targets(frames_BTHWC: Tensor, is_masked_BN: Tensor, *, normalize: bool) -> Tensor:
    """Return the pixels that a `MaskedVideo` predicts.

    Args:
        frames_BTHWC: decoded frames, uint8 (B, T, H, W, 3), square.
        is_masked_BN: bool (B, N), True for hidden tubes, the same number in every clip.
        normalize: whether to subtract the mean of the pixels per tube and channel and to divide by their
            standard deviation (unbiased, plus 1e-6).

    Returns:
        Float32 (B, M, X): hidden tubes in token order; values by frame, row and column, channels last.

    Raises:
        ValueError: when the shapes of frames and masks do not match.
    """
    clips, frames, height = frames_BTHWC.shape[:3]
    grid = math.isqrt(is_masked_BN.shape[1] // max(1, frames // TUBE_FRAMES))
    tubes = frames // TUBE_FRAMES * grid * grid
    if frames % TUBE_FRAMES or height % max(1, grid) or is_masked_BN.shape != (clips, tubes):
        raise ValueError(f"masks {tuple(is_masked_BN.shape)} do not fit frames {tuple(frames_BTHWC.shape)}")
    hidden_BM = _sent(split_tubes(is_masked_BN)[1], frames_BTHWC.device)
    tubes_BNX = cut_patches(
        frames_BTHWC.permute(0, 4, 1, 2, 3), patch_size=height // grid, patch_frames=TUBE_FRAMES
    )
    hidden_BMX = _take(tubes_BNX, hidden_BM).float()
    if not normalize:
        return hidden_BMX
    pixels_BMPC = hidden_BMX.unflatten(2, (-1, 3))
    deviation_BM1C, mean_BM1C = torch.std_mean(pixels_BMPC, dim=2, keepdim=True)
    return ((pixels_BMPC - mean_BM1C) / (deviation_BM1C + TARGET_EPS)).flatten(2)


def _sent(ids: Tensor, device: torch.device) -> Tensor:
    """Copy ids to the device, through pinned memory so that the host does not wait for the copy."""
    return ids.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ids.to(device)


def _take(tokens_BNX: Tensor, ids_BM: Tensor) -> Tensor:
    """Select rows of each clip by index: (B, N, X) and int64 (B, M) -> (B, M, X)."""
    clip_B1 = torch.arange(ids_BM.shape[0], device=ids_BM.device).unsqueeze(1)
    return tokens_BNX[clip_B1, ids_BM]


def build_masked_video(
    config: ModelConfig, *, num_frames: int, frame_size: int, decoder_depth: int
) -> MaskedVideo:
    """Create a model for VideoMAE pre-training with newly initialized weights.

    Args:
        config: size and options.
        num_frames: frames per clip, even.
        frame_size: side length of a frame in pixels; a multiple of the patch size.
        decoder_depth: number of blocks of the decoder.

    Raises:
        UserError: when the encoder cannot be pre-trained so, or the number of frames is not a multiple of the
            frames per tube.
    """
    if not encoder_class(config.encoder).can_hide_tubes:
        able = ", ".join(name for name, tower in ENCODERS.items() if tower.can_hide_tubes)
        raise UserError(f"objective.name = masked-video needs model.encoder = {able}, got {config.encoder}")
    tower = tower_config(config, num_frames=num_frames, frame_size=frame_size, embed_dim=None)
    return MaskedVideo(tower, decoder_depth=decoder_depth)
