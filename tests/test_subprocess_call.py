"""Calls in a fresh interpreter: what crashes, hangs or prints there does no harm and becomes one line."""

import os
import signal
import subprocess
from pathlib import Path

import odd_tasks
import pytest

from avion_dali import subprocess_call
from avion_dali.subprocess_call import call_in_subprocess, import_modules


def test_a_call_returns_what_the_task_returns() -> None:
    assert call_in_subprocess(odd_tasks.joined, 'it\'s "quoted"', 3) == """'it\\'s "quoted"' 3"""
    assert call_in_subprocess(import_modules, "json", "email.message") is None


def test_a_task_that_hangs_is_killed(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    assert call_in_subprocess(odd_tasks.sleep_and_tell, str(told), timeout_s=2) == "no answer within 2 s"
    if told.exists():  # not where the machine is so busy that the task had not begun
        with pytest.raises(ProcessLookupError):
            os.kill(int(told.read_text()), 0)


def test_a_task_that_fails_is_described_in_a_line() -> None:
    assert call_in_subprocess(odd_tasks.die, int(signal.SIGSEGV)) == "its process was killed by SIGSEGV"
    assert call_in_subprocess(odd_tasks.fail, "broken\nin two lines") == "in two lines"
    assert call_in_subprocess(odd_tasks.fail, "no such thing") == "ValueError: no such thing"
    assert call_in_subprocess(odd_tasks.leave, 3) == "its process ended with status 3"


def test_output_of_libraries_is_not_shown_except_for_the_cause() -> None:
    assert call_in_subprocess(odd_tasks.chatter, "no decoder") == "no decoder (The hardware is on strike.)"
    assert not call_in_subprocess(odd_tasks.chatter, "")


def test_a_process_that_cannot_be_killed_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told, kill = tmp_path / "told", subprocess.Popen.kill
    stuck: list[subprocess.Popen] = []
    monkeypatch.setattr(subprocess.Popen, "kill", lambda process: stuck.append(process))
    monkeypatch.setattr(subprocess_call, "_KILL_S", 0.1)
    assert call_in_subprocess(odd_tasks.sleep_and_tell, str(told), timeout_s=0.1) == "no answer within 0 s"
    (process,) = stuck
    assert process.poll() is None
    kill(process)
    process.communicate()
