"""Plain values of a file compared with the types of a dataclass, before anything is built from them."""

from __future__ import annotations

import dataclasses
import math
import numbers
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from avion_dali.config.checks import require
from avion_dali.contracts import UserError
from avion_dali.wording import shown

_LIMITS = {"num_frames": 4096, "frame_size": 8192}
_OTHER_LIMIT = 1 << 20


def require_sane_counts(values: Mapping[str, Any]) -> None:
    """Require that no number of a model or a clip asks for more memory than any machine has.

    Args:
        values: numbers by the name of a setting, among other values.

    Raises:
        UserError: naming the first that does.
    """
    for key, value in values.items():
        limit = _LIMITS.get(key, _OTHER_LIMIT)
        if isinstance(value, int | float) and not 0 <= value <= limit:
            raise UserError(f"{key} is {shown(value)}, which is not in [0, {limit}]")


def require_types(kind: Any, values: object, *, name: str) -> None:
    """Require that values have the types of a dataclass's fields; names that it does not have are passed over.

    Args:
        kind: the dataclass; fields that are dataclasses are sections.
        values: what a file says, such as the content of a JSON object.
        name: what `values` are called in a message.

    Raises:
        UserError: naming the first value that has another type.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{name} is {shown(values)}, which is no set of named values")
    hints = typing.get_type_hints(kind)
    for key, value in values.items():
        if key not in hints:
            continue
        if dataclasses.is_dataclass(hints[key]):
            require_types(hints[key], value, name=f"{name}.{key}")
        elif not _fits(value, hints[key]):
            raise UserError(f"{name}.{key} is {shown(value)}, which is not allowed there")


_NAMED: dict[Any, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a finite number",
    str: "a string",
    tuple[float, float]: "two finite numbers",
}


def require_field_types(options: Any) -> None:
    """Require that the values of a dataclass instance have the types of its fields; literals are not checked.

    Args:
        options: the instance; whole numbers and numbers may also be NumPy's.

    Raises:
        UserError: naming the first field that has another type.
    """
    for key, hint in typing.get_type_hints(type(options)).items():
        value = getattr(options, key)
        if hint in _NAMED:
            require(_fits(value, hint), f"`{key}`", value=value, allowed=_NAMED[hint])


def _fits(value: object, hint: Any) -> bool:
    """Tell whether a plain value has a type; files hold lists for tuples and whole numbers for floats."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return isinstance(value, int | str) and value in arguments
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is tuple:
        return isinstance(value, list | tuple) and _fit_each(value, arguments)
    if isinstance(origin, type):
        return isinstance(value, origin)
    if hint is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and _is_finite(value)
    if hint is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool) and abs(int(value)) < 1 << 63
    return isinstance(value, hint) if isinstance(hint, type) else True


def _fit_each(values: Sequence[object], hints: tuple[Any, ...]) -> bool:
    kinds = hints[:1] * len(values) if Ellipsis in hints else hints
    return len(values) == len(kinds) and all(map(_fits, values, kinds))


def _is_finite(value: numbers.Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
