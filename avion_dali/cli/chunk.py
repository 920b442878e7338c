"""`avion-dali chunk`: cuts videos into chunks encoded for random access."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from avion_dali.data.profiles import PROFILES
from avion_dali.locks import folder_lock
from avion_dali.wording import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options.

    Args:
        parser: parser of the subcommand.
    """
    parser.add_argument("videos", nargs="+", type=Path, help="video files, or folders of them")
    parser.add_argument("--output", required=True, type=Path, help="chunk folder; finished chunks are kept")
    parser.add_argument("--profile", default="balanced", choices=tuple(PROFILES), help="default: balanced")
    parser.add_argument("--chunk-seconds", default=15, type=int, help="length of a chunk (default 15)")
    parser.add_argument("--short-side", default=288, type=int, help="pixels, never upscaled (default 288)")
    parser.add_argument(
        "--max-fps", default=0, type=int, help="largest frames per second (default: as the video)"
    )
    parser.add_argument(
        "--jobs", default=0, type=int, help="videos processed in parallel (default: one per core)"
    )
    parser.add_argument("--root", type=Path, help="keep the folder structure of videos below this folder")


def run(options: argparse.Namespace) -> int:
    """Cut videos into chunks; status 1 if a video failed.

    Args:
        options: parsed arguments.
    """
    from avion_dali.data.chunking import ChunkSettings, chunk_videos
    from avion_dali.data.finding import describe_passed_over, find_videos

    settings = ChunkSettings(options.profile, options.chunk_seconds, options.short_side, options.max_fps)
    videos, passed_over = find_videos(options.videos, but_not=options.output)
    if passed_over:
        print(describe_passed_over(passed_over), file=sys.stderr)
    with folder_lock(options.output, "cutting videos"):
        report = chunk_videos(videos, options.output, settings=settings, root=options.root, jobs=options.jobs)
    for video in report.videos:
        for note in video.notes:
            print(f"note: {video.video}: {note}", file=sys.stderr)
    for video in report.failed:
        print(printable(f"failed: {video.video}: {video.failed}"), file=sys.stderr)
    done = len(report.videos) - len(report.failed)
    print(f"{done} of {len(report.videos)} videos done: {report.made} chunks made, {report.kept} kept")
    return 1 if report.failed else 0
