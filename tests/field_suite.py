"""All tests of users' videos, a line for each kind: python tests/field_suite.py (make field)."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


class Summary:
    """Counts the inputs of each kind, which is a test function, by their outcome."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Counter[str]] = {}
        self.seconds: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add one phase of one input."""
        path, _, name = report.nodeid.rpartition("::")
        kind = f"{Path(path).stem.removeprefix('test_field_')}: {name.partition('[')[0][5:].replace('_', ' ')}"
        self.seconds[kind] += report.duration
        if report.when == "call" or report.outcome != "passed":
            self.outcomes.setdefault(kind, Counter())[report.outcome] += 1

    def lines(self) -> list[str]:
        """A line for each kind, and their sum."""
        total: Counter[str] = sum(self.outcomes.values(), Counter())
        rows = [*self.outcomes.items(), (f"{len(self.outcomes)} kinds", total)]
        seconds = self.seconds | {rows[-1][0]: sum(self.seconds.values())}
        told = {
            kind: ", ".join(f"{count} {outcome}" for outcome, count in found.items()) for kind, found in rows
        }
        return [f"{told[kind]:<24} {seconds[kind]:6.1f} s  {kind}" for kind in told]


if __name__ == "__main__":
    summary = Summary()
    modules = sorted(map(str, FOLDER.glob("test_field_*.py")))
    options = ["-q", "-p", "no:cacheprovider", "--no-header", "--numprocesses", "auto", "--maxprocesses", "4"]
    status = pytest.main([*options, *modules, *sys.argv[1:]], plugins=[summary])
    sys.stdout.write("\n".join(summary.lines()) + "\n")
    sys.exit(status)
