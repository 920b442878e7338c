"""How a configuration says that a value is not allowed."""

from __future__ import annotations

from avion_dali.contracts import UserError


def require(condition: bool, key: str, value: object, allowed: str) -> None:
    """Raise unless a condition holds.

    Args:
        condition: whether the value is allowed.
        key: the setting's full name, such as `optim.epochs`; or its name alone between backticks, which a
            command replaces by its own key or option.
        value: what it was set to.
        allowed: what it may be, in words.

    Raises:
        UserError: naming the key, its value and what is allowed.
    """
    if not condition:
        raise UserError(f"{key} = {value!r} is not allowed; it must be {allowed}")
