"""`avion-dali chunk`: cut videos into chunks made for random access."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from avion_dali.contracts import UserError
from avion_dali.data.profiles import PROFILES
from avion_dali.locks import folder_lock
from avion_dali.wording import printable

VIDEO_ENDINGS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options.

    Args:
        parser: of the subcommand.
    """
    parser.add_argument("videos", nargs="+", type=Path, help="video files, or folders of them")
    parser.add_argument("--output", required=True, type=Path, help="chunk folder; finished chunks are kept")
    parser.add_argument("--profile", default="balanced", choices=tuple(PROFILES), help="default: balanced")
    parser.add_argument("--chunk-seconds", default=15, type=int, help="length of a chunk (default 15)")
    parser.add_argument("--short-side", default=288, type=int, help="pixels, never upscaled (default 288)")
    parser.add_argument("--jobs", default=0, type=int, help="videos at a time (default: one per core)")
    parser.add_argument("--root", type=Path, help="keep the videos' folders below this one")


def run(options: argparse.Namespace) -> int:
    """Cut videos into chunks; status 1 when a video failed.

    Args:
        options: parsed arguments.
    """
    from avion_dali.data.chunking import ChunkSettings, chunk_videos

    settings = ChunkSettings(options.profile, options.chunk_seconds, options.short_side)
    videos = list_videos(options.videos, but_not=options.output)
    with folder_lock(options.output, "cutting videos"):
        report = chunk_videos(videos, options.output, settings=settings, root=options.root, jobs=options.jobs)
    for video in report.failed:
        print(printable(f"failed: {video.video}: {video.failed}"), file=sys.stderr)
    done = len(report.videos) - len(report.failed)
    print(f"{done} of {len(report.videos)} videos done: {report.made} chunks made, {report.kept} kept")
    return 1 if report.failed else 0


def list_videos(paths: list[Path], *, but_not: Path) -> list[Path]:
    """Replace folders by the video files inside them, sorted; each file once.

    Args:
        paths: files and folders.
        but_not: a folder whose files are not sources: the chunks.

    Raises:
        UserError: when a folder holds no video.
    """
    videos: list[Path] = []
    for path in paths:
        if not path.is_dir():
            videos.append(path)
            continue
        found = (p for p in path.rglob("*") if p.suffix.lower() in VIDEO_ENDINGS and p.is_file())
        inside = sorted(p for p in found if but_not.absolute() not in p.absolute().parents)
        if not inside:
            raise UserError(f"{path} holds no video ({', '.join(VIDEO_ENDINGS)})")
        videos += inside
    return list(dict.fromkeys(videos))
