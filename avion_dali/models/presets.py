"""Model sizes as data: one row of numbers per size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from avion_dali.config import ModelSize


@dataclass(frozen=True)
class Preset:
    """Dimensions of a dual encoder.

    Args:
        image_size: side length in pixels of the frames for which the size was published.
        patch_size: side length in pixels of a patch.
        video_width: width of the video tower.
        video_layers: blocks of the video tower.
        video_heads: attention heads of the video tower.
        text_width: width of the text tower.
        text_layers: blocks of the text tower.
        text_heads: attention heads of the text tower.
        vocab_size: number of token ids of the text tower; all sizes share CLIP's vocabulary.
    """

    image_size: int
    patch_size: int
    video_width: int
    video_layers: int
    video_heads: int
    text_width: int
    text_layers: int
    text_heads: int
    vocab_size: int = 49408


# CLIP's ViT-B/16, ViT-L/14 and ViT-L/14@336 (Radford et al. 2021, arXiv 2103.00020, tables 19 and 20).
# `vit_l16` is VideoMAE's ViT-L (Tong et al. 2022, arXiv 2203.12602); its text tower is that of ViT-L/14.
# `tiny` is small enough to learn something on two CPU cores within minutes.
PRESETS: Final[dict[ModelSize, Preset]] = {
    "tiny": Preset(64, 16, 192, 4, 3, 128, 2, 4),
    "vit_b16": Preset(224, 16, 768, 12, 12, 512, 12, 8),
    "vit_l16": Preset(224, 16, 1024, 24, 16, 768, 12, 12),
    "vit_l14": Preset(224, 14, 1024, 24, 16, 768, 12, 12),
    "vit_l14_336": Preset(336, 14, 1024, 24, 16, 768, 12, 12),
}
