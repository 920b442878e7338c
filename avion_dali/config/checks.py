"""Checks the values of a configuration."""

from __future__ import annotations

import numbers

from avion_dali.contracts import UserError


def require(condition: bool, key: str, *, value: object, allowed: str) -> None:
    """Raise an error unless a value is allowed.

    Args:
        condition: whether the value is allowed.
        key: full name of the setting, such as `optim.epochs`; or only its last part between backticks, which a
            command replaces by its own key or option.
        value: value of the setting.
        allowed: description of the allowed values.

    Raises:
        UserError: names the key, its value and the allowed values.
    """
    if not condition:
        raise UserError(f"{key} = {value!r} is not allowed; it must be {allowed}")


def require_integer(value: object, key: str, *, least: int, below: int = 1 << 63) -> None:
    """Raise an error unless a value is a whole number in [least, below); NumPy's are allowed.

    Args:
        value: value of the setting.
        key: name of the setting, as for `require`.
        least: smallest allowed number.
        below: smallest number that is too large.

    Raises:
        UserError: names the key, its value and the allowed values.
    """
    fits = isinstance(value, numbers.Integral) and not isinstance(value, bool) and least <= int(value) < below
    at_most = f" and < {below}" if below < 1 << 63 else ""
    require(fits, key, value=value, allowed=f"a whole number >= {least}{at_most}")
