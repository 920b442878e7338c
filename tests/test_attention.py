import math

import pytest
import torch
from torch import nn

from avion_dali.contracts import UserError
from avion_dali.models.attention import SelfAttention, attend


def test_attend_equals_the_written_formula():
    q, k, v = torch.randn(3, 2, 4, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(5), dim=-1)
    assert torch.allclose(attend(q, k, v), weights @ v, atol=1e-12)


def test_attend_with_equal_keys_averages_the_values():
    q, v = torch.randn(2, 1, 2, 6, 4, generator=torch.Generator().manual_seed(1))
    mixed = attend(q, torch.ones(1, 2, 6, 4), v)
    assert torch.allclose(mixed, v.mean(dim=2, keepdim=True).expand_as(v), atol=1e-6)


def test_self_attention_takes_the_weights_and_gives_the_numbers_of_torch():
    torch.manual_seed(2)
    theirs = nn.MultiheadAttention(24, 3, batch_first=True).train()  # eval would take a fused inference path
    nn.init.normal_(theirs.in_proj_bias)
    nn.init.normal_(theirs.out_proj.bias)
    ours = SelfAttention(24, 3)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 9, 24)
    assert torch.allclose(ours(x), theirs(x, x, x, need_weights=False)[0], atol=1e-6)


def test_width_must_divide_into_heads():
    with pytest.raises(UserError, match="width 10 does not divide into 3 heads"):
        SelfAttention(10, 3)
