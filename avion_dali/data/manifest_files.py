"""The files of a manifest: where they lie, whether they are intact, and how new ones take their place.

All tables of one build lie in a folder of their own, `build-1`, `build-2` and so on; `manifest.json` names each
with checksums of its blocks. A new build is written whole beside the old one, and becomes the manifest when
`manifest.json` is replaced, in one step. Manifests of format 3 have their files beside `manifest.json`, without
checksums.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from avion_dali.contracts import UserError
from avion_dali.files import atomic_write_text

INFO_FILE, INFO_BEFORE_REPAIR = "manifest.json", "manifest.before-repair.json"
_BUILD = re.compile(r"(build|repair)-(\d+)")
_READ_BYTES = 1 << 22

Checksums = Sequence[tuple[int, int]]
"""For each block of a file, from its first byte on: where it ends, and the CRC-32 of its bytes."""


def block_checksums(path: Path, ends: Sequence[int] = ()) -> list[tuple[int, int]]:
    """Return the checksums of a file's blocks.

    Args:
        path: the file.
        ends: where each block but the last ends, ascending; by default the file is one block.
    """
    size, found, start = path.stat().st_size, list[tuple[int, int]](), 0
    with path.open("rb") as file:
        for end in [*(end for end in ends if end < size), size]:
            checksum, left = 0, end - start
            while left and (data := file.read(min(left, _READ_BYTES))):
                checksum, left = zlib.crc32(data, checksum), left - len(data)
            found.append((end, checksum))
            start = end
    return found


class ManifestFiles:
    """Where the files of an opened manifest lie.

    Args:
        folder: the manifest.
        info: the content of its `manifest.json`.

    Raises:
        UserError: when `manifest.json` names files in a way that is not understood.
    """

    def __init__(self, folder: Path, info: Mapping[str, Any]) -> None:
        self._folder = folder
        try:
            self._paths = {name: str(file["path"]) for name, file in info.get("files", {}).items()}
            self._checksums = {
                name: [(int(end), int(checksum)) for end, checksum in file.get("checksums", ())]
                for name, file in info.get("files", {}).items()
            }
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder / INFO_FILE}: its list of files is damaged; build it again") from error

    def path(self, name: str) -> Path:
        """Return where a file lies.

        Args:
            name: such as `samples.arrow`.
        """
        return self._folder / self._paths.get(name, name)

    def checksums(self, name: str) -> list[tuple[int, int]]:
        """Return the checksums of a file's blocks; none in a manifest of format 3.

        Args:
            name: such as `samples.arrow`.
        """
        return self._checksums.get(name, [])

    def require_size(self, name: str, num_bytes: int) -> None:
        """Require that a file has as many bytes as `manifest.json` says.

        Args:
            name: such as `packets.bin`.
            num_bytes: what `manifest.json` says; a missing file has none.

        Raises:
            UserError: when it has not.
        """
        path = self.path(name)
        if (found := file_size(path)) != num_bytes:
            raise UserError(
                f"{path} has {found} bytes, manifest.json says {num_bytes}; build the manifest again"
            )

    def intact(self, name: str) -> Path:
        """Return where a file lies, after reading all of it.

        Args:
            name: such as `classes.json`.

        Raises:
            UserError: when its bytes are not those that were written.
        """
        path, expected = self.path(name), self.checksums(name)
        if not expected:
            return path
        try:
            found = block_checksums(path, [end for end, _ in expected[:-1]])
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); build the manifest again") from error
        if found != expected:
            raise UserError(f"{path} is damaged: its checksum is not that of the build; build it again")
        return path


def files_of(folder: Path, build: Path, *, ends: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return what `manifest.json` says of the files of a build.

    Args:
        folder: the manifest.
        build: the folder of the finished files.
        ends: where the blocks of a file end, by its name; see `block_checksums`.
    """
    return {
        path.name: {
            "path": path.relative_to(folder).as_posix(),
            "checksums": block_checksums(path, ends.get(path.name, ())),
        }
        for path in sorted(build.iterdir())
    }


@contextmanager
def new_build(folder: Path, kind: str = "build") -> Iterator[Path]:
    """Make a folder for the files of a new build; at the end, builds that no `manifest.json` names are deleted.

    Args:
        folder: the manifest; made when missing.
        kind: `build`, or `repair` for files that replace some of a build.

    Yields:
        The empty folder.

    Raises:
        UserError: when the disk is full, or permission is missing.
    """
    _delete_unnamed(folder)  # of a build that was killed
    numbers = [int(found[2]) for path in folder.glob("*-*") if (found := _BUILD.fullmatch(path.name))]
    build = folder / f"{kind}-{max(numbers, default=0) + 1}"
    build.mkdir(parents=True)
    try:
        yield build
    except OSError as error:
        raise UserError(
            f"{folder} could not be written: {error.strerror or error}; a manifest that was there is intact"
        ) from error
    finally:
        _delete_unnamed(folder)


def replace_info(folder: Path, info: Mapping[str, Any]) -> None:
    """Put a new `manifest.json` in the place of the old one: from here on the folder is the new manifest.

    Args:
        folder: the manifest.
        info: its content.

    Raises:
        UserError: when it cannot be written; the old manifest is intact.
    """
    write_info(folder / INFO_FILE, info)


def write_info(path: Path, info: Mapping[str, Any]) -> None:
    """Write a `manifest.json` under any name.

    Args:
        path: the file.
        info: its content.

    Raises:
        UserError: when it cannot be written.
    """
    atomic_write_text(path, json.dumps(info, indent=2) + "\n")


def _delete_unnamed(folder: Path) -> None:
    """Delete the builds that neither the manifest nor the one before its repair consists of."""
    named: set[str] = set()
    for path in (folder / INFO_FILE, folder / INFO_BEFORE_REPAIR):
        if not path.exists():
            continue
        try:
            files = ManifestFiles(folder, json.loads(path.read_text()))
        except (ValueError, AttributeError, RecursionError, UserError):
            return  # damaged: whatever it named stays
        named |= {Path(relative).parts[0] for relative in files._paths.values()}
    for path in folder.glob("*-*"):
        if _BUILD.fullmatch(path.name) and path.name not in named:
            shutil.rmtree(path, ignore_errors=True)


def tables_fingerprint(chunks: Path, samples: Path) -> int:
    """Return the fingerprint of a manifest with these tables: the CRC-32 of their bytes one after another.

    Args:
        chunks: its `chunks.arrow`.
        samples: its `samples.arrow`.
    """
    checksum = 0
    for path in (chunks, samples):
        with path.open("rb") as file:
            while data := file.read(_READ_BYTES):
                checksum = zlib.crc32(data, checksum)
    return checksum


def file_size(path: Path) -> int:
    """Return the bytes of a file; 0 for one that is missing.

    Args:
        path: the file.
    """
    return path.stat().st_size if path.exists() else 0
