"""Shared memory that the system does not let CUDA pin is copied all the same; `test_gpu` tests the copies."""

import types

import pytest
import torch

from avion_dali.loading.frames_strategy import _pin


@pytest.mark.parametrize("code", [0, 801])
def test_memory_that_cannot_be_pinned_is_told(
    code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []
    cudart = types.SimpleNamespace(cudaHostRegister=lambda *what: asked.append(what) or code)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    memory = torch.zeros(4096, dtype=torch.uint8)
    assert _pin(memory, torch.device("cpu")) == (code == 0)
    assert asked == [(memory.data_ptr(), 4096, 0)]
    assert ("cannot be pinned (cudaHostRegister: code 801)" in caplog.text) == (code != 0)
