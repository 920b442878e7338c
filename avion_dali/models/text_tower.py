"""The text tower: open_clip's `TextTransformer`, whose parameter names and numbers it keeps.

Axes: B clips, L text tokens, D width of the shared space.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from torch import nn

from avion_dali.config import Activation
from avion_dali.contracts import UserError
from avion_dali.models.blocks import ACTIVATIONS, compile_blocks
from avion_dali.models.layout import TowerLayout

TEXT_LAYOUT: Final = TowerLayout(
    blocks="transformer.resblocks",
    stem=("token_embedding",),
    text_positions=("positional_embedding",),
    vocabulary=("token_embedding.weight",),
)


@dataclass(frozen=True)
class TextTowerConfig:
    """Everything that shapes a text tower.

    Args:
        context_length: number of text tokens (L); the tower accepts no other.
        vocab_size: number of token ids.
        width: token width.
        layers: number of blocks.
        heads: attention heads; divides `width`.
        embed_dim: width of the output (D).
        activation: `gelu` (exact) or `quick_gelu` (OpenAI weights).
        checkpointing: recompute every block's activations in the backward pass.
        compile: run torch.compile on each block.

    Raises:
        UserError: when the width does not divide into the heads.
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
            raise UserError(f"text tower: width {self.width} does not divide into {self.heads} heads")


def build_text_tower(config: TextTowerConfig) -> nn.Module:
    """Create a text tower: int64 tokens (B, L) -> float (B, D), not normalized.

    Attention is causal, and the feature is read at the largest token id of a row, which is the end-of-text
    token (Radford et al. 2021, arXiv 2103.00020, section 2.4). LayerNorm epsilon is 1e-5.

    Args:
        config: sizes and options.

    Returns:
        An `open_clip.transformer.TextTransformer` with fresh weights, which declares `TEXT_LAYOUT`.
    """
    from open_clip.transformer import TextTransformer  # imported here: it takes seconds

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
