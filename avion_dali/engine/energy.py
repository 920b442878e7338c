"""The energy that a run uses, from hardware counters, and the corresponding carbon emissions.

GPUs since Volta count the energy used since the driver was loaded (NVML). Intel and AMD processors have
counters in files that often only root may read (RAPL). Neither includes memory, fans or power supplies.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pynvml
import torch

PUE = 1.1
"""Power usage effectiveness: power drawn by a data center per power used by its computers. Touvron et al. 2023,
"LLaMA", arXiv 2302.13971, section 6: energy = power x hours x PUE."""
CARBON_KG_PER_KWH = 0.385
"""CO2-equivalent in kg per kWh, average of the United States; same source."""
RAPL_FOLDER = Path("/sys/class/powercap")
NOT_READABLE = "could not be read"

Counter = Callable[[], float]


class EnergyMeter:
    """Measures the energy in joules used since its creation, by this rank's GPU or by the processors.

    Args:
        device: device of this rank.
        counts_processors: whether this rank measures the processors if it computes on the CPU; one rank per
            machine does.
    """

    def __init__(self, device: torch.device, *, counts_processors: bool) -> None:
        counter = nvml_counter(device) if device.type == "cuda" else rapl_counter(RAPL_FOLDER)
        self.source = NOT_READABLE
        if counter is not None:
            self.source = "GPU (NVML)" if device.type == "cuda" else "processor packages (RAPL)"
        self._counter = counter if device.type == "cuda" or counts_processors else None
        self._start = self._counter() if self._counter else 0.0

    def joules(self) -> float:
        """Return the joules used so far; 0 if they cannot be read or another rank measures them."""
        return self._counter() - self._start if self._counter else 0.0


def nvml_counter(device: torch.device) -> Counter | None:
    """Return a function that reads the joules used by a GPU since the driver was loaded; None if that fails.

    Args:
        device: a CUDA device.
    """
    try:
        pynvml.nvmlInit()
        # CUDA and NVML number devices differently if some are hidden; the UUID is the same.
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
    """Return a function that reads the joules used by the processor packages; None if that fails.

    It must be called before the counters wrap around, which takes minutes under full load.

    Args:
        folder: the system's `powercap` folder.
    """
    # Only packages: their cores and memory controllers have separate entries and would be counted twice.
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
    """Return the CO2-equivalent in kg of the energy used by computers, including the data center's overhead."""
    return kwh * PUE * CARBON_KG_PER_KWH
