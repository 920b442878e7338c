"""Energy counters as files and libraries show them."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch

from avion_dali.engine import energy
from avion_dali.engine.energy import EnergyMeter, carbon_kg, nvml_counter, rapl_counter


def make_package(folder, number: int, joules: float, *, limit_uj: int = 100_000_000) -> None:
    for name in (f"intel-rapl:{number}", f"intel-rapl:{number}:0"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "energy_uj").write_text(f"{int(joules * 1e6)}\n")
        (folder / name / "max_energy_range_uj").write_text(f"{limit_uj}\n")


def test_packages_add_up_and_counters_may_wrap(tmp_path):
    make_package(tmp_path, 0, 10.0)
    make_package(tmp_path, 1, 95.0)
    counter = rapl_counter(tmp_path)
    assert counter() == 0
    make_package(tmp_path, 0, 13.0)
    make_package(tmp_path, 1, 5.0)  # wrapped at 100 J
    assert counter() == pytest.approx(3.0 + 10.0, abs=1e-5)
    make_package(tmp_path, 0, 14.0)
    assert counter() == pytest.approx(14.0, abs=1e-5)


def test_unreadable_counters_are_said_to_be(tmp_path, monkeypatch):
    assert rapl_counter(tmp_path) is None
    (tmp_path / "intel-rapl:0").mkdir()
    assert rapl_counter(tmp_path) is None
    monkeypatch.setattr(energy, "RAPL_FOLDER", tmp_path)
    meter = EnergyMeter(torch.device("cpu"), counts_processors=True)
    assert meter.joules() == 0 and meter.source == "could not be read"


def test_one_rank_answers_for_a_machines_processors(tmp_path, monkeypatch):
    make_package(tmp_path, 0, 10.0)
    monkeypatch.setattr(energy, "RAPL_FOLDER", tmp_path)
    meters = [EnergyMeter(torch.device("cpu"), counts_processors=first) for first in (True, False)]
    make_package(tmp_path, 0, 17.0)
    assert [meter.joules() for meter in meters] == pytest.approx([7.0, 0.0])
    assert {meter.source for meter in meters} == {"processor packages (RAPL)"}


class FakeNvml:
    """The three calls of NVIDIA's library, with a counter in millijoules."""

    def __init__(self, *, known: bytes) -> None:
        self.known, self.millijoules = known, 5_000_000

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: object) -> int:  # noqa: N802
        return 0 if uuid == self.known else 6

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: object, used: object) -> int:  # noqa: N802
        ctypes.cast(used, ctypes.POINTER(ctypes.c_ulonglong))[0] = self.millijoules
        return 0


def test_a_gpu_is_found_by_its_identifier(monkeypatch):
    nvml = FakeNvml(known=b"GPU-12-34")
    monkeypatch.setattr(energy.ctypes, "CDLL", lambda name: nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12-34"))
    meter = EnergyMeter(torch.device("cuda", 0), counts_processors=False)
    nvml.millijoules += 7_500
    assert meter.joules() == pytest.approx(7.5) and meter.source == "GPU (NVML)"
    nvml.known = b"another"
    assert nvml_counter(torch.device("cuda", 0)) is None


def test_without_nvidias_library_there_is_no_counter(monkeypatch):
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(energy.ctypes, "CDLL", missing)
    assert nvml_counter(torch.device("cuda", 0)) is None


def test_carbon_follows_the_published_table():
    """LLaMA-65B: 1,022,362 GPU-hours at 400 W are given as 449 MWh and 173 t."""
    kwh = 1_022_362 * 0.4
    assert kwh * energy.PUE / 1000 == pytest.approx(449, abs=1.5)
    assert carbon_kg(kwh) / 1000 == pytest.approx(173, abs=0.6)
