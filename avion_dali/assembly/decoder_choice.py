"""Chooses the decoder of a run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import torch

from avion_dali.assembly.dali_room import pipelines_module
from avion_dali.contracts import UserError
from avion_dali.decode.decoders import CPU_DECODERS

INSTEAD: Final = "`decoder` cpu-fused delivers the same clips on CPU cores"


@dataclass(frozen=True)
class DecoderChoice:
    """The decoder of a run.

    Args:
        name: name of the decoder, never `auto`.
        reason: why this decoder was chosen.
    """

    name: str
    reason: str


def decoder_names() -> tuple[str, ...]:
    """Return all values of the option `decoder`."""
    return ("auto", "dali", *CPU_DECODERS)


def require_decoder(decoder: str, *, choices: Iterable[str]) -> None:
    """Refuse what is not the name of a decoder.

    Args:
        decoder: value of the option.
        choices: names to suggest.

    Raises:
        UserError: when there is no such decoder.
    """
    if decoder not in decoder_names():
        raise UserError(f"`decoder` = {decoder!r} is not a decoder; choose one of {', '.join(choices)}")


def choose_decoder(decoder: str, device: torch.device) -> DecoderChoice:
    """Choose the decoder; `auto` selects `dali` if NVDEC works and `cpu-fused` otherwise.

    Args:
        decoder: value of the option.
        device: device of the model.

    Raises:
        UserError: when there is no such decoder, or it cannot run here.
    """
    require_decoder(decoder, choices=decoder_names())
    if decoder == "auto":
        return DecoderChoice(*pipelines_module("support").auto_decoder(_nvdec_problem(device)))
    if decoder == "dali":
        problem = _nvdec_problem(device) if device.type == "cuda" else _import_problem()
        if problem:
            raise UserError(f"`decoder` dali does not work here: {problem}; {INSTEAD}")
    return DecoderChoice(decoder, "asked for")


def _nvdec_problem(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "the model runs on the CPU"
    index = torch.cuda.current_device() if device.index is None else device.index
    problem: str | None = pipelines_module("support").nvdec_problem(index)
    return problem


def _import_problem() -> str | None:
    """Import the modules that `decoder` dali needs on a CPU; return why that failed, or None."""
    try:
        pipelines_module("dali_strategy")
    except (ImportError, OSError) as error:
        problem: str = pipelines_module("support").dali_problem() or str(error)
        return problem
    return None
