"""The command `avion-dali`. It imports little, since workers import it again and `--help` must be fast."""

from __future__ import annotations

import argparse
import sys

from avion_dali.cli import (
    check,
    chunk,
    demo,
    demo_finetune,
    env,
    evaluate,
    features,
    finetune,
    manifest,
    plan,
    pretrain,
    recipes,
    slurm,
    weights,
)
from avion_dali.cli.arguments import run_command

_DESCRIPTION = (
    "Train video models: from videos to chunks, a manifest, a trained model and its metrics. "
    "On several GPUs, run a subcommand with `torchrun --nproc_per_node=8 -m avion_dali COMMAND ...`."
)
SUBCOMMANDS = {
    "chunk": "cut videos into chunks encoded for random access",
    "manifest": "make a manifest from chunks and annotations",
    "check": "find chunks that are damaged or decode wrongly",
    "plan": "predict the clips per second of this machine, and what limits them",
    "recipes": "list the recipes that --config accepts by name",
    "pretrain": "pre-train on videos with texts, or on videos alone",
    "finetune": "fine-tune for retrieval or recognition",
    "evaluate": "evaluate a checkpoint on a manifest",
    "features": "write embeddings of videos or of a manifest",
    "weights": "describe and convert weights",
    "slurm": "submit a training to SLURM",
    "env": "report what works on this machine, and how to fix what does not",
    "demo": "train and evaluate on procedural videos, with a report",
    "demo-finetune": "fine-tune on the demo's videos, with a control for each result",
}
_WITH_FLAGS = {
    "chunk": chunk,
    "manifest": manifest,
    "check": check,
    "plan": plan,
    "recipes": recipes,
    "features": features,
    "weights": weights,
    "env": env,
}
# Their options are the fields of a configuration, whose parser takes seconds to import.
_WITH_SETTINGS = {
    "pretrain": pretrain.main,
    "finetune": finetune.main,
    "evaluate": evaluate.main,
    "slurm": slurm.main,
    "demo": demo.main,
    "demo-finetune": demo_finetune.main,
}


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: arguments; None uses the arguments of the process.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if arguments and arguments[0] in _WITH_SETTINGS:
        return _WITH_SETTINGS[arguments[0]](arguments[1:])
    options = build_parser().parse_args(arguments)
    return _WITH_FLAGS[options.command].run(options)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all subcommands; subcommands with a configuration are listed without options."""
    parser = argparse.ArgumentParser(prog="avion-dali", description=_DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, line in SUBCOMMANDS.items():
        command = commands.add_parser(name, help=line)
        if name in _WITH_FLAGS:
            _WITH_FLAGS[name].add_arguments(command)
    return parser


def console() -> None:
    """Run the installed command."""
    run_command(main)
