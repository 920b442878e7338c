"""The number format that a device computes in, and the handling of overflows under fp16."""

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
"""Overflowing steps in a row that end an fp16 run: each halves the loss scale, which is 1 after 16 of them."""


def resolve_precision(name: Literal["auto", "fp32", "bf16", "fp16"], device: torch.device) -> Precision:
    """Pick the precision of a run.

    Args:
        name: what the user asked for; `auto` takes bf16 on GPUs with native bf16, fp16 on older ones and
            fp32 on the CPU.
        device: where the model computes.

    Returns:
        The precision to use.

    Raises:
        UserError: fp16 asked for on the CPU, which has no gradient scaler worth using.
    """
    if name == "fp16" and device.type != "cuda":
        raise UserError(f"run.precision = 'fp16' needs a GPU, this run computes on {device}; use fp32 or bf16")
    if name != "auto":
        return name
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Return a new autocast context: its cache of cast weights must not outlive one forward pass."""
    return torch.autocast(
        device.type, dtype=AUTOCAST_DTYPES[precision], enabled=precision != "fp32", cache_enabled=True
    )


def gradient_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler:
    """Return a loss scaler for fp16, and for the other precisions one that does nothing."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


class OverflowCount:
    """Allows overflows of fp16 gradients until too many follow each other; the count stays on the device."""

    def __init__(self) -> None:
        self._in_a_row: torch.Tensor | None = None

    def watched_norm(self, grad_norm: torch.Tensor) -> torch.Tensor:
        """Return the gradient norm for `FiniteGuard`: 0 as long as few overflows follow each other.

        Args:
            grad_norm: (), before the scaler decides on the step.
        """
        is_broken = ~torch.isfinite(grad_norm)
        before = torch.zeros_like(grad_norm) if self._in_a_row is None else self._in_a_row
        self._in_a_row = (before + 1) * is_broken
        return torch.where(self._in_a_row >= MAX_OVERFLOWS, grad_norm, torch.zeros_like(grad_norm))
