"""Chooses what decodes in a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from avion_dali.contracts import UserError
from avion_dali.decode.table import CPU_DECODERS
from pipelines.support import auto_decoder, cuda_problem, dali_problem, nvdec_problem

INSTEAD: Final = "`decoder` cpu-fused delivers the same clips on CPU cores"


@dataclass(frozen=True)
class DecoderChoice:
    """What decodes in this run.

    Args:
        name: a decoder's name, never `auto`.
        reason: why this one.
    """

    name: str
    reason: str


def decoder_names() -> tuple[str, ...]:
    """Return all values that `decoder` may have."""
    return ("auto", "dali", *CPU_DECODERS)


def choose_decoder(decoder: str, device: torch.device) -> DecoderChoice:
    """Decide what decodes; `auto` takes DALI where NVDEC works, else `cpu-fused`.

    Args:
        decoder: what was asked for.
        device: where the model runs.

    Raises:
        UserError: when it cannot run here.
    """
    if decoder not in decoder_names():
        raise UserError(f"`decoder` = {decoder!r} is not a decoder; choose one of {', '.join(decoder_names())}")
    if decoder == "auto":
        return DecoderChoice(*auto_decoder(_nvdec_problem(device)))
    if decoder == "dali":
        problem = _nvdec_problem(device) if device.type == "cuda" else _import_problem()
        if problem:
            raise UserError(f"`decoder` dali does not work here: {problem}; {INSTEAD}")
    return DecoderChoice(decoder, "asked for")


def _nvdec_problem(device: torch.device) -> str | None:
    if device.type == "cuda":
        return nvdec_problem(torch.cuda.current_device() if device.index is None else device.index)
    return cuda_problem(0) or "the model runs on the CPU"


def _import_problem() -> str | None:
    """Import what `--decoder dali` needs; returns why that failed."""
    try:
        import pipelines.loader  # noqa: F401
    except (ImportError, OSError) as error:
        return dali_problem() or str(error)
    return None
