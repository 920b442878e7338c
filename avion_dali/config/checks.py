"""Checks the values of a configuration."""

from __future__ import annotations

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
