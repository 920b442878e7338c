"""Builds manifests of videos without annotations: each file is one chunk, optionally cut into equal spans."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from avion_dali.contracts import DecodeError
from avion_dali.data.chunking import ChunkSettings, chunk_video
from avion_dali.data.manifest import Chunk
from avion_dali.data.probe import is_turned
from avion_dali.datasets.building import (
    AnnotationRow,
    BuildReport,
    BuildSettings,
    ManifestBuild,
    RejectedRow,
    manifest_build,
)

UPRIGHT_FOLDER = "upright"
_ONE_PIECE_S = 1_000_000  # longer than any video


def build_plain_manifest(
    settings: BuildSettings, videos: Sequence[Path], *, clip_seconds: float = 0.0
) -> BuildReport:
    """Build a manifest of whole video files.

    Decoders do not rotate pictures. For videos with a display rotation, upright copies are stored next to the
    manifest.

    Args:
        settings: how the manifest is built; `chunk_root` is a folder that contains all videos.
        videos: the files.
        clip_seconds: length of each span, of which the last one of a video may be shorter; 0 uses each video as
            one span.

    Returns:
        Counts of the rows that were included and rejected.

    Raises:
        UserError: when files are unusable and `skip_bad_rows` is False.
    """
    root = settings.chunk_root.resolve()
    named = sorted((path.resolve().relative_to(root).as_posix(), path.resolve()) for path in videos)
    files = [(name, 0.0, _upright(path, settings.output / UPRIGHT_FOLDER / name)) for name, path in named]
    with manifest_build(settings, files) as build:
        rows = _rows([path for _, _, path in files], build, clip_seconds)
        return build.finish(build.place(rows), source="videos without annotations")


def _upright(path: Path, folder: Path) -> Path:
    """Return the file; if it has a display rotation, an upright copy of it in one chunk."""
    try:
        if not is_turned(path):
            return path
    except DecodeError:
        return path  # reported with its reason when it is probed
    report = chunk_video(path, folder, ChunkSettings("compat", chunk_seconds=_ONE_PIECE_S))
    return path if report.failed else folder / "0.mp4"


def _rows(
    paths: Sequence[Path], build: ManifestBuild, clip_seconds: float
) -> Iterator[AnnotationRow | RejectedRow]:
    usable = {chunk.ref.path: chunk for chunk in build.chunks}
    for number, path in enumerate(paths, start=1):
        chunk = usable.get(str(path))
        if chunk is None:
            yield RejectedRow(number, str(path), build.unusable_reason(path), "unusable file")
            continue
        for start, end in _spans(chunk, clip_seconds):
            yield AnnotationRow(number, chunk.video, start, end)


def _spans(chunk: Chunk, clip_seconds: float) -> list[tuple[float, float | None]]:
    if clip_seconds <= 0:
        return [(0.0, None)]
    starts = np.arange(0.0, chunk.end_s, clip_seconds).tolist()
    return [(start, min(start + clip_seconds, chunk.end_s)) for start in starts]
