"""Atomic file writing: after an interruption a file has its old content or its new content, never a part.

A file is written under a temporary name in the same folder, flushed to disk, and then renamed. This holds for
concurrent readers and after a power failure.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from avion_dali.contracts import UserError

PARTIAL_PATTERN = ".*.partial"
"""Glob pattern of unfinished files. Nothing reads them; those left by a killed process may be deleted."""


def partial_path(path: Path) -> Path:
    """Return the temporary name of a file; it is fixed, so a killed process leaves at most one such file.

    Args:
        path: the file.
    """
    return path.with_name(f".{path.name}.partial")


def put_in_place(partial: Path, path: Path) -> None:
    """Rename a finished file, so that its content and its name survive a power failure.

    Args:
        partial: the finished and closed file, on the same file system as `path`.
        path: its final name. An existing file is replaced; processes that have it open keep reading it.

    Raises:
        OSError: the disk is full, or permission is missing; an existing file is unchanged.
    """
    _flush(partial)
    os.replace(partial, path)
    with suppress(OSError):  # some systems cannot open folders
        _flush(path.parent)


@contextmanager
def whole_or_absent(path: Path) -> Iterator[Path]:
    """Write a file under a temporary name and rename it when the block ends without an error.

    Args:
        path: the file; its folder must exist.

    Yields:
        The path to write to; the file must be closed when the block ends.

    Raises:
        OSError: the file could not be renamed; an existing file is unchanged.
    """
    partial = partial_path(path)
    try:
        yield partial
        put_in_place(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink()


def atomic_write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a binary file atomically.

    Args:
        path: the file; its folder is created if missing.
        write: called with the open file.

    Raises:
        UserError: the file could not be written (full disk, no permission); an existing file is unchanged.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_or_absent(path) as partial, open(partial, "wb") as file:
            write(file)
    except (OSError, RuntimeError) as error:
        cause = _os_error_behind(error)
        if cause is None and isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error  # torch's writer replaces Ctrl-C by an error of its own
        if cause is None:
            raise
        kept = "the existing file is unchanged" if path.exists() else "no file was created"
        raise UserError(
            f"{path} could not be written: {cause.strerror or cause}; {kept}. Free disk space or choose "
            "another folder (output_dir of a training), then start again"
        ) from error


def atomic_write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically; see `atomic_write`.

    Args:
        path: the file; its folder is created if missing.
        text: the content.

    Raises:
        UserError: the file could not be written; an existing file is unchanged.
    """
    atomic_write(path, lambda file: file.write(text.encode()))


def _flush(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _os_error_behind(error: BaseException) -> OSError | None:
    """Return the `OSError` that caused an error; torch wraps it in a `RuntimeError` about file offsets."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause
