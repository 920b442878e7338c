"""The text tower, which is open_clip's `TextTransformer` with its parameter names and results.

Axes: B clips, L text tokens, D width of the shared space.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from torch import nn

from avion_dali.config import Activation
from avion_dali.contracts import UserError
from avion_dali.models.blocks import ACTIVATIONS
from avion_dali.models.layout import TowerLayout
from avion_dali.models.residual import compile_blocks

TEXT_LAYOUT: Final = TowerLayout(
    blocks="transformer.resblocks",
    stem=("token_embedding",),
    text_positions=("positional_embedding",),
    vocabulary=("token_embedding.weight",),
)


@dataclass(frozen=True)
class TextTowerConfig:
    """Sizes and options of a text tower.

    Args:
        context_length: number of tokens per text (L); the tower accepts no other number.
        vocab_size: number of token ids.
        width: token width.
        layers: number of blocks.
        heads: number of attention heads; divides `width`.
        embed_dim: width of the output (D).
        activation: `gelu` (exact) or `quick_gelu` (OpenAI weights).
        checkpointing: whether to recompute the activations of all blocks in the backward pass.
        compile: whether to run torch.compile on each block.

    Raises:
        UserError: when the width is not a multiple of the number of heads.
    """

    context_length: int
    vocab_size: int
    width: int
    layers: int
    heads: int
    embed_dim: int
    activation: Activation = "gelu"
    checkpointing: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise UserError(
                f"text tower: width {self.width} is not a multiple of the number of heads, {self.heads}"
            )


def build_text_tower(config: TextTowerConfig) -> nn.Module:
    """Create a text tower: int64 tokens (B, L) -> float (B, D), not normalized.

    Attention is causal. The feature is that of the largest token id of a row, which is the end-of-text token
    (Radford et al. 2021, arXiv 2103.00020, section 2.4). The LayerNorm epsilon is 1e-5.

    Args:
        config: sizes and options.

    Returns:
        A newly initialized `open_clip.transformer.TextTransformer` that declares `TEXT_LAYOUT`.
    """
    from open_clip.transformer import TextTransformer  # imported here because it takes seconds

    tower = TextTransformer(
        context_length=config.context_length,
        vocab_size=config.vocab_size,
        width=config.width,
        heads=config.heads,
        layers=config.layers,
        output_dim=config.embed_dim,
        act_layer=ACTIVATIONS[config.activation],
    )
    tower.layout = TEXT_LAYOUT
    tower.set_grad_checkpointing(config.checkpointing)
    compile_blocks(tower.transformer.resblocks, enabled=config.compile)
    return tower
