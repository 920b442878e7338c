"""Attention between the tokens of a clip.

`attend` is the one place where attention is computed, whatever the encoder, so that another kernel is a change
in one function. Which kernel runs is decided by `resolve_attention`, once, before a model is built.
Axes: B clips, N queries, M keys, H heads, K width of one head, D width of the tower.
"""

from __future__ import annotations

import functools
import importlib
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Final, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from avion_dali.config import AttentionBackend
from avion_dali.contracts import UserError
from avion_dali.wording import first_line

Kernel = Literal["sdpa", "flash-attn", "xformers", "math"]
PackageKernel = Callable[[Tensor, Tensor, Tensor], Tensor]

# Kernels of other packages: module, function, and what to install.
_PACKAGES: Final[dict[str, tuple[str, str, str]]] = {
    "flash-attn": ("flash_attn", "flash_attn_func", "flash-attn"),
    "xformers": ("xformers.ops", "memory_efficient_attention", "xformers"),
}
# Those that work on this machine. They keep heads after tokens, (B, N, H, K), and scale as `attend` does.
_PACKAGE_KERNELS: Final[dict[str, PackageKernel]] = {}
_HALF: Final = (torch.float16, torch.bfloat16)
SDPA_TOLERANCE: Final = 0.02
"""Largest error of a kernel in half precision, on values of deviation 1."""


def resolve_attention(name: AttentionBackend, device: torch.device, dtype: torch.dtype) -> Kernel:
    """Choose the kernel for a model, before it is built.

    Args:
        name: `model.attention`; `auto` is flash-attn on a GPU in half precision where it works, else PyTorch's
            own `scaled_dot_product_attention`.
        device: where queries, keys and values will be.
        dtype: their type; under autocast that of the autocast.

    Returns:
        The kernel's name, to be set as `model.attention`.

    Raises:
        UserError: when a kernel was requested by name and cannot run; the message says why.
    """
    if name == "auto":
        if device.type != "cuda" or dtype not in _HALF:
            return "sdpa"
        return "sdpa" if _package_problem("flash-attn", str(device), dtype) else "flash-attn"
    if name in ("sdpa", "math"):
        return name
    if name not in _PACKAGES:
        raise UserError(f"model.attention = {name!r} is none of auto, sdpa, flash-attn, xformers, math")
    problem = _package_problem(name, str(device), dtype)
    if problem:
        raise UserError(f"model.attention = {name!r} cannot run here: {problem}; set it to auto or sdpa")
    return name


@torch.compiler.assume_constant_result  # a fact about the machine: compiled blocks do not look into it
def _package_problem(name: str, device: str, dtype: torch.dtype) -> str | None:
    """Why a package's kernel cannot run, or None when it does; tried once."""
    return _find_problem(name, device, dtype)


@functools.cache
def _find_problem(name: str, device: str, dtype: torch.dtype) -> str | None:
    module, function, package = _PACKAGES[name]
    try:
        kernel: PackageKernel = getattr(importlib.import_module(module), function)
    except ImportError as error:
        return f"{module} cannot be imported ({error}); pip install {package}"
    if torch.device(device).type != "cuda":
        return f"its kernels need a GPU, and the model is on {device}"
    if name == "flash-attn" and dtype not in _HALF:
        return f"it computes in float16 and bfloat16, not {dtype}; set run.precision to bf16"
    trial_BNHK = _trial_tokens(device, dtype)
    try:
        kernel(trial_BNHK, trial_BNHK, trial_BNHK)
    except RuntimeError as error:
        return first_line(error)
    _PACKAGE_KERNELS[name] = kernel
    return None


def _trial_tokens(device: str, dtype: torch.dtype) -> Tensor:
    """Queries, keys or values to try a kernel with, as packages lay them out."""
    return torch.zeros(1, 8, 1, 64, device=device, dtype=dtype)


@torch.compiler.assume_constant_result
def _automatic_kernel(device: str, dtype: torch.dtype) -> Kernel:
    """The kernel of `auto` in a tower that was built without resolving it; decided once per device and type."""
    return _find_automatic_kernel(device, dtype)


@functools.cache
def _find_automatic_kernel(device: str, dtype: torch.dtype) -> Kernel:
    return resolve_attention("auto", torch.device(device), dtype)


def attend(q_BHNK: Tensor, k_BHMK: Tensor, v_BHMK: Tensor, backend: AttentionBackend = "auto") -> Tensor:
    """Scaled dot-product attention, softmax(q k^T / sqrt(K)) v, without mask or dropout.

    Source: Vaswani et al. 2017, arXiv 1706.03762, equation 1. All kernels but `math` keep no N x M matrix
    (Dao et al. 2022, arXiv 2205.14135).

    Args:
        q_BHNK: queries, float (B, H, N, K).
        k_BHMK: keys, float (B, H, M, K), of the same dtype.
        v_BHMK: values, same shape and dtype as the keys.
        backend: the kernel; with `auto` it is resolved at the first call on a device.

    Returns:
        Float (B, H, N, K): for every query the weighted mean of the values.

    Raises:
        UserError: when a kernel that was not resolved before cannot run here.
    """
    kernel = backend
    if backend == "auto":
        kernel = _automatic_kernel(str(q_BHNK.device), q_BHNK.dtype)
    if kernel == "sdpa":
        return functional.scaled_dot_product_attention(q_BHNK, k_BHMK, v_BHMK)
    if kernel == "math":
        return _attend_plainly(q_BHNK, k_BHMK, v_BHMK)
    if kernel not in _PACKAGE_KERNELS:
        kernel = resolve_attention(kernel, q_BHNK.device, q_BHNK.dtype)
    q_BNHK, k_BMHK, v_BMHK = (t.transpose(1, 2) for t in (q_BHNK, k_BHMK, v_BHMK))
    return _PACKAGE_KERNELS[kernel](q_BNHK, k_BMHK, v_BMHK).transpose(1, 2)


def _attend_plainly(q_BHNK: Tensor, k_BHMK: Tensor, v_BHMK: Tensor) -> Tensor:
    """The formula as written, which keeps the N x M matrix for the backward pass."""
    scores_BHNM = (q_BHNK / math.sqrt(q_BHNK.shape[-1])) @ k_BHMK.transpose(-1, -2)
    # With the type named, autocast keeps the matrix in half precision; inside, softmax computes in float32.
    weights_BHNM = torch.softmax(scores_BHNM, dim=-1, dtype=scores_BHNM.dtype)
    return weights_BHNM @ v_BHMK


def sdpa_problem(backend: SDPBackend, device: torch.device, dtype: torch.dtype) -> str | None:
    """Find out whether one of the kernels behind PyTorch's own attention works, forward and backward.

    Args:
        backend: the kernel.
        device: where to call it.
        dtype: of queries, keys and values.

    Returns:
        None when it works and agrees with the plain computation, else one line that says why it does not.
    """
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(3, 1, 12, 197, 64, generator=generator)
    q, k, v = (t.to(device, dtype).requires_grad_() for t in exact)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with sdpa_kernel(backend):
                mixed = attend(q, k, v, backend="sdpa")
            mixed.sum().backward()
            mixed_BHNK = mixed.detach().float().cpu()
        except RuntimeError as error:
            return f"{_sdpa_reason(error, caught)}; PyTorch takes another kernel by itself"
    exact_BHNK = _attend_plainly(exact[0], exact[1], exact[2])
    difference = float((mixed_BHNK - exact_BHNK).abs().max())
    if difference <= SDPA_TOLERANCE:
        return None
    return f"its results are wrong by up to {difference:.3g}; report it to PyTorch, and update PyTorch"


def _sdpa_reason(error: RuntimeError, caught: Sequence[warnings.WarningMessage]) -> str:
    """PyTorch warns of why it refuses a kernel; its error says only that it did."""
    said = [str(warning.message).partition(" (Triggered")[0].strip() for warning in caught]
    reasons = [text for text in said if text and not text.endswith("because:")]
    return reasons[0] if reasons else first_line(error)


def check_heads(width: int, heads: int) -> None:
    """Check that a width divides into heads.

    Args:
        width: token width D.
        heads: number of heads.

    Raises:
        UserError: when it does not.
    """
    if width % heads:
        raise UserError(f"attention: width {width} does not divide into {heads} heads; change one of them")


def split_heads(qkv_BNX: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split a joint projection, float (B, N, 3 D), into queries, keys and values: views (B, H, N, K)."""
    q_BHNK, k_BHNK, v_BHNK = qkv_BNX.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q_BHNK, k_BHNK, v_BHNK


def join_heads(mixed_BHNK: Tensor) -> Tensor:
    """Heads side by side again: float (B, H, N, K) -> (B, N, D)."""
    return mixed_BHNK.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Multi-head self-attention with the parameter names of `torch.nn.MultiheadAttention`.

    The names (`in_proj_weight`, `in_proj_bias`, `out_proj`) are those of OpenAI's and open_clip's
    weights, which therefore load without renaming.
    """

    def __init__(self, width: int, heads: int, *, backend: AttentionBackend = "auto") -> None:
        """Create the projections; `VideoTower` initializes them.

        Args:
            width: token width D.
            heads: number of heads; divides `width`.
            backend: attention kernel.

        Raises:
            UserError: when the width does not divide into the heads.
        """
        super().__init__()
        check_heads(width, heads)
        self.heads, self.backend = heads, backend
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Mix the tokens of each clip: float (B, N, D) -> (B, N, D)."""
        qkv_BNX = functional.linear(x_BND, self.in_proj_weight, self.in_proj_bias)
        mixed_BHNK = attend(*split_heads(qkv_BNX, self.heads), self.backend)
        projected: Tensor = self.out_proj(join_heads(mixed_BHNK))
        return projected


class FusedAttention(nn.Module):
    """Multi-head self-attention with timm's parameter names, `qkv` and `proj`, as VideoMAE has them."""

    def __init__(self, width: int, heads: int, *, backend: AttentionBackend = "auto") -> None:
        """Create the projections; the tower initializes them.

        Args:
            width: token width D.
            heads: number of heads; divides `width`.
            backend: attention kernel.

        Raises:
            UserError: when the width does not divide into the heads.
        """
        super().__init__()
        check_heads(width, heads)
        self.heads, self.backend = heads, backend
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Mix the tokens of each clip: float (B, N, D) -> (B, N, D)."""
        mixed_BHNK = attend(*split_heads(self.qkv(x_BND), self.heads), self.backend)
        projected: Tensor = self.proj(join_heads(mixed_BHNK))
        return projected
