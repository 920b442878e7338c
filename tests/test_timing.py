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


class Gpu:
    """A GPU and the host that queues its work, both with the clock that the test winds."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.busy_until, self.waits = clock, 0.0, 0

    def work(self, seconds: float) -> None:
        self.busy_until = max(self.busy_until, self.clock.now) + seconds

    def event(self, enable_timing: bool) -> GpuEvent:
        assert enable_timing
        return GpuEvent(self)


class GpuEvent:
    """What `torch.cuda.Event` does."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def record(self) -> None:
        self.at = max(self.gpu.busy_until, self.gpu.clock.now)

    def query(self) -> bool:
        return self.at <= self.gpu.clock.now

    def synchronize(self) -> None:
        self.gpu.waits += not self.query()
        self.gpu.clock.now = max(self.gpu.clock.now, self.at)

    def elapsed_time(self, last: GpuEvent) -> float:
        assert self.query() and last.query()
        return 1e3 * (last.at - self.at)


@pytest.fixture
def gpu(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu(clock)
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2**21)
    return gpu


def train(gpu: Gpu, timer: StepTimer, *, steps: int, host_s: float, gpu_s: float, micro: int = 1) -> None:
    """A host that is at most one step ahead, as `FiniteGuard` keeps it, and waits `host_s` for each batch."""
    before = None
    for _ in range(steps):
        for _ in range(micro):
            with timer.waiting():
                gpu.clock.now += host_s
            gpu.work(gpu_s)
        timer.step_done(clips=8 * micro)
        if before is not None:
            before.synchronize()
        before = gpu.event(enable_timing=True)
        before.record()


def test_the_gpu_is_idle_only_where_the_host_is_too_late(gpu):
    timer = StepTimer(torch.device("cuda"))
    train(gpu, timer, steps=10, host_s=0.5, gpu_s=1.0)
    first = timer.window()
    # Only the first batch came late; the host waited for data half of the time, and the GPU did not notice.
    assert first.steps == 9 and first.data_wait_share == pytest.approx(4.5 / 9.5)
    assert first.gpu_idle_share == pytest.approx(0.5 / 9.5) and first.memory_mb == 2
    train(gpu, timer, steps=10, host_s=0.5, gpu_s=1.0)
    second = timer.window()
    assert (second.step_s, second.clips_per_s) == (pytest.approx(1.0), pytest.approx(8.0))
    assert second.gpu_idle_share == pytest.approx(0.0) and second.data_wait_share == pytest.approx(0.5)
    train(gpu, timer, steps=30, host_s=1.5, gpu_s=1.0)
    late = timer.window()
    assert late.gpu_idle_share == pytest.approx(1 / 3, abs=0.02)
    assert late.step_s == pytest.approx(1.5, abs=0.05)


def test_waits_between_the_micro_batches_of_a_step_count_as_well(gpu):
    timer = StepTimer(torch.device("cuda"))
    train(gpu, timer, steps=20, host_s=1.0, gpu_s=0.5, micro=4)
    timer.window()
    train(gpu, timer, steps=20, host_s=1.0, gpu_s=0.5, micro=4)
    assert timer.window().gpu_idle_share == pytest.approx(0.5)


def test_a_window_never_waits_for_the_gpu_unless_it_has_not_finished_a_step(gpu):
    timer = StepTimer(torch.device("cuda"))
    with timer.waiting():
        gpu.clock.now += 1
    gpu.work(5.0)
    timer.step_done(clips=8)
    assert timer.window().step_s == pytest.approx(6.0) and gpu.waits == 1
    train(gpu, timer, steps=10, host_s=0.1, gpu_s=1.0)
    waits = gpu.waits
    assert timer.window().steps == 9 and gpu.waits == waits
    assert timer.window().steps == 1 and gpu.waits == waits + 1


def test_an_evaluation_is_no_idle_time_and_steps_before_it_count(gpu):
    timer = StepTimer(torch.device("cuda"))
    train(gpu, timer, steps=5, host_s=0.1, gpu_s=1.0)
    with timer.excluded():
        gpu.work(50.0)  # queued behind the last step
        gpu.clock.now = gpu.busy_until + 7.0  # and afterwards the host writes a file
    train(gpu, timer, steps=6, host_s=0.1, gpu_s=1.0)
    window = timer.window()
    assert window.steps == 10 and window.step_s == pytest.approx((5.1 + 5.1) / 10)
    assert window.gpu_idle_share == pytest.approx(0.2 / 10.2)  # the first batch, and the first one afterwards


def test_there_is_no_idle_share_on_the_cpu(clock):
    timer = StepTimer(torch.device("cpu"))
    clock.now += 1
    timer.step_done(clips=1)
    assert timer.window().gpu_idle_share is None


def test_memory_is_in_mebibytes_and_grows_with_use():
    before = peak_memory_mb(torch.device("cpu"))
    # A process with torch loaded is between 50 MiB and 50 GiB: guards the unit.
    assert 50 < before < 50 * 1024
    block = torch.ones(80 * 2**20 // 4)
    assert peak_memory_mb(torch.device("cpu")) >= before
    del block
