"""Formats names and errors for messages."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import islice


def few(names: Collection[object], limit: int = 5) -> str:
    """Join the first names of a collection and give the number of the others: "a, b, c and 4 more".

    Args:
        names: any objects, shown by `str` in this order.
        limit: largest number of names shown.
    """
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(str, islice(names, limit))) + more


def few_lines(lines: Sequence[str], limit: int = 20) -> list[str]:
    """Indent the first lines of a list for the console; a last line gives the number of the others.

    Args:
        lines: the lines.
        limit: largest number of lines shown.
    """
    more = [f"  and {len(lines) - limit} more"] if len(lines) > limit else []
    return [f"  {line}" for line in lines[:limit]] + more


def first_line(error: BaseException, limit: int = 160) -> str:
    """Return the first line of an error's message, because some libraries append pages of advice.

    Args:
        error: the error.
        limit: largest number of characters.
    """
    return str(error).strip().partition("\n")[0][:limit]
