"""Opens annotation files as UTF-8 text, with errors that name the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from avion_dali.contracts import UserError


@contextmanager
def opened_text(path: Path) -> Iterator[TextIO]:
    """Open a text file, with or without a byte order mark; line endings are kept, as `csv` requires.

    Args:
        path: the file.

    Raises:
        UserError: when the file cannot be read or is not UTF-8, on opening or while the block reads it.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(f"{path} cannot be read: byte 0x{byte:02x} is not UTF-8; save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
