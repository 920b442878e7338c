"""Finds the DALI modules.

In a checkout they are the package `pipelines` next to the library; in an installed wheel they are
`avion_dali.pipelines`, so that the wheel adds only one top-level package.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

_CHECKOUT = Path(__file__).resolve().parents[2]


def pipelines_module(name: str) -> ModuleType:
    """Import a DALI module under its name in this installation.

    In a checkout, the folder of the checkout is searched first, so that a package called `pipelines` in the
    user's folder is not imported instead. Decode processes inherit the search path.

    Args:
        name: module name without its package, such as `support`.

    Raises:
        ImportError: the module needs a package that is not installed, such as DALI.
    """
    if not (_CHECKOUT / "pipelines" / "mini_clip.py").is_file():
        return importlib.import_module(f"avion_dali.pipelines.{name}")
    if sys.path[:1] != [str(_CHECKOUT)] and "pipelines" not in sys.modules:
        sys.path.insert(0, str(_CHECKOUT))
    return importlib.import_module(f"pipelines.{name}")
