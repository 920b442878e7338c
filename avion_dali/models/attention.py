"""Self-attention over the tokens of a clip.

`attend` is the one place where attention is computed, so that another kernel is a change in one function.
Axes: B clips, N tokens, H heads, K width of one head, D width of the tower.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from avion_dali.contracts import UserError


def attend(q_BHNK: Tensor, k_BHNK: Tensor, v_BHNK: Tensor) -> Tensor:
    """Scaled dot-product attention, softmax(q k^T / sqrt(K)) v, without mask or dropout.

    Source: Vaswani et al. 2017, arXiv 1706.03762, equation 1.

    Args:
        q_BHNK: queries, float (B, H, N, K).
        k_BHNK: keys, same shape and dtype.
        v_BHNK: values, same shape and dtype.

    Returns:
        Float (B, H, N, K): for every query the weighted mean of the values.
    """
    return functional.scaled_dot_product_attention(q_BHNK, k_BHNK, v_BHNK)


class SelfAttention(nn.Module):
    """Multi-head self-attention with the parameter names of `torch.nn.MultiheadAttention`.

    The names (`in_proj_weight`, `in_proj_bias`, `out_proj`) are those of OpenAI's and open_clip's
    weights, which therefore load without renaming.
    """

    def __init__(self, width: int, heads: int) -> None:
        """Create the projections; `VideoTower` initialises them.

        Args:
            width: token width D.
            heads: number of heads; divides `width`.

        Raises:
            UserError: when the width does not divide into the heads.
        """
        super().__init__()
        if width % heads:
            raise UserError(f"attention: width {width} does not divide into {heads} heads; change one of them")
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Mix the tokens of each clip: float (B, N, D) -> (B, N, D)."""
        qkv_BNX = functional.linear(x_BND, self.in_proj_weight, self.in_proj_bias)
        q_BHNK, k_BHNK, v_BHNK = qkv_BNX.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed_BHNK = attend(q_BHNK, k_BHNK, v_BHNK)
        projected: Tensor = self.out_proj(mixed_BHNK.transpose(1, 2).flatten(2))
        return projected
