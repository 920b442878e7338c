"""`avion-dali check`: finds bad chunks before a training. Workers import this module, so it imports little."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from avion_dali.contracts import UserError
from avion_dali.wording import printable

if TYPE_CHECKING:
    from avion_dali.inspection.checking import CheckReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("path", type=Path, help="chunk folder, or manifest folder")
    parser.add_argument("--deep", action="store_true", help="decode every frame, check every byte")
    parser.add_argument("--jobs", default=0, type=int, help="processes (default: one per core)")
    parser.add_argument(
        "--timeout", default=0.0, type=float, help="seconds per file (default 120; 600 with --deep)"
    )
    parser.add_argument("--output", type=Path, help="folder for findings and progress (default ./check-<name>)")
    parser.add_argument(
        "--repair-manifest", action="store_true", help="remove the clips of bad chunks from the manifest"
    )


def run(options: argparse.Namespace) -> int:
    """Check, print a table, and repair if requested; status 1 if there are errors, even if repaired."""
    from tqdm import tqdm

    from avion_dali.inspection.checking import FINDINGS_FILE, CheckSettings, check_chunks, is_manifest

    if options.repair_manifest and not is_manifest(options.path):
        raise UserError(f"{options.path} is not a manifest; --repair-manifest needs one")
    output = options.output or Path(f"check-{options.path.resolve().name}")
    settings = CheckSettings(options.deep, options.jobs, options.timeout)
    with tqdm(unit="file", desc="checking") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = check_chunks(options.path, output, settings=settings, on_progress=show)
    print(printable("\n".join(summary(report, options.path))))
    print(f"all findings: {output / FINDINGS_FILE}")
    if options.repair_manifest:
        repair(options.path, report)
    return 1 if report.bad_chunks else 0


def summary(report: CheckReport, path: Path) -> list[str]:
    """Return the lines of a table with the kind, number, an example and the remedy of findings."""
    from avion_dali.inspection.findings import KINDS

    kept = f" ({report.num_kept} of them unchanged since an earlier check)" if report.num_kept else ""
    lines = [f"{path}: {report.num_files} files checked{kept}, {len(report.bad_chunks)} with errors"]
    for kind, tally in report.tallies.items():
        lines.append(f"{KINDS[kind].severity:<8} {kind:<14} {tally.count:>8}  {tally.example}: {tally.detail}")
        lines.append(f"{'':<33}what to do: {KINDS[kind].advice}")
    return lines


def repair(manifest: Path, report: CheckReport) -> None:
    """Remove the clips of bad chunks from a manifest, and print how to undo it."""
    from avion_dali.inspection.repair import BAD_CHUNKS_FILE, repair_manifest
    from avion_dali.locks import folder_lock

    with folder_lock(manifest, "repairing a manifest"):
        done = repair_manifest(manifest, report.bad_chunks)
    print(f"{manifest}: {done.removed} clips removed, {done.num_samples} left")
    if done.undo:
        print(f"bad chunks: {manifest / BAD_CHUNKS_FILE}\nto undo: {done.undo}")
