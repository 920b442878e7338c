"""The precision of a run, and the handling of overflows in fp16."""

from __future__ import annotations

from typing import Literal

import torch

from avion_dali.contracts import UserError

Precision = Literal["fp32", "bf16", "fp16"]
AUTOCAST_DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


MAX_OVERFLOWS = 50
"""Consecutive overflowing steps that end an fp16 run. Each halves the loss scale, which is 1 after 16 steps."""


def resolve_precision(name: Literal["auto", "fp32", "bf16", "fp16"], device: torch.device) -> Precision:
    """Choose the precision of a run.

    Args:
        name: value of the option; `auto` uses bf16 on GPUs with native bf16, fp16 on older GPUs and fp32 on the
            CPU.
        device: device of the model.

    Returns:
        The precision to use.

    Raises:
        UserError: fp16 is requested on the CPU.
    """
    if name == "fp16" and device.type != "cuda":
        raise UserError(
            f"run.precision = 'fp16' needs a GPU, but this run uses {device}; set it to fp32 or bf16"
        )
    if name != "auto":
        return name
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Return a new autocast context, because its cache of cast weights is valid for one forward pass only."""
    return torch.autocast(
        device.type, dtype=AUTOCAST_DTYPES[precision], enabled=precision != "fp32", cache_enabled=True
    )


def gradient_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler:
    """Return a gradient scaler for fp16, and one that does nothing for the other precisions."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


class OverflowCount:
    """Counts consecutive overflows of fp16 gradients on the device, and tolerates a limited number."""

    def __init__(self) -> None:
        self._in_a_row: torch.Tensor | None = None

    def watched_norm(self, grad_norm: torch.Tensor) -> torch.Tensor:
        """Return the gradient norm for `FiniteGuard`, or 0 until `MAX_OVERFLOWS` consecutive overflows.

        Args:
            grad_norm: () tensor, the norm before the scaler decides about the step.
        """
        is_broken = ~torch.isfinite(grad_norm)
        before = torch.zeros_like(grad_norm) if self._in_a_row is None else self._in_a_row
        self._in_a_row = (before + 1) * is_broken
        return torch.where(self._in_a_row >= MAX_OVERFLOWS, grad_norm, torch.zeros_like(grad_norm))
