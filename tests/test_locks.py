"""One living process per output folder: the second is told who holds it, and the dead hold nothing."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chunk_folders import write_random_manifest

from avion_dali import locks
from avion_dali.cli.main import main
from avion_dali.contracts import UserError
from avion_dali.engine.agreement import shared_folder_lock
from avion_dali.engine.distributed import Distributed
from avion_dali.locks import LOCK_FILE, folder_lock

ROOT = Path(__file__).resolve().parents[1]
HOLD = """
import sys, time
from avion_dali.locks import folder_lock
with folder_lock(sys.argv[1], "training"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    holder = rf"by process {os.getpid()} on \S+ \(training\)"
    with folder_lock(tmp_path / "run", "training"):
        with pytest.raises(UserError, match=holder), folder_lock(tmp_path / "run", "checking"):
            pass
        with folder_lock(tmp_path / "other", "training"):
            pass
        assert (tmp_path / "run" / LOCK_FILE).read_text()
    assert not (tmp_path / "run" / LOCK_FILE).read_text()
    with folder_lock(tmp_path / "run", "checking"):
        pass


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"by process {holder.pid} on"), folder_lock(tmp_path, "training"):
            pass
        holder.send_signal(signal.SIGKILL)
    with folder_lock(tmp_path, "training"):
        pass
    assert not caplog.records


def test_a_holder_on_another_machine_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / LOCK_FILE).write_text('{"host": "node7", "pid": 3, "purpose": "training"}')
    with folder_lock(tmp_path, "training"):
        pass
    assert "process 3 on node7" in caplog.text
    (tmp_path / LOCK_FILE).write_bytes(b"\xff[")
    with folder_lock(tmp_path, "training"):
        pass


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    with folder_lock(tmp_path, "training"):
        pass
    assert "has no locks" in caplog.text


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match="cannot be written to"),
        folder_lock(tmp_path / "file" / "x", "training"),
    ):
        pass


def test_only_the_main_rank_holds_the_folder(tmp_path: Path) -> None:
    ranks = [Distributed(rank=rank, world_size=2) for rank in (0, 1)]
    with (
        shared_folder_lock(tmp_path, "training", distributed=ranks[0]),
        shared_folder_lock(tmp_path, "training", distributed=ranks[1]),
    ):
        pass


@pytest.mark.parametrize(
    "line",
    [
        "chunk {0}/v.mp4 --output {0}/held",
        "manifest captions --chunks {0} --annotations {0}/rows.csv --output {0}/held",
        "check {0} --output {0}/held",
        "features --checkpoint {0}/w.pt --manifest {0}/m --output {0}/e.npy",
        "pretrain --config pretrain_tiny --data.train_manifest {0}/m --output_dir {0}/held",
    ],
    ids=lambda line: line.split()[0],
)
def test_every_command_that_fills_a_folder_holds_it(tmp_path: Path, line: str) -> None:
    (tmp_path / "v.mp4").touch()
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "0.mp4").touch()
    (tmp_path / "rows.csv").write_text("video,start,end,text\nv,0,1,a\n")
    write_random_manifest(tmp_path / "m", num_samples=40)
    started = time.monotonic()
    held = tmp_path / ("e.npy.work" if line.startswith("features") else "held")
    with folder_lock(held, "something"), pytest.raises(UserError, match=r"in use.*\(something\)"):
        main(line.format(tmp_path).split())
    assert [path.name for path in held.iterdir()] == [LOCK_FILE]
    assert time.monotonic() - started < 60
