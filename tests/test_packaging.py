"""What installation promises: bounded requirements, the command, and life without DALI."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import avion_dali

ROOT = Path(__file__).parents[1]
UNCAPPED = {"pyarrow"}  # a new major version each quarter, none of which changed the file format
LINES = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
REQUIREMENTS = [Requirement(line) for line in LINES]
DALI = [r for r in REQUIREMENTS if "dali" in r.name]

BLOCKED_IMPORT = """
import importlib, pkgutil, sys

class NoDali:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "nvidia":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoDali())
import avion_dali, train
for package in (avion_dali, train):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
        print(module.name)
"""


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_versions_are_bounded_not_frozen(requirement):
    operators = {specifier.operator for specifier in requirement.specifier}
    assert ">=" in operators
    assert not operators & {"==", "==="}
    assert "<" in operators or requirement.name in UNCAPPED


def test_the_installed_versions_are_allowed():
    for requirement in REQUIREMENTS:
        if requirement.marker is None or requirement.marker.evaluate():
            assert requirement.specifier.contains(metadata.version(requirement.name)), requirement


@pytest.mark.parametrize("requirement", DALI, ids=str)
def test_dali_is_asked_for_only_where_it_exists(requirement):
    assert requirement.marker is not None
    where = {
        ("Linux", "x86_64"): True,
        ("Linux", "aarch64"): True,
        ("Linux", "riscv64"): False,
        ("Darwin", "arm64"): False,
        ("Windows", "AMD64"): False,
    }
    for (system, machine), wanted in where.items():
        found = requirement.marker.evaluate({"platform_system": system, "platform_machine": machine})
        assert found is wanted, (system, machine)


def test_there_is_a_dali_requirement():
    assert DALI


def test_package_metadata_follows_the_files():
    assert metadata.version("avion_dali") == avion_dali.__version__
    declared = {Requirement(r).name for r in metadata.requires("avion_dali") or [] if "extra ==" not in r}
    assert declared == {r.name for r in REQUIREMENTS}


def test_every_folder_of_the_library_is_installed():
    """`packages` in pyproject.toml lists them, since two folders are installed under other names."""
    listed = re.search(
        r"^packages = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL
    )
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "avion_dali").rglob("__init__.py")}
    inside = {".".join(folder.parts) for folder in folders}
    assert set(re.findall(r'"(.+?)"', listed[1])) == inside | {"avion_dali.pipelines", "avion_dali.recipes"}


def test_the_command_resolves():
    (entry,) = metadata.entry_points(group="console_scripts", name="avion-dali")
    assert callable(entry.load())


def test_everything_imports_without_dali():
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED_IMPORT], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert {"avion_dali.decode.cpu_fused", "avion_dali.engine.loop", "train.pretrain"} <= set(
        done.stdout.split()
    )
