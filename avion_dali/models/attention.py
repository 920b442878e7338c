"""Attention between the tokens of a clip.

`attend` computes the attention of all encoders, so that adding a kernel changes one function.
`resolve_attention` chooses the kernel once, before a model is built.
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

Kernel = Literal["sdpa", "cudnn", "flash", "efficient", "flash-attn", "xformers", "math"]
PackageKernel = Callable[[Tensor, Tensor, Tensor], Tensor]

# Kernels of other packages: module, function, and the package to install.
_PACKAGES: Final[dict[str, tuple[str, str, str]]] = {
    "flash-attn": ("flash_attn", "flash_attn_func", "flash-attn"),
    "xformers": ("xformers.ops", "memory_efficient_attention", "xformers"),
}
# The kernels that work on this machine. They take (B, N, H, K), with heads after tokens, and scale as `attend`
# does.
_PACKAGE_KERNELS: Final[dict[str, PackageKernel]] = {}
# Kernels of PyTorch's `scaled_dot_product_attention`; `sdpa` leaves the choice to PyTorch.
_SDPA_BACKENDS: Final[dict[str, SDPBackend]] = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# For a single query. The backward pass of cuDNN gives NaN for one query with strongly negative scores
# (NVIDIA/cudnn-frontend issue 1072). `math` would round such scores to half precision, these kernels do not.
_WITHOUT_CUDNN: Final = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_HALF: Final = (torch.float16, torch.bfloat16)
SDPA_TOLERANCE: Final = 0.02
"""Largest allowed error of a kernel in half precision, on values with standard deviation 1."""


def resolve_attention(name: AttentionBackend, device: torch.device, *, dtype: torch.dtype) -> Kernel:
    """Choose the kernel for a model, before it is built.

    Args:
        name: `model.attention`; `auto` selects flash-attn if it works, on a GPU in half precision, and
            otherwise PyTorch's `scaled_dot_product_attention`.
        device: device of queries, keys and values.
        dtype: dtype of queries, keys and values; under autocast, the dtype of the autocast.

    Returns:
        The kernel's name, to be set as `model.attention`.

    Raises:
        UserError: when a kernel that is requested by name cannot run; the message gives the reason.
    """
    if name == "auto":
        if device.type != "cuda" or dtype not in _HALF:
            return "sdpa"
        return "sdpa" if _package_problem("flash-attn", str(device), dtype) else "flash-attn"
    if name in ("sdpa", "math"):
        return name
    if name in _SDPA_BACKENDS:
        problem = sdpa_problem(_SDPA_BACKENDS[name], device, dtype=dtype)
    elif name in _PACKAGES:
        problem = _package_problem(name, str(device), dtype)
    else:
        choices = ", ".join(("auto", "sdpa", *_SDPA_BACKENDS, *_PACKAGES, "math"))
        raise UserError(f"model.attention = {name!r} is not a kernel; choose one of {choices}")
    if problem:
        raise UserError(f"model.attention = {name!r} cannot run here: {problem}; set it to auto or sdpa")
    return name


@torch.compiler.assume_constant_result  # it is constant on a machine, so compiled blocks need not trace it
def _package_problem(name: str, device: str, dtype: torch.dtype) -> str | None:
    """Return why a package's kernel cannot run, or None if it can; it is tried only once."""
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
    """Return tokens for a trial run of a kernel, in the layout of the packages."""
    return torch.zeros(1, 8, 1, 64, device=device, dtype=dtype)


@torch.compiler.assume_constant_result
def _automatic_kernel(device: str, dtype: torch.dtype) -> Kernel:
    """Return the kernel of an unresolved `auto`, chosen once per device and dtype."""
    return _find_automatic_kernel(device, dtype)


@functools.cache
def _find_automatic_kernel(device: str, dtype: torch.dtype) -> Kernel:
    return resolve_attention("auto", torch.device(device), dtype=dtype)


def attend(q_BHNK: Tensor, k_BHMK: Tensor, v_BHMK: Tensor, backend: AttentionBackend = "auto") -> Tensor:
    """Scaled dot-product attention, softmax(q k^T / sqrt(K)) v, without mask or dropout.

    Source: Vaswani et al. 2017, arXiv 1706.03762, equation 1. Only `math` stores the N x M matrix of weights
    (Dao et al. 2022, arXiv 2205.14135). A single query is not given to cuDNN, see `_WITHOUT_CUDNN`.

    Args:
        q_BHNK: queries, float (B, H, N, K).
        k_BHMK: keys, float (B, H, M, K), of the same dtype.
        v_BHMK: values, same shape and dtype as the keys.
        backend: the kernel; `auto` is resolved at the first call on a device.

    Returns:
        Float (B, H, N, K): the weighted mean of the values for each query.

    Raises:
        UserError: when a kernel that has not been resolved before cannot run here.
    """
    kernel = backend
    if backend == "auto":
        kernel = _automatic_kernel(str(q_BHNK.device), q_BHNK.dtype)
    if kernel == "math":
        return _attend_plainly(q_BHNK, k_BHMK, v_BHMK=v_BHMK)
    if kernel in ("sdpa", "cudnn") and q_BHNK.shape[2] == 1:
        with sdpa_kernel(_WITHOUT_CUDNN):
            return functional.scaled_dot_product_attention(q_BHNK, k_BHMK, v_BHMK)
    if kernel == "sdpa":
        return functional.scaled_dot_product_attention(q_BHNK, k_BHMK, v_BHMK)
    if kernel in _SDPA_BACKENDS:
        with sdpa_kernel(_SDPA_BACKENDS[kernel]):
            return functional.scaled_dot_product_attention(q_BHNK, k_BHMK, v_BHMK)
    if kernel not in _PACKAGE_KERNELS:
        kernel = resolve_attention(kernel, q_BHNK.device, dtype=q_BHNK.dtype)
    q_BNHK, k_BMHK, v_BMHK = (t.transpose(1, 2) for t in (q_BHNK, k_BHMK, v_BHMK))
    return _PACKAGE_KERNELS[kernel](q_BNHK, k_BMHK, v_BMHK).transpose(1, 2)


def attend_causally(q_BHNK: Tensor, k_BHNK: Tensor, v_BHNK: Tensor) -> Tensor:
    """`attend` in which a token sees only itself and the tokens before it, by PyTorch's choice of kernel.

    No mask is passed: kernels skip what a causal mask hides, and cuDNN's gives NaN with masks of some lengths
    (pytorch/pytorch issue 196678).

    Args:
        q_BHNK: queries, float (B, H, N, K).
        k_BHNK: keys, same shape and dtype.
        v_BHNK: values, same shape and dtype.

    Returns:
        Float (B, H, N, K).
    """
    if q_BHNK.shape[2] == 1:
        return v_BHNK
    return functional.scaled_dot_product_attention(q_BHNK, k_BHNK, v_BHNK, is_causal=True)


def describe_kernel(kernel: Kernel, device: torch.device, *, dtype: torch.dtype, width: int) -> str:
    """Return a kernel's name for logs; for `sdpa` also the kernel that PyTorch picks, as `sdpa (cudnn)`.

    PyTorch picks by device, dtype and width of a head, not by the number of tokens.

    Args:
        kernel: a resolved kernel.
        device: device of queries, keys and values.
        dtype: their dtype.
        width: width of one head (K).
    """
    if kernel != "sdpa":
        return kernel
    q_BHNK = torch.empty(1, 1, 197, width, device=device, dtype=dtype, requires_grad=True)
    # The functions `torch.backends.cuda.can_use_...` tell what could run, but not which of them comes first.
    picked = SDPBackend(torch._fused_sdp_choice(q_BHNK, q_BHNK, q_BHNK))
    names = {backend: name for name, backend in _SDPA_BACKENDS.items()}
    return f"sdpa ({names.get(picked, picked.name.lower())})"


def _attend_plainly(q_BHNK: Tensor, k_BHMK: Tensor, *, v_BHMK: Tensor) -> Tensor:
    """Compute the formula directly; this stores the N x M matrix for the backward pass."""
    scores_BHNM = (q_BHNK / math.sqrt(q_BHNK.shape[-1])) @ k_BHMK.transpose(-1, -2)
    # With an explicit dtype, autocast keeps the matrix in half precision; softmax itself computes in float32.
    weights_BHNM = torch.softmax(scores_BHNM, dim=-1, dtype=scores_BHNM.dtype)
    return weights_BHNM @ v_BHMK


def sdpa_problem(backend: SDPBackend, device: torch.device, *, dtype: torch.dtype) -> str | None:
    """Check whether one of the kernels of PyTorch's attention works, forward and backward.

    Args:
        backend: the kernel.
        device: device on which to call it.
        dtype: dtype of queries, keys and values.

    Returns:
        None if it works and agrees with the direct computation, else one line with the reason.
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
            return f"{_sdpa_reason(error, caught)}; PyTorch selects another kernel automatically"
    exact_BHNK = _attend_plainly(exact[0], exact[1], v_BHMK=exact[2])
    difference = float((mixed_BHNK - exact_BHNK).abs().max())
    if difference <= SDPA_TOLERANCE:
        return None
    return f"its results are wrong by up to {difference:.3g}; report it to PyTorch, and update PyTorch"


def _sdpa_reason(error: RuntimeError, caught: Sequence[warnings.WarningMessage]) -> str:
    """Return why PyTorch rejects a kernel, which it tells in warnings and not in its error."""
    said = [str(warning.message).partition(" (Triggered")[0].strip() for warning in caught]
    reasons = [text for text in said if text and not text.endswith("because:")]
    return reasons[0] if reasons else first_line(error)


def check_heads(width: int, heads: int) -> None:
    """Check that a width is a multiple of the number of heads.

    Args:
        width: token width D.
        heads: number of heads.

    Raises:
        UserError: when it does not.
    """
    if width % heads:
        raise UserError(
            f"attention: width {width} is not a multiple of the number of heads, {heads}; change one of them"
        )


def split_heads(qkv_BNX: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split a joint projection, float (B, N, 3 D), into queries, keys and values: views (B, H, N, K)."""
    q_BHNK, k_BHNK, v_BHNK = qkv_BNX.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q_BHNK, k_BHNK, v_BHNK


def join_heads(mixed_BHNK: Tensor) -> Tensor:
    """Concatenate the heads: float (B, H, N, K) -> (B, N, D)."""
    return mixed_BHNK.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Multi-head self-attention with the parameter names of `torch.nn.MultiheadAttention`.

    OpenAI's and open_clip's weights have the same names (`in_proj_weight`, `in_proj_bias`, `out_proj`) and load
    without renaming.
    """

    def __init__(
        self, width: int, heads: int, *, backend: AttentionBackend = "auto", causal: bool = False
    ) -> None:
        """Create the projections; the tower initializes them.

        Args:
            width: token width D.
            heads: number of heads; divides `width`.
            backend: attention kernel; causal attention has one kernel only.
            causal: whether a token sees only itself and the tokens before it.

        Raises:
            UserError: when the width does not divide into the heads.
        """
        super().__init__()
        check_heads(width, heads)
        self.heads, self.backend, self.causal = heads, backend, causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Mix the tokens of each clip: float (B, N, D) -> (B, N, D)."""
        qkv_BNX = functional.linear(x_BND, self.in_proj_weight, self.in_proj_bias)
        q_BHNK, k_BHNK, v_BHNK = split_heads(qkv_BNX, self.heads)
        if self.causal:
            mixed_BHNK = attend_causally(q_BHNK, k_BHNK, v_BHNK)
        else:
            mixed_BHNK = attend(q_BHNK, k_BHNK, v_BHNK, self.backend)
        projected: Tensor = self.out_proj(join_heads(mixed_BHNK))
        return projected


class FusedAttention(nn.Module):
    """Multi-head self-attention with the parameter names of timm and VideoMAE, `qkv` and `proj`."""

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
