"""MLPs of wide blocks in fp8: matrix products of 8-bit numbers with one scale per tensor, by torchao.

Inputs and weights are rounded to E4M3 and gradients to E5M2 (Micikevicius et al. 2022, "FP8 Formats for Deep
Learning", arXiv 2209.05433), scaled by their largest absolute value. The weights themselves stay as they are.
"""

from __future__ import annotations

import importlib
from typing import Final

import torch
from torch import nn

from avion_dali.contracts import UserError

LEAST_WIDTH: Final = 1024
"""In narrower MLPs rounding the inputs takes most of the time that the products save."""
LEAST_CAPABILITY: Final = (8, 9)
"""CUDA compute capability of the first GPUs with products in fp8."""


def require_fp8(device: torch.device, *, width: int) -> None:
    """Check that the MLPs of an encoder can be trained in fp8.

    Args:
        device: device of the model.
        width: token width of the encoder.

    Raises:
        UserError: when the encoder is too narrow, the GPU is too old, or torchao is missing.
    """
    if problem := _find_problem(device, width):
        raise UserError(f"model.mlp_dtype = fp8 cannot be used: {problem}; set model.mlp_dtype = default")


def _find_problem(device: torch.device, width: int) -> str | None:
    if width < LEAST_WIDTH:
        return f"the encoder is {width} wide, and fp8 saves time from a width of {LEAST_WIDTH} on"
    if device.type != "cuda":
        return f"it needs a GPU, and the model is on {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        least, found = (".".join(map(str, numbers)) for numbers in (LEAST_CAPABILITY, capability))
        return f"it needs a GPU of compute capability {least} or later (Ada, Hopper), and this one has {found}"
    try:
        importlib.import_module("torchao.float8")
    except ImportError as error:
        return f"torchao.float8 cannot be imported ({error}); pip install torchao"
    return None


def convert_mlps(model: nn.Module, *, emulate: bool = False) -> None:
    """Let the linear maps of wide MLPs compute in fp8, in place; parameters keep their names and values.

    Args:
        model: the model, with its weights loaded or not. It may not be wrapped or sharded yet.
        emulate: round as fp8 does, but multiply in the dtype of the inputs, on any device; for tests.
    """
    float8 = importlib.import_module("torchao.float8")
    # The products of a weight's gradient run over all tokens of a batch, and kernels take multiples of 16.
    config = float8.Float8LinearConfig(emulate=emulate, pad_inner_dim=True)
    float8.convert_to_float8_training(model, module_filter_fn=_is_wide_mlp, config=config)


def _is_wide_mlp(module: nn.Module, name: str) -> bool:
    """Return whether a module is a linear map of an MLP that `build_mlp` made, with wide tokens."""
    in_mlp = "mlp" in name.split(".")
    return in_mlp and isinstance(module, nn.Linear) and min(module.weight.shape) >= LEAST_WIDTH
