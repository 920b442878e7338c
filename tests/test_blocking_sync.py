"""Threads that wait for the GPU sleep: what is asked of the driver, and what is said where it cannot be."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from avion_dali.assembly import blocking_sync
from avion_dali.assembly.blocking_sync import apply_blocking_sync, use_blocking_sync
from avion_dali.config import DaliConfig


class FakeCuda:
    """The functions of libcuda, which note their calls; GPU `n` is the driver's device `10 + n`."""

    def __init__(self, *, fails: str = "", active: bool = False) -> None:
        self.fails, self.active, self.calls = fails, active, []

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            if name == "cuDeviceGet":
                arguments[0]._obj.value = 10 + arguments[1]
            if name == "cuDevicePrimaryCtxGetState":
                arguments[2]._obj.value = int(self.active)
            self.calls.append(name)
            if name == "cuDevicePrimaryCtxSetFlags_v2":
                self.calls.append((arguments[0].value, arguments[1]))
            return 100 if name == self.fails else 0

        return call


def fake(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda | None) -> None:
    def load(name: str) -> FakeCuda:
        assert name == "libcuda.so.1"
        if cuda is None:
            raise OSError("cannot open shared object file")
        return cuda

    monkeypatch.setattr(blocking_sync.ctypes, "CDLL", load)


def test_the_flag_is_set_on_the_ranks_own_gpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake(monkeypatch, cuda := FakeCuda())
    monkeypatch.setenv("LOCAL_RANK", "2")
    apply_blocking_sync(DaliConfig())
    assert cuda.calls == []
    apply_blocking_sync(DaliConfig(blocking_sync=True))
    assert cuda.calls[0] == "cuInit"
    assert cuda.calls[-2:] == ["cuDevicePrimaryCtxSetFlags_v2", (12, 4)]
    assert not caplog.records


@pytest.mark.parametrize(
    ("cuda", "problem"),
    [
        (None, "no NVIDIA driver"),
        (FakeCuda(fails="cuInit"), "cuInit failed with code 100"),
        (FakeCuda(active=True), "CUDA is already in use"),
    ],
)
def test_what_prevents_it_is_one_line(
    cuda: FakeCuda | None, problem: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake(monkeypatch, cuda)
    assert problem in str(use_blocking_sync(0))
    apply_blocking_sync(DaliConfig(blocking_sync=True))
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith(f"dali.blocking_sync has no effect: {problem}")
    assert cuda is None or "cuDevicePrimaryCtxSetFlags_v2" not in cuda.calls


def test_the_commands_that_use_a_gpu_apply_it_before_cuda_starts() -> None:
    """In the source, since a test has no CUDA to start: before the session chooses the rank's GPU."""
    folder = Path(blocking_sync.__file__).parents[1] / "cli"
    for command in ("pretrain", "evaluate"):
        text = (folder / f"{command}.py").read_text()
        assert 0 < text.index("apply_blocking_sync(config.dali)") < text.index("distributed_session() as")
