"""The text tower of CLIP: a causal transformer that is read at the end of a text.

Source: Radford et al. 2021, arXiv 2103.00020, section 2.4. Parameter names, results and initial weights are
those of open_clip's `TextTransformer`.
Axes: B clips, L text tokens, E width of a token, D width of the shared space.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from avion_dali.config import Activation, CompileMode
from avion_dali.contracts import UserError
from avion_dali.models.attention import SelfAttention
from avion_dali.models.blocks import build_mlp
from avion_dali.models.layout import TowerLayout
from avion_dali.models.residual import BlockStack


@dataclass(frozen=True)
class TextTowerConfig:
    """Sizes and options of a text tower.

    Args:
        context_length: largest number of tokens per text (L).
        vocab_size: number of token ids.
        width: token width (E).
        layers: number of blocks.
        heads: number of attention heads; divides `width`.
        embed_dim: width of the output (D).
        activation: `gelu` (exact) or `quick_gelu` (OpenAI weights).
        checkpoint_every: recompute the activations of every n-th block in the backward pass; 0 of none.
        compile: whether to run torch.compile on each block.
        compile_mode: torch.compile's mode.

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
    checkpoint_every: int = 0
    compile: bool = False
    compile_mode: CompileMode = "default"

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise UserError(
                f"text tower: width {self.width} is not a multiple of the number of heads, {self.heads}"
            )


class TextBlock(nn.Module):
    """A pre-norm transformer block with causal attention; the LayerNorm epsilon is 1e-5."""

    def __init__(self, config: TextTowerConfig) -> None:
        """Create one block of the tower that the config describes."""
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width)
        self.attn = SelfAttention(config.width, config.heads, causal=True)
        # `nn.MultiheadAttention` draws these too before they are drawn anew: a seed gives open_clip's weights.
        nn.init.xavier_uniform_(self.attn.in_proj_weight)
        self.ln_2 = nn.LayerNorm(config.width)
        self.mlp = build_mlp(config.width, config.activation, names=("c_fc", "c_proj"))

    def forward(self, x_BLE: Tensor) -> Tensor:
        """Float (B, L, E) -> (B, L, E)."""
        x_BLE = x_BLE + self.attn(self.ln_1(x_BLE))
        mixed_BLE: Tensor = x_BLE + self.mlp(self.ln_2(x_BLE))
        return mixed_BLE


class TextTower(nn.Module):
    """A causal transformer over the tokens of a text; its feature is that of the end-of-text token.

    A text may be cut behind its end: what a token sees does not depend on the tokens after it.
    """

    layout: ClassVar[TowerLayout] = TowerLayout(
        blocks="transformer.resblocks",
        stem=("token_embedding",),
        text_positions=("positional_embedding",),
        vocabulary=("token_embedding.weight",),
    )

    def __init__(self, config: TextTowerConfig) -> None:
        """Create and initialize the tower that the config describes.

        Args:
            config: sizes and options.
        """
        super().__init__()
        self.context_length = config.context_length
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, config.width))
        self.transformer = BlockStack(
            [TextBlock(config) for _ in range(config.layers)],
            checkpoint_every=config.checkpoint_every,
            compile=config.compile,
            compile_mode=config.compile_mode,
        )
        self.ln_final = nn.LayerNorm(config.width)
        self.text_projection = nn.Parameter(torch.empty(config.width, config.embed_dim))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialize the weights, with deviations that shrink with width and depth as in CLIP."""
        width, layers = self.text_projection.shape[0], len(self.transformer.resblocks)
        branch_std = (width**-0.5) * ((2 * layers) ** -0.5)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for block in self.transformer.resblocks:
            assert isinstance(block, TextBlock)
            nn.init.zeros_(block.attn.out_proj.bias)
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=branch_std)
            nn.init.normal_(block.mlp.get_parameter("c_fc.weight"), std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.get_parameter("c_proj.weight"), std=branch_std)
        nn.init.normal_(self.text_projection, std=width**-0.5)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Encode texts.

        Args:
            tokens_BL: token ids, int64 (B, L) with L at most the context length. The largest id of a text is
                its end-of-text token.

        Returns:
            Float (B, D), not normalized.

        Raises:
            ValueError: when L exceeds the context length.
        """
        texts, length = tokens_BL.shape
        if length > self.context_length:
            raise ValueError(
                f"the text tower takes up to {self.context_length} tokens per text, got {length}; "
                "the manifest's texts and model.context_length must agree"
            )
        x_BLE = self.transformer(self.token_embedding(tokens_BL) + self.positional_embedding[:length])
        text_B = torch.arange(texts, device=tokens_BL.device)
        pooled_BE = self.ln_final(x_BLE[text_B, tokens_BL.argmax(dim=-1)])
        features_BD: Tensor = pooled_BE @ self.text_projection
        return features_BD
