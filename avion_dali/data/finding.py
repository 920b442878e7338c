"""Find the videos of folders, and say which files were passed over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from avion_dali.contracts import UserError
from avion_dali.data.scanning import VIDEO_SUFFIXES, files_below

_SHOWN = 5


def find_videos(paths: Sequence[Path], *, but_not: Path) -> tuple[list[Path], list[Path]]:
    """Replace folders by the video files inside them, sorted; each file once, linked folders included.

    Args:
        paths: files and folders.
        but_not: a folder whose files are no sources: the chunks.

    Returns:
        The videos, and the files of the folders that are not taken for videos.

    Raises:
        UserError: when a folder holds no video.
    """
    videos: list[Path] = []
    passed_over: list[Path] = []
    for path in paths:
        if not path.is_dir():
            videos.append(path)
            continue
        inside = sorted(file for file in files_below(path) if but_not.absolute() not in file.absolute().parents)
        inside = [file for file in inside if not file.name.startswith(".")]  # what systems keep for themselves
        found = [file for file in inside if file.suffix.lower() in VIDEO_SUFFIXES]
        if not found:
            kinds = ", ".join(sorted(VIDEO_SUFFIXES))
            raise UserError(
                f"{path} holds no video ({kinds}); name the files themselves if their endings differ"
            )
        videos += found
        passed_over += [file for file in inside if file.suffix.lower() not in VIDEO_SUFFIXES]
    return list(dict.fromkeys(videos)), passed_over


def readable(name: str) -> str:
    """Return a file's name with bytes that are no text written as escapes.

    Args:
        name: as the operating system gives it.
    """
    return name.encode(errors="backslashreplace").decode()


def describe_passed_over(files: Sequence[Path]) -> str:
    """Return what is said of files that were passed over.

    Args:
        files: at least one.
    """
    kinds = Counter(file.suffix or "no ending" for file in files).most_common(_SHOWN)
    counts = ", ".join(f"{count} {suffix}" for suffix, count in kinds)
    names = ", ".join(readable(file.name) for file in files[:_SHOWN])
    more = f" and {len(files) - _SHOWN} more" if len(files) > _SHOWN else ""
    subject = "1 file is" if len(files) == 1 else f"{len(files)} files are"
    return f"{subject} passed over ({counts}): {names}{more}; name those that are videos"
