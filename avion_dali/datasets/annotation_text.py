"""Opening annotation files: text in UTF-8, and errors that name the file once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from avion_dali.contracts import UserError


@contextmanager
def opened_text(path: Path) -> Iterator[TextIO]:
    """Open a text file, with or without a byte order mark; line ends stay as they are, as `csv` needs them.

    Args:
        path: the file.

    Raises:
        UserError: when it cannot be read or is not UTF-8, here or while it is read in the block.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(f"{path} cannot be read: byte 0x{byte:02x} is not UTF-8; save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
