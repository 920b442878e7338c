"""The format of all results in `benchmarks/results/<name>.json`, with their tables and pictures.

Imports stay light: spawned processes whose memory is measured import the benchmark's module again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from avion_dali.files import atomic_write_text
from benchmarks.machine import ROOT, git_commit, machine_facts, versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = ROOT / "benchmarks" / "results"
PICTURES = ROOT / "docs"

Row = dict[str, Any]
Rows = list[Row]


@dataclass(frozen=True)
class Benchmark:
    """Name, requirements and presentation of a result."""

    name: str  # of `results/<name>.json` and `docs/<name>.png`
    tables: Callable[[Rows], str]  # makes Markdown of the rows
    draw: Callable[[Rows], Figure] | None = None  # makes a picture of the rows
    # What the rows are compared with: a target, or another program's numbers.
    requirement: Row = field(default_factory=dict)

    def run(self, options: argparse.Namespace, measure: Callable[[], Rows]) -> None:
        """Measure and write the result, or read the existing one; then print tables and draw the picture.

        Args:
            options: of a parser made by `parser_of`.
            measure: returns the rows; every row has a key `measured`, and units are in the keys.
        """
        if options.report:
            rows = read_rows(self.name)
        else:
            machine = machine_facts()
            rows = rounded(measure())
            print(write_result(self, rows, machine=machine, folder=options.results))
        print("\n".join([self.tables(rows), *skipped_lines(rows)]))
        if self.draw:
            path = (options.results or PICTURES) / f"{self.name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            self.draw(rows).savefig(path, dpi=80)
            print(path)


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A command line that can show a result without measuring."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="measure nothing: show the result that is there")
    parser.add_argument(
        "--results", type=Path, metavar="FOLDER", help="write there, not where results are kept"
    )
    return parser


def write_result(
    benchmark: Benchmark, rows: Rows, *, machine: dict[str, Any], folder: Path | None = None
) -> Path:
    """Write a result atomically.

    Args:
        benchmark: whose.
        rows: what was measured.
        machine: `machine_facts()` from before the measurement.
        folder: write there instead of into `RESULTS`.

    Returns:
        The file.

    Raises:
        ValueError: a row does not say what was measured.
    """
    if not all("measured" in row for row in rows):
        raise ValueError(f"{benchmark.name}: a row has no key `measured`")
    spec = sys.modules["__main__"].__spec__
    module = spec.name.removesuffix(".__main__") if spec else "benchmarks"
    result = {
        "benchmark": benchmark.name,
        "command": " ".join(["python", "-m", module, *sys.argv[1:]]),
        "machine": machine,
        "versions": versions(),
        "commit": git_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "baseline": benchmark.requirement,
        "picture": f"{PICTURES.name}/{benchmark.name}.png" if benchmark.draw else None,
        "rows": rows,
    }
    path = (folder or RESULTS) / f"{benchmark.name}.json"
    atomic_write_text(path, json.dumps(result, indent=2) + "\n")
    return path


def read_rows(name: str) -> Rows:
    """Return the rows of a result; empty if it does not exist."""
    path = RESULTS / f"{name}.json"
    rows: Rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return rows


@contextmanager
def working_folder(folder: Path | None) -> Iterator[Path]:
    """The given folder, or a temporary one that is removed afterwards."""
    if folder:
        yield folder
        return
    with TemporaryDirectory() as scratch:
        yield Path(scratch)


def select(rows: Iterable[Row], measured: str, **wanted: object) -> Rows:
    """Rows of one kind with these values."""
    return [
        row
        for row in rows
        if row["measured"] == measured and all(row.get(name) == value for name, value in wanted.items())
    ]


def names(rows: Iterable[Row], column: str) -> list[Any]:
    """The different values of a column, in order."""
    return list(dict.fromkeys(row[column] for row in rows))


def rounded(value: Any) -> Any:
    """The same rows with five significant digits."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def markdown(heads: Sequence[object], lines: Iterable[Sequence[object]]) -> str:
    """A table; None is shown as a dash."""
    cells = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join("-" if c is None else str(c) for c in line) + " |" for line in cells)


def every_row(rows: Rows) -> str:
    """A table for each kind of row, with all its columns; for results without a table of their own."""
    tables = []
    for measured in names(rows, "measured"):
        own = select(rows, measured)
        columns = [name for name in dict.fromkeys(n for row in own for n in row) if name != "measured"]
        if measured != "skipped":
            tables.append(
                f"{measured}\n\n" + markdown(columns, ([row.get(name) for name in columns] for row in own))
            )
    return "\n\n".join(tables)


def skipped_lines(rows: Rows) -> list[str]:
    """Lines that say what was not measured, and why."""
    return [f"skipped: {row['what']} ({row['reason']})" for row in select(rows, "skipped")]
