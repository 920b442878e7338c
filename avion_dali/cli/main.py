"""The command `avion-dali`: everything around training. Light: its workers re-import this module."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from avion_dali.cli import check, env, features, manifest, plan, weights
from avion_dali.cli.arguments import run_command
from avion_dali.data.profiles import PROFILES

_DESCRIPTION = (
    "Everything around training: chunks, manifests, checks, plans, weights and embeddings. Training and "
    "evaluation are `python -m train.pretrain`, `train.finetune` and `train.evaluate`."
)


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: arguments; None takes the process's.
    """
    options = build_parser().parse_args(argv)
    commands = {
        "chunk": chunk,
        "manifest": manifest.run,
        "check": check.run,
        "plan": plan.run,
        "weights": weights.run,
        "features": features.run,
        "env": env.run,
        "demo": demo,
    }
    return commands[options.command](options)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all subcommands."""
    parser = argparse.ArgumentParser(prog="avion-dali", description=_DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_chunk(commands.add_parser("chunk", help="cut videos into chunks made for random access"))
    manifest.add_arguments(commands.add_parser("manifest", help="make a manifest from chunks and annotations"))
    check.add_arguments(commands.add_parser("check", help="find chunks that are damaged or decode wrongly"))
    plan.add_arguments(commands.add_parser("plan", help="predict clips/s here, and say what binds"))
    weights.add_arguments(commands.add_parser("weights", help="say what weights are, and convert them"))
    features.add_arguments(commands.add_parser("features", help="write embeddings of videos or of a manifest"))
    env.add_arguments(commands.add_parser("env", help="say what works on this machine, and why not"))
    demo_parser = commands.add_parser("demo", help="train and evaluate on procedural videos, with a report")
    demo_parser.add_argument("--output-dir", default="runs/demo", help="folder of the run")
    decoder_help = "how clips are decoded; dali makes VP9 chunks, which it decodes without a GPU, too"
    demo_parser.add_argument("--decoder", default="cpu-fused", help=decoder_help)
    return parser


def _add_chunk(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("videos", nargs="+", type=Path, help="video files, or folders of them")
    parser.add_argument("--output", required=True, type=Path, help="chunk folder; finished chunks are kept")
    parser.add_argument("--profile", default="balanced", choices=tuple(PROFILES), help="default: balanced")
    parser.add_argument("--chunk-seconds", default=15, type=int, help="length of a chunk (default 15)")
    parser.add_argument("--short-side", default=288, type=int, help="pixels, never upscaled (default 288)")
    parser.add_argument("--max-fps", default=0, type=int, help="most frames a second (default: as the video)")
    parser.add_argument("--jobs", default=0, type=int, help="videos at a time (default: one per core)")
    parser.add_argument("--root", type=Path, help="keep the videos' folders below this one")


def chunk(options: argparse.Namespace) -> int:
    """Cut videos into chunks; status 1 when a video failed.

    Args:
        options: parsed arguments.
    """
    from avion_dali.data.chunking import ChunkSettings, chunk_videos
    from avion_dali.data.finding import describe_passed_over, find_videos

    settings = ChunkSettings(options.profile, options.chunk_seconds, options.short_side, options.max_fps)
    videos, passed_over = find_videos(options.videos, but_not=options.output)
    if passed_over:
        print(describe_passed_over(passed_over), file=sys.stderr)
    report = chunk_videos(videos, options.output, settings=settings, root=options.root, jobs=options.jobs)
    for video in report.videos:
        for note in video.notes:
            print(f"note: {video.video}: {note}", file=sys.stderr)
    for video in report.failed:
        print(f"failed: {video.video}: {video.failed}", file=sys.stderr)
    done = len(report.videos) - len(report.failed)
    print(f"{done} of {len(report.videos)} videos done: {report.made} chunks made, {report.kept} kept")
    return 1 if report.failed else 0


def demo(options: argparse.Namespace) -> int:
    """Run the demo.

    Args:
        options: parsed arguments.
    """
    from avion_dali.cli.demo import main as demo_main

    return demo_main(["--output-dir", options.output_dir, "--decoder", options.decoder])


def console() -> None:
    """Entry point of the installed command."""
    run_command(main)


if __name__ == "__main__":
    console()
