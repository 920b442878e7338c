"""Reads safetensors files; those of this project describe their weights in the metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open
from torch import Tensor

from avion_dali.contracts import UserError

HEADER_KEY: Final = "avion_dali"
"""Key of the metadata under which safetensors files of this project describe themselves, as JSON."""


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a safetensors file of this project or another.

    Args:
        path: the file.

    Returns:
        Name to tensor, and this project's header; the header is empty in files of other projects.

    Raises:
        UserError: the file is missing or damaged.
    """
    if not path.is_file():
        raise UserError(f"there is no weights file at {path}; check the path")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(HEADER_KEY, "{}"))
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({error}); obtain it again") from error
    if not isinstance(header, dict):
        raise UserError(f"{path}: its header is damaged; obtain it again")
    return state, header
