"""Energy counters as files and libraries show them."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pynvml
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
    """NVIDIA's library with one GPU, whose counter is in millijoules."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, known: str) -> None:
        self.known, self.millijoules, self.is_lost = known, 5_000_000, False
        monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", self.handle)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", self.energy)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12-34"))

    def handle(self, uuid: str) -> str:
        if uuid != self.known:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return "handle"

    def energy(self, handle: str) -> int:
        if self.is_lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        assert handle == "handle"
        return self.millijoules


def test_a_gpu_is_found_by_its_identifier(monkeypatch):
    nvml = FakeNvml(monkeypatch, known="GPU-12-34")
    meter = EnergyMeter(torch.device("cuda", 0), counts_processors=False)
    nvml.millijoules += 7_500
    assert meter.joules() == pytest.approx(7.5) and meter.source == "GPU (NVML)"
    nvml.millijoules, nvml.is_lost = 0, True
    assert meter.joules() == pytest.approx(7.5)  # the last number that could be read
    nvml.known = "another"
    assert nvml_counter(torch.device("cuda", 0)) is None


def test_an_old_gpu_has_no_counter(monkeypatch):
    FakeNvml(monkeypatch, known="GPU-12-34").is_lost = True
    meter = EnergyMeter(torch.device("cuda", 0), counts_processors=False)
    assert meter.joules() == 0 and meter.source == energy.NOT_READABLE


def test_without_a_driver_there_is_no_counter(monkeypatch):
    def missing() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", missing)
    assert nvml_counter(torch.device("cuda", 0)) is None


@pytest.mark.gpu
def test_the_counter_of_a_real_gpu_rises():
    meter = EnergyMeter(torch.device("cuda", 0), counts_processors=False)
    assert meter.source == "GPU (NVML)"
    end = time.monotonic() + 1.0
    square = torch.ones(2048, 2048, device="cuda")
    while time.monotonic() < end:
        square = (square @ square).clamp(max=1)
    torch.cuda.synchronize()
    assert 10 < meter.joules() < 5_000  # a second at tens to hundreds of watts


def test_carbon_follows_the_published_table():
    """LLaMA-65B: 1,022,362 GPU-hours at 400 W are given as 449 MWh and 173 t."""
    kwh = 1_022_362 * 0.4
    assert kwh * energy.PUE / 1000 == pytest.approx(449, abs=1.5)
    assert carbon_kg(kwh) / 1000 == pytest.approx(173, abs=0.6)
