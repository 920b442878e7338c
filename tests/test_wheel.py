"""The wheel adds one package, and works in a user's folder whose modules have the names of this project's.

The requirements, such as torch, are those of the environment that runs the tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import make_videos
import pytest
from annotation_files import write_lines
from launch_data import SMALL

import avion_dali
from avion_dali.engine.run_log import read_rows

ROOT = Path(__file__).parents[1]
INSTALLED_FOLDERS = {
    "avion_dali": "avion_dali",
    "pipelines": "avion_dali/pipelines",
    "configs": "avion_dali/recipes",
}
OTHER_FOLDERS = ("tests", "train", "benchmarks")
FILES = ("pyproject.toml", "requirements.txt", "README.md", "LICENSE", "MANIFEST.in")
BUILD_SOURCE = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
WITHOUT_INDEX = ("--no-deps", "--no-index", "--disable-pip-version-check")
IMPORTS = """
import sys
import avion_dali
assert avion_dali.__file__.startswith(sys.prefix), avion_dali.__file__
import avion_dali.__main__
heavy = {"torch", "jsonargparse", "open_clip", "pyarrow"} & set(sys.modules)
assert not heavy, heavy
from avion_dali.assembly.dali_room import pipelines_module
support = pipelines_module("support")
assert support.__name__ == "avion_dali.pipelines.support"
print(set(support.cpu_codec_support().values()) == {support.WORKS})
"""


def run(*command: object, cwd: Path) -> str:
    """Run a command without this environment's search path; returns what it printed."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=clean, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a source distribution, which is built from a copy: building leaves files behind."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    for name in (*INSTALLED_FOLDERS, *OTHER_FOLDERS):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copyfile(ROOT / name, source / name)
    run(sys.executable, "-c", BUILD_SOURCE, folder, cwd=source)
    (archive,) = folder.glob("*.tar.gz")
    build = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", *WITHOUT_INDEX)
    run(*build, "--wheel-dir", folder, archive, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def commands(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of commands of a fresh environment: the wheel, and after it those of this environment."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", *WITHOUT_INDEX, wheel, cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    # .pth files in the folders that a .pth file names are ignored: an editable installation stays invisible.
    present = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    (packages / "present.pth").write_text("".join(f"{path}\n" for path in present))
    return python.parent


@pytest.fixture(scope="module")
def own_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder; whoever imports its modules fails."""
    folder = tmp_path_factory.mktemp("own")
    for name in ("train.py", "benchmarks.py", *(f"{n}/__init__.py" for n in ("pipelines", "configs", "tests"))):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"raise RuntimeError('imported {name} of the user')\n")
    return folder


@pytest.fixture(scope="module")
def manifest(commands: Path, own_folder: Path) -> Path:
    """A manifest of four clips, made by the commands; without a GPU, DALI decodes its chunks too."""
    make_videos.write_video(own_folder / "kitchen.mp4", frames=60, size=(64, 48))
    captions = [f"kitchen,{start},{start + 1},the knife is washed" for start in (0.0, 0.2, 0.4, 0.6)]
    annotations = write_lines(own_folder / "captions.csv", "video,start,end,text", *captions)
    chunk = ("chunk", "kitchen.mp4", "--output", "chunks", "--profile", "vp9", "--jobs", 1)
    run(commands / "avion-dali", *chunk, cwd=own_folder)
    build = ("manifest", "captions", "--chunks", "chunks", "--annotations", annotations, "--output", "m")
    run(commands / "avion-dali", *build, "--jobs", 1, cwd=own_folder)
    return own_folder / "m"


def test_the_wheel_adds_one_package_with_recipes_and_dali_modules(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    metadata = f"avion_dali-{avion_dali.__version__}.dist-info/"
    found = {name for name in names if not name.startswith(metadata)}
    assert found == {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, target in INSTALLED_FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"avion_dali/recipes/pretrain_tiny.yaml", "avion_dali/pipelines/mini_clip.py"} <= found
    assert f"{metadata}licenses/LICENSE" in names


def test_only_the_installed_package_is_imported(commands: Path, own_folder: Path) -> None:
    assert run(commands / "python", "-c", IMPORTS, cwd=own_folder).strip() == "True"
    assert "pretrain" in run(commands / "python", "-m", "avion_dali", "--help", cwd=own_folder)
    assert "pretrain_tiny" in run(commands / "avion-dali", "recipes", cwd=own_folder)


@pytest.mark.parametrize(
    ("start", "decoder", "steps"),
    [
        (["avion-dali"], "cpu-fused", 2),
        (["python", "-m", "torch.distributed.run", "--nproc_per_node=1", "-m", "avion_dali"], "dali", 1),
    ],
)
def test_both_ways_to_start_train_with_decode_processes(
    start: list[str], decoder: str, steps: int, commands: Path, manifest: Path
) -> None:
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
    program, *more = start
    settings = ("--config", "pretrain_tiny", *SMALL, "--data.train_manifest", manifest, "--decoder", decoder)
    where = ("--output-dir", decoder, "--run.max_steps", steps)
    run(commands / program, *more, "pretrain", *settings, *where, cwd=manifest.parent)
    output = manifest.parent / decoder
    trained = [row for row in read_rows(output / "log.jsonl") if row["kind"] == "train"]
    assert [(row["step"], row["decoder"]) for row in trained] == [(i + 1, decoder) for i in range(steps)]
    assert (output / "weights.safetensors").is_file()
