"""Files that are whole or absent: written beside, flushed, then renamed into place."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from avion_dali.contracts import UserError


def temporary(path: Path) -> Path:
    """Where a file is written before it is renamed; one fixed name, so a killed run leaves at most one."""
    return path.with_name(f".{path.name}.partial")


def _flush_folder(folder: Path) -> None:
    """Make a rename in this folder survive a power cut, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # some systems cannot open folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _os_error_behind(error: BaseException) -> OSError | None:
    """The operating system's error that caused this one; torch wraps it in a RuntimeError about offsets."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause


def atomic_write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that readers and crashes see the old content or the new, never a part.

    Args:
        path: the file; its folder is made when missing.
        write: called with the open file.

    Raises:
        UserError: the file could not be written (full disk, no permission); an older file is untouched.
    """
    partial = temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _flush_folder(path.parent)
    except (OSError, RuntimeError) as error:
        cause = _os_error_behind(error)
        if cause is None and isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error  # torch's writer puts its own complaint over Ctrl-C
        if cause is None:
            raise
        kept = "the older file is intact" if path.exists() else "no file was left there"
        raise UserError(
            f"{path} could not be written: {cause.strerror or cause}; {kept}. Free space or choose another "
            "output_dir, then resume"
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink()
