"""Parts of the GPU suite that run the repository's tests marked `gpu`."""

from __future__ import annotations

import collections
import os
from typing import Any

from benchmarks.gpu.parts import NotRunError, Record, Suite
from benchmarks.machine import ROOT


class TestLog:
    """A plugin of pytest that records failures as they come, and counts outcomes."""

    def __init__(self, record: Record) -> None:
        self.record, self.outcomes = record, collections.Counter[str]()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.outcome] += 1
        if report.outcome == "failed":
            lines = [line for line in report.longreprtext.splitlines() if line.startswith("E ")]
            self.record(
                {"measured": "test", "test": report.nodeid, "failure": (lines or [report.when])[0][:300]}
            )


def run_tests(suite: Suite, record: Record, files: tuple[str, ...], chosen: str = "test") -> None:
    """Run the tests of some files that are marked `gpu`, one file after the other, in this process."""
    try:
        import pytest
    except ImportError as error:
        raise NotRunError("pytest is not installed") from error
    if suite.device == "cuda":
        os.environ["AVION_REQUIRE_CUDA"] = "1"
    for name in files:
        log = TestLog(record)
        options = ["-v", "-rs", "-m", "gpu", "-k", chosen, "-p", "no:cacheprovider", f"{ROOT}/tests/{name}.py"]
        pytest.main(options, [log])
        record({"measured": "tests", "file": name, **log.outcomes})


def tests_of_models(suite: Suite, record: Record) -> None:
    """NCCL, shards, attention, steps: what needs neither DALI nor a compiler."""
    run_tests(suite, record, ("test_torch_on_gpu", "test_gpu", "test_attention", "test_energy"), "not compile")


def tests_of_compilation(suite: Suite, record: Record) -> None:
    """What compiles, which takes longest."""
    run_tests(suite, record, ("test_gpu", "test_torch_on_gpu"), "compile")


def tests_of_dali(suite: Suite, record: Record) -> None:
    """What decodes with DALI."""
    files = ("test_graph", "test_damage_on_gpu", "test_dali_loader", "test_support", "test_env")
    run_tests(suite, record, files)
