"""Reads lists of videos with class numbers, as for Kinetics: `path frames label` or `path label`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from avion_dali.contracts import UserError
from avion_dali.data.classes import ClassTable
from avion_dali.data.scanning import CHUNK_SUFFIXES, ChunkFile
from avion_dali.datasets.annotation_text import opened_text
from avion_dali.datasets.building import (
    AnnotationRow,
    BuildReport,
    BuildSettings,
    ManifestBuild,
    RejectedRow,
    manifest_build,
)

# Extensions that are tried for names without one; the published lists refer to mp4 files.
_ENDINGS = (".mp4", *sorted(CHUNK_SUFFIXES - {".mp4"}), ".MP4")


@dataclass(frozen=True, slots=True)
class ListedVideo:
    """One line of a list.

    Args:
        line: line number, from 1.
        path: path of the video, as given in the list.
        label: class number, or -1.
    """

    line: int
    path: str
    label: int


def build_kinetics_manifest(
    settings: BuildSettings, annotations: Path, *, whole_files: bool, class_names: Path | None = None
) -> BuildReport:
    """Build a manifest of whole videos and their class numbers.

    Args:
        settings: how the manifest is built; `chunk_root` is the folder of the videos, or of their chunks.
        annotations: the list.
        whole_files: True if each listed path is a video file, which becomes one chunk; False if it is the name
            of a video in a chunk folder.
        class_names: text file with one class name per line, in label order; by default, classes are named by
            their numbers, up to the largest number in the list.

    Returns:
        Counts of the rows that were included and rejected.

    Raises:
        UserError: when a file cannot be read, or rows are unusable and `skip_bad_rows` is False.
    """
    names = read_class_names(class_names) if class_names is not None else None
    listed, source = list(read_list(annotations)), str(annotations)
    labels = [video.label for video in listed if isinstance(video, ListedVideo)]
    classes = _classes(names, labels)
    rows = list(_classified(listed, len(classes.names) if classes else 0))
    if not whole_files:
        with manifest_build(settings) as build:
            placed = build.place(map(_whole_video, rows), source=source)
            return build.finish(placed, source=source, classes=classes)
    root = settings.chunk_root.resolve()
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; --videos must name the folder that contains the listed paths")
    found = {row.line: _find_file(root, row.path) for row in rows if isinstance(row, ListedVideo)}
    files = sorted({_chunk_file(root, path) for path in found.values() if path is not None})
    with manifest_build(settings, files) as build:
        filed = (_whole_file(row, found.get(row.line), root=root, build=build) for row in rows)
        placed = build.place(filed, source=source)
        return build.finish(placed, source=source, classes=classes)


def read_list(path: Path) -> Iterator[ListedVideo | RejectedRow]:
    """Yield the lines of a list; fields are separated by spaces, a tab or a comma; paths may contain spaces.

    In lines of three fields, the middle one is a frame count, which is ignored: frames are counted when a
    video is probed. A label of -1 means no label. Repeated paths are rejected.

    Args:
        path: the list.

    Raises:
        UserError: when the list cannot be read or is empty.
    """
    lines_of: dict[str, int] = {}
    for line, text in enumerate(_lines(path), start=1):
        if not text.strip():
            continue
        row = _listed_video(line, text.strip())
        if isinstance(row, ListedVideo) and row.path in lines_of:
            reason = f"already occurs in line {lines_of[row.path]}"
            row = RejectedRow(line, row.path, reason, "duplicate")
        elif isinstance(row, ListedVideo):
            lines_of[row.path] = line
        yield row
    if not lines_of:
        raise UserError(f"{path} has no line `path label` or `path frames label`")


def read_class_names(path: Path) -> tuple[str, ...]:
    """Return the class names of a text file with one name per line.

    Args:
        path: the file.

    Raises:
        UserError: when the file cannot be read, is empty, or a name is missing or repeated.
    """
    names = [line.strip() for line in _lines(path)]
    while names and not names[-1]:
        names.pop()
    if not names:
        raise UserError(f"{path} has no class names")
    for number, name in enumerate(names, start=1):
        if not name or name in names[: number - 1]:
            raise UserError(f"{path}, line {number}: {f'{name!r} repeats' if name else 'has no class name'}")
    return tuple(names)


def _lines(path: Path) -> list[str]:
    with opened_text(path) as file:
        return file.read().splitlines()


def _listed_video(line: int, text: str) -> ListedVideo | RejectedRow:
    """Parse one line from its end, because only the path may contain separators."""
    separator = "\t" if "\t" in text else "," if _number(text.rpartition(",")[2]) is not None else None
    fields = [field.strip() for field in text.rsplit(separator, 2)]
    numbers = [_number(field) for field in fields[1:]]
    label = numbers[-1] if numbers else None
    if len(fields) == 3 and numbers[0] is None:
        fields = [field.strip() for field in text.rsplit(separator, 1)]
    if label is None or not fields[0]:
        return RejectedRow(line, text[:200], "is neither `path label` nor `path frames label`")
    if label < -1:
        return RejectedRow(line, fields[0], f"label {label} is below -1", "unknown class")
    return ListedVideo(line, fields[0], label)


def _number(text: str) -> int | None:
    digits = text.strip().removeprefix("-")
    return int(text) if digits.isascii() and digits.isdigit() and len(digits) < 10 else None


def _classes(names: tuple[str, ...] | None, labels: Sequence[int]) -> ClassTable | None:
    """Return the classes, or None for an unlabeled list without names."""
    if names is not None:
        return ClassTable(names)
    count = max(labels, default=-1) + 1
    return ClassTable(tuple(str(label) for label in range(count))) if count else None


def _classified(
    listed: Sequence[ListedVideo | RejectedRow], num_classes: int
) -> Iterator[ListedVideo | RejectedRow]:
    for row in listed:
        if isinstance(row, ListedVideo) and row.label >= num_classes:
            reason = f"label {row.label}, but there are {num_classes} class names"
            yield RejectedRow(row.line, row.path, reason, "unknown class")
        else:
            yield row


def _find_file(root: Path, name: str) -> Path | None:
    """Return the file of a listed path; on disk, its extension may be missing from the list or be doubled."""
    exact = os.path.join(root, name)  # an absolute path is unchanged
    found = (exact + ending for ending in ("", *_ENDINGS) if os.path.isfile(exact + ending))
    return next((Path(os.path.normpath(path)) for path in found), None)


def _chunk_file(root: Path, path: Path) -> ChunkFile:
    return _video_name(root, path), 0.0, path


def _video_name(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def _whole_file(
    row: ListedVideo | RejectedRow, path: Path | None, *, root: Path, build: ManifestBuild
) -> AnnotationRow | RejectedRow:
    if isinstance(row, RejectedRow):
        return row
    if path is None:
        reason = "is a folder, not a file; for chunks use --chunks" if os.path.isdir(root / row.path) else ""
        return RejectedRow(row.line, row.path, reason or f"is not a file in {root}", "missing file")
    name = _video_name(root, path)
    if not build.lookup.has(name):
        return RejectedRow(row.line, row.path, build.unusable_reason(path), "unusable file")
    return AnnotationRow(row.line, name, 0.0, None, label=row.label)


def _whole_video(row: ListedVideo | RejectedRow) -> AnnotationRow | RejectedRow:
    if isinstance(row, RejectedRow):
        return row
    return AnnotationRow(row.line, row.path, 0.0, None, label=row.label)
