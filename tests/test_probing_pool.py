"""Processes that read many files: one that dies is reported, and none outlives the command."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import odd_tasks
import pytest
from processes import left_after

from avion_dali.contracts import UserError
from avion_dali.data.probing_pool import map_in_processes

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import odd_tasks
from avion_dali.data.probing_pool import map_in_processes
if __name__ == "__main__":
    list(map_in_processes(odd_tasks.sleep_and_tell, ["a", "b"], jobs=2, lost=None))
"""


def lost(item: object, reason: str) -> str:
    return f"{item}: {reason}"


def test_results_come_in_order() -> None:
    found = map_in_processes(partial(odd_tasks.joined, "a"), range(40), jobs=2, lost=lost)
    assert list(found) == [f"'a' {number}" for number in range(40)]


def test_an_item_that_crashes_or_hangs_is_lost_alone(tmp_path: Path) -> None:
    segv, status = map_in_processes(odd_tasks.die, [int(signal.SIGSEGV), 0], jobs=1, lost=lost)
    assert segv == "11: crashed the process that read it (SIGSEGV)" and status is None
    (late,) = map_in_processes(
        odd_tasks.sleep_and_tell, [str(tmp_path / "p")], jobs=1, lost=lost, timeout_s=0.5
    )
    assert late.endswith("no answer within 0.5 s")


def test_a_process_killed_from_outside_is_one_error() -> None:
    with pytest.raises(UserError, match="killed from outside"):
        list(map_in_processes(odd_tasks.die, [int(signal.SIGKILL)], jobs=1, lost=lost))


def test_processes_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    (tmp_path / "script.py").write_text(SCRIPT)
    parent = subprocess.Popen(
        [sys.executable, "script.py"], cwd=tmp_path, env=environment, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not ((tmp_path / "a").exists() and (tmp_path / "b").exists()) and time.monotonic() < deadline:
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    assert left_after(5, parent.pid) == []
