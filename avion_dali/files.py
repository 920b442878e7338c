"""Files that are whole or absent, whatever interrupts their writing.

A file is written under a temporary name in its own folder, flushed to the disk, and only then given its name.
Readers, and a machine that comes back from a power cut, find the old content or the new one, never a part.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from avion_dali.contracts import UserError

PARTIAL_PATTERN = ".*.partial"
"""Glob pattern of unfinished files; nothing reads them, and what a killed process left may be deleted."""


def partial_path(path: Path) -> Path:
    """Return the temporary name of a file; it is fixed, so that a killed process leaves at most one.

    Args:
        path: the file.
    """
    return path.with_name(f".{path.name}.partial")


def put_in_place(partial: Path, path: Path) -> None:
    """Give a finished file its name, so that the file and its name survive a power cut.

    Args:
        partial: the finished and closed file, on the same file system as `path`.
        path: its name; a file of that name is replaced, and processes that have it open keep reading it.

    Raises:
        OSError: the disk is full, or permission is missing; a file of that name is unchanged.
    """
    _flush(partial)
    os.replace(partial, path)
    with suppress(OSError):  # some systems cannot open folders
        _flush(path.parent)


@contextmanager
def whole_or_absent(path: Path) -> Iterator[Path]:
    """Write a file under a temporary name, which becomes its own when the block ends without an error.

    Args:
        path: the file; its folder exists.

    Yields:
        Where to write; the file must be closed when the block ends.

    Raises:
        OSError: the file could not be put in place; an older one is unchanged.
    """
    partial = partial_path(path)
    try:
        yield partial
        put_in_place(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink()


def atomic_write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file of a run so that it is whole or absent.

    Args:
        path: the file; its folder is made when missing.
        write: called with the open file.

    Raises:
        UserError: the file could not be written (full disk, no permission); an older file is intact.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_or_absent(path) as partial, open(partial, "wb") as file:
            write(file)
    except (OSError, RuntimeError) as error:
        cause = _os_error_behind(error)
        if cause is None and isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error  # torch's writer raises its own error over Ctrl-C
        if cause is None:
            raise
        kept = "the older file is intact" if path.exists() else "no file was left there"
        raise UserError(
            f"{path} could not be written: {cause.strerror or cause}; {kept}. Free space or choose another "
            "folder (a training: output_dir), then start again"
        ) from error


def atomic_write_text(path: Path, text: str) -> None:
    """Write a text file of a run, in UTF-8, so that it is whole or absent; see `atomic_write`.

    Args:
        path: the file; its folder is made when missing.
        text: the content.

    Raises:
        UserError: the file could not be written; an older file is intact.
    """
    atomic_write(path, lambda file: file.write(text.encode()))


def _flush(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _os_error_behind(error: BaseException) -> OSError | None:
    """Return the operating system's error behind this one; torch wraps it in a RuntimeError about offsets."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause
