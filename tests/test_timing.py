"""Step timing with a clock that the test winds."""

from __future__ import annotations

import pytest
import torch

from avion_dali.engine import timing as module
from avion_dali.engine.timing import StepTimer, peak_memory_mb


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_window_gives_means_rates_and_the_share_of_waiting(clock):
    timer = StepTimer(torch.device("cpu"))
    for _ in range(4):
        with timer.waiting():
            clock.now += 0.5
        clock.now += 1.5
        timer.step_done(clips=16)
    window = timer.window()
    assert window.steps == 4
    assert (window.step_s, window.data_wait_s, window.data_wait_share) == (2.0, 0.5, 0.25)
    assert window.clips_per_s == 8.0


def test_windows_do_not_leak_into_each_other_and_skip_excluded_time(clock):
    timer = StepTimer(torch.device("cpu"))
    clock.now += 7
    timer.step_done(clips=1)
    timer.window()
    with timer.excluded():
        clock.now += 1000
    clock.now += 2
    timer.step_done(clips=4)
    window = timer.window()
    assert (window.steps, window.step_s, window.clips_per_s, window.data_wait_s) == (1, 2.0, 2.0, 0.0)


def test_waiting_counts_also_when_the_loader_raises(clock):
    timer = StepTimer(torch.device("cpu"))
    with pytest.raises(StopIteration), timer.waiting():
        clock.now += 3
        raise StopIteration
    timer.step_done(clips=0)
    assert timer.window().data_wait_s == 3.0


def test_empty_window_is_zero_not_an_error(clock):
    window = StepTimer(torch.device("cpu")).window()
    assert (window.steps, window.clips_per_s, window.data_wait_share) == (0, 0.0, 0.0)


def test_the_device_is_waited_for_once_per_window(monkeypatch):
    waits = []
    monkeypatch.setattr(module, "synchronize", waits.append)
    timer = StepTimer(torch.device("cpu"))
    for _ in range(10):
        with timer.waiting():
            pass
        timer.step_done(clips=1)
    assert waits == []
    timer.window()
    assert waits == [torch.device("cpu")]


def test_memory_is_in_mebibytes_and_grows_with_use():
    before = peak_memory_mb(torch.device("cpu"))
    # A process with torch loaded is between 50 MiB and 50 GiB: guards the unit.
    assert 50 < before < 50 * 1024
    block = torch.ones(80 * 2**20 // 4)
    assert peak_memory_mb(torch.device("cpu")) >= before
    del block
