"""One living process per output folder.

The lock is the kernel's (`flock`), which ends with the process that holds it, however that process ends. The
lock file says who holds it, for the message that others get.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from avion_dali.contracts import UserError

LOCK_FILE = ".lock"
_log = logging.getLogger(__name__)
# What file systems answer that have no locks; NFS does so without its lock service.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def folder_lock(folder: str | Path, purpose: str) -> Iterator[None]:
    """Hold a folder, so that no other process writes to it.

    On NFS the lock holds among all machines where the server offers locks; where it does not, this is logged.

    Args:
        folder: made when missing.
        purpose: what this process does there, such as `training`.

    Yields:
        Nothing.

    Raises:
        UserError: when another process holds it, which is named, or the folder cannot be written to.
    """
    folder = Path(folder)
    descriptor = _open(folder)
    try:
        _acquire(folder, descriptor, purpose=purpose)
        _write_holder(descriptor, {"host": socket.gethostname(), "pid": os.getpid(), "purpose": purpose})
        try:
            yield
        finally:
            _write_holder(descriptor, {})
    finally:
        os.close(descriptor)


def _open(folder: Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written to ({error.strerror}); choose another output folder"
        ) from error


def _acquire(folder: Path, descriptor: int, *, purpose: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{folder} is in use: {_described(_read_holder(descriptor))}; wait until it has ended, or choose "
            "another output folder"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise UserError(f"{folder} cannot be locked ({error.strerror})") from error
        _log.warning(
            "%s: its file system has no locks (%s); do not start a second %s there", folder, error, purpose
        )
        return
    before = _read_holder(descriptor)
    if before and before.get("host") != socket.gethostname():
        # Over a network, a lock that is held elsewhere may not be seen here.
        _log.warning(
            "%s was last used %s, which did not end properly; if it still runs, end this one",
            folder,
            _described(before),
        )


def _read_holder(descriptor: int) -> dict[str, object]:
    """Return who holds the lock; nothing where nobody does, or it cannot be read."""
    with suppress(OSError, ValueError):
        holder = json.loads(os.pread(descriptor, 4096, 0))
        if isinstance(holder, dict):
            return holder
    return {}


def _write_holder(descriptor: int, holder: dict[str, object]) -> None:
    with suppress(OSError):  # on a full disk the lock holds all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode() if holder else b"", 0)


def _described(holder: dict[str, object]) -> str:
    if not holder:
        return "by another process"
    return f"by process {holder.get('pid')} on {holder.get('host')} ({holder.get('purpose')})"
