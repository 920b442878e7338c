"""A GPU on paper: tensors without values whose device is `cuda`, on a machine without one.

Tensors of the CPU stay real, as on a machine with a GPU. An operation with a tensor of both devices fails as it
would there, and so does everything that makes the host wait for the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from avion_dali.engine import loss_guard, train_row

GPU = torch.device("cuda", 0)
aten = torch.ops.aten


class WaitsForGpuError(RuntimeError):
    """The host would wait for the GPU."""


class PaperGpu(FakeTensorMode):
    """While it is active, `cuda` is a device, whose tensors have no values; tensors of the CPU stay real."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.may_wait = False

    def dispatch(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        is_gpu = kwargs.get("device") is not None and torch.device(kwargs["device"]).type in ("cuda", "meta")
        if is_gpu:
            kwargs["device"] = GPU
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not is_gpu and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return func(*args, **kwargs)
        if not self.may_wait and (reason := why_it_waits(func, args, kwargs)):
            raise WaitsForGpuError(f"{func}: {reason}")
        return super().dispatch(func, types, args, kwargs)

    @contextmanager
    def waiting_allowed(self) -> Iterator[None]:
        """Allow what makes the host wait, as before the first step."""
        before, self.may_wait = self.may_wait, True
        try:
            yield
        finally:
            self.may_wait = before

    def to_gpu(self, model: nn.Module) -> nn.Module:
        """Move a model that was built on the device `meta`."""
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    moved = torch.empty_like(parameter, device=GPU)
                    module._parameters[name] = nn.Parameter(moved, requires_grad=parameter.requires_grad)
            for name, buffer in module._buffers.items():
                module._buffers[name] = torch.empty_like(buffer, device=GPU)
        return model


def why_it_waits(func: Any, args: tuple, kwargs: dict) -> str:
    """Why the host waits for the GPU in an operation with a tensor there; empty if it does not."""
    if func in (aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default):
        return "reads a number"
    if func is aten._to_copy.default:
        source, target = args[0].device.type, torch.device(kwargs.get("device") or args[0].device).type
        return _copying(source, target, kwargs.get("non_blocking", False))
    if func is aten.copy_.default:
        return _copying(args[1].device.type, args[0].device.type, any(args[2:]))
    return ""


def _copying(source: str, target: str, non_blocking: bool) -> str:
    if source != target and "cpu" in (source, target) and not (target == "cuda" and non_blocking):
        return f"copies from {source} to {target}"
    return ""


class PaperEvent:
    """A CUDA event that has always happened."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.enable_timing = enable_timing

    def record(self) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...

    def elapsed_time(self, last: PaperEvent) -> float:
        assert self.enable_timing and last.enable_timing
        return 1.0


class PaperCopy:
    """A `HostCopy` of numbers that have no values: ones. It is what may be read in a step."""

    is_immediate = False

    def __init__(self, numbers: Tensor) -> None:
        assert numbers.device == GPU
        self._numbers = torch.ones(numbers.shape, dtype=numbers.dtype)

    def numbers(self) -> Tensor:
        return self._numbers


def _hide_from_autograd(make: Any) -> Any:
    """Let autograd take fake tensors of a GPU for what they are inside, tensors of the device `meta`.

    It would queue work on the GPU's streams otherwise, and there is no GPU.
    """

    def make_subclass(*args: Any, dispatch_device: bool = False, **more: Any) -> Any:
        device = more.get("device_for_backend_keys")
        return make(*args, dispatch_device=dispatch_device and device.type != "cuda", **more)

    return make_subclass


@pytest.fixture(name="gpu")
def paper_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PaperGpu]:
    """An active `PaperGpu`; autocast and the gradient scaler believe in it."""
    if torch.cuda.is_available():
        pytest.skip("there is a real GPU, on which tests/test_gpu.py runs")
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    gpu = PaperGpu()
    monkeypatch.setattr(Tensor, "_make_subclass", staticmethod(_hide_from_autograd(Tensor._make_subclass)))
    monkeypatch.setattr(torch.cuda, "Event", PaperEvent)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 0)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    for module in (loss_guard, train_row):
        monkeypatch.setattr(module, "HostCopy", PaperCopy)
    with gpu:
        yield gpu
    assert not torch.cuda.is_initialized()
