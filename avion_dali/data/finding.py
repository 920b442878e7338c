"""Finds the videos in folders, and describes which files were skipped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from avion_dali.contracts import UserError
from avion_dali.data.scanning import VIDEO_SUFFIXES, files_below

_SHOWN = 5


def find_videos(paths: Sequence[Path], *, but_not: Path) -> tuple[list[Path], list[Path]]:
    """Replace folders by their video files, sorted; each file occurs once, linked folders are included.

    Args:
        paths: files and folders.
        but_not: a folder whose files are not sources, such as the output folder of the chunks.

    Returns:
        The videos, and the other files in the folders.

    Raises:
        UserError: when a folder contains no video.
    """
    videos: list[Path] = []
    passed_over: list[Path] = []
    for path in paths:
        if not path.is_dir():
            videos.append(path)
            continue
        inside = sorted(file for file in files_below(path) if but_not.absolute() not in file.absolute().parents)
        inside = [file for file in inside if not file.name.startswith(".")]  # files of operating systems
        found = [file for file in inside if file.suffix.lower() in VIDEO_SUFFIXES]
        if not found:
            kinds = ", ".join(sorted(VIDEO_SUFFIXES))
            raise UserError(
                f"{path} contains no video ({kinds}); name the files themselves if their extensions differ"
            )
        videos += found
        passed_over += [file for file in inside if file.suffix.lower() not in VIDEO_SUFFIXES]
    return list(dict.fromkeys(videos)), passed_over


def readable(name: str) -> str:
    """Return a file name in which undecodable bytes are written as escapes.

    Args:
        name: the name as given by the operating system.
    """
    return name.encode(errors="backslashreplace").decode()


def describe_passed_over(files: Sequence[Path]) -> str:
    """Return a message about files that were skipped.

    Args:
        files: at least one file.
    """
    kinds = Counter(file.suffix or "no extension" for file in files).most_common(_SHOWN)
    counts = ", ".join(f"{count} {suffix}" for suffix, count in kinds)
    names = ", ".join(readable(file.name) for file in files[:_SHOWN])
    more = f" and {len(files) - _SHOWN} more" if len(files) > _SHOWN else ""
    subject = "1 file is" if len(files) == 1 else f"{len(files)} files are"
    return f"{subject} skipped ({counts}): {names}{more}; name those that are videos"
