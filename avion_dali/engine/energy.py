"""The energy that a run uses, as the hardware counts it, and the carbon emissions that it stands for.

GPUs since Volta count the energy they have used since the driver was loaded (NVML); Intel and AMD processors
count theirs in files that often only root may read (RAPL). Neither includes memory, fans or power supplies.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pynvml
import torch

PUE = 1.1
"""Power drawn by a data center per power used by its computers: Touvron et al. 2023, "LLaMA", arXiv 2302.13971,
section 6, as in the carbon table there: energy = power x hours x PUE."""
CARBON_KG_PER_KWH = 0.385
"""CO2-equivalent per kWh, average of the United States; same source."""
RAPL_FOLDER = Path("/sys/class/powercap")
NOT_READABLE = "could not be read"

Counter = Callable[[], float]


class EnergyMeter:
    """Joules used since it was made by the hardware that this rank counts: its GPU, or the processors.

    Args:
        device: where this rank computes.
        counts_processors: on the CPU, whether this rank counts for the machine: one rank of each machine does.
    """

    def __init__(self, device: torch.device, *, counts_processors: bool) -> None:
        counter = nvml_counter(device) if device.type == "cuda" else rapl_counter(RAPL_FOLDER)
        self.source = NOT_READABLE
        if counter is not None:
            self.source = "GPU (NVML)" if device.type == "cuda" else "processor packages (RAPL)"
        self._counter = counter if device.type == "cuda" or counts_processors else None
        self._start = self._counter() if self._counter else 0.0

    def joules(self) -> float:
        """Return what was used so far; 0 when it cannot be read or another rank counts it."""
        return self._counter() - self._start if self._counter else 0.0


def nvml_counter(device: torch.device) -> Counter | None:
    """Return a function that gives the joules a GPU has used since the driver was loaded; None if it cannot.

    Args:
        device: a CUDA device.
    """
    try:
        pynvml.nvmlInit()
        # CUDA and NVML count devices differently where some are hidden; the identifier is the same.
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        used = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except (pynvml.NVMLError, AttributeError, RuntimeError):  # no driver, too old a GPU, or no such device
        return None

    def joules() -> float:
        nonlocal used
        with suppress(pynvml.NVMLError):  # a failing counter must not end a training
            used = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        return used / 1000.0

    return joules


def rapl_counter(folder: Path) -> Counter | None:
    """Return a function that gives the joules the processor packages have used; None if that cannot be read.

    It must be called more often than the counters wrap, which takes minutes under full load.

    Args:
        folder: the system's `powercap` folder.
    """
    # Packages only: their cores and memory controllers are listed below them and would count twice.
    packages = [path for path in sorted(folder.glob("intel-rapl:*")) if path.name.count(":") == 1]
    try:
        ranges = [int((path / "max_energy_range_uj").read_text()) for path in packages]
        before = [int((path / "energy_uj").read_text()) for path in packages]
    except (OSError, ValueError):
        return None
    if not packages:
        return None
    total = 0

    def joules() -> float:
        nonlocal total
        for i, path in enumerate(packages):
            with suppress(OSError, ValueError):
                now = int((path / "energy_uj").read_text())
                total += (now - before[i]) % (ranges[i] + 1)
                before[i] = now
        return total / 1e6

    return joules


def carbon_kg(kwh: float) -> float:
    """Return the CO2-equivalent in kg of energy used by the computers, with the data center's overhead."""
    return kwh * PUE * CARBON_KG_PER_KWH
