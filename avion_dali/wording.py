"""Formats names and errors for messages."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Collection, Sequence
from itertools import islice

# Control characters, which terminals obey, marks that turn the direction of writing, and halves of characters.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxlong = 3, 60, 60


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


def shown(value: object, limit: int = 60) -> str:
    """Return how a value of a file is written in a message, whatever it is: short, and in little time.

    Args:
        value: anything; lists in lists are cut.
        limit: characters at most.
    """
    try:
        text = _SHORT.repr(value)
    except ValueError:  # Python refuses to write whole numbers of thousands of digits
        text = f"a number of {type(value).__name__} with thousands of digits"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def printable(text: str) -> str:
    """Return a text in which nothing but lines and tabs acts on a terminal or a page; the rest is escaped.

    Args:
        text: of any origin: captions and file names may hold terminal escapes, or be no valid Unicode.
    """
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
