"""A folder of data never runs as code: no command imports its files that have the names of modules."""

import os
import subprocess
import sys
from pathlib import Path

import make_videos
import pytest

from avion_dali import child_process
from avion_dali.cli.main import SUBCOMMANDS
from avion_dali.contracts import UserError

ROOT = Path(__file__).resolve().parents[1]
THIRD_PARTY = ("numpy", "av", "torch", "pebble", "pyarrow", "pipelines", "train", "avion_dali", "submitit")
# It imports as the installed command does: from where the package is, not from the working directory.
SCRIPT = """
import sys
from avion_dali.cli.main import main
if __name__ == "__main__":
    for line in sys.argv[1:]:
        try:
            main(line.split())
        except SystemExit:  # after --help
            pass
"""


def plant_canaries(folder: Path) -> Path:
    """Files with the names of modules, which write their name to a log when something imports them."""
    folder.mkdir()
    log = folder / "imported.log"
    for name in sorted({*sys.stdlib_module_names, *THIRD_PARTY}):
        (folder / f"{name}.py").write_text(
            f"open({str(log)!r}, 'a').write({name!r} + '\\n')\nraise ImportError"
        )
    return log


def run_in(folder: Path, *command: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=100
    )


def test_no_command_and_no_child_imports_from_the_working_directory(tmp_path: Path) -> None:
    log = plant_canaries(tmp_path / "data")
    for number in range(65):  # as many files as are probed in processes
        folder = tmp_path / "chunks" / f"v{number}"
        folder.mkdir(parents=True)
        if number:
            os.link(tmp_path / "chunks" / "v0" / "0.mp4", folder / "0.mp4")
        else:
            make_videos.write_video(folder / "0.mp4", frames=30)
    (tmp_path / "rows.csv").write_text("video,start,end,text\nv0,0,1,a cat\n")
    (tmp_path / "avion-dali").write_text(SCRIPT)
    found = run_in(
        tmp_path / "data",
        *(str(tmp_path / "avion-dali"), "recipes", "env"),
        f"chunk {tmp_path}/chunks/v0/0.mp4 --output made --jobs 1",
        f"manifest captions --chunks {tmp_path}/chunks --annotations {tmp_path}/rows.csv --output m --jobs 2",
        "check m --jobs 1 --output checked",
        "plan --chunks m --workers 1 --seconds 0.1",
        "pretrain --config pretrain_tiny --data.train_manifest m --optim.global_batch 1 --optim.micro_batch 1 "
        "--run.max_steps 1 --decoder cpu-fused --output-dir run",
        *(f"{name} --help" for name in SUBCOMMANDS),
    )
    assert not log.exists(), log.read_text()
    assert "1 of 1 videos done" in found.stdout and "65 files checked" in found.stdout, found.stderr


def test_python_m_leaves_the_working_directory_too(tmp_path: Path) -> None:
    log = plant_canaries(tmp_path / "data")
    for name in ("avion_dali", "pipelines"):  # the search for what `-m` names is Python's own
        (tmp_path / "data" / f"{name}.py").unlink()
    found = run_in(tmp_path / "data", "-m", "avion_dali", "recipes")
    assert found.returncode == 0, found.stderr
    assert not log.exists(), log.read_text()


def test_a_python_that_knows_no_safe_path_refuses_folders_with_such_files(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(child_process.sys, "version_info", (3, 10, 0))
    monkeypatch.chdir(tmp_path)
    with child_process.safe_start():
        pass
    (tmp_path / "pickle.py").touch()
    with pytest.raises(UserError, match=r"pickle\.py has the name of a module"), child_process.safe_start():
        pass
