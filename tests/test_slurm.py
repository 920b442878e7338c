"""The SLURM launcher: what it asks for, how ranks find each other, and saving when the end is announced."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from avion_dali.cli import slurm
from avion_dali.cli.slurm import RankPlace, RankTask, SlurmOptions, main, minutes, parameters
from avion_dali.contracts import UserError

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("text", "expected"), [("24:00:00", 1440), ("2-01:30:00", 2970), ("00:00:30", 1), ("1:05:00", 65)]
)
def test_time_limits(text, expected):
    assert minutes(text) == expected


@pytest.mark.parametrize("text", ["24", "24:00", "tomorrow", "1-2:3:4:5"])
def test_other_time_limits_are_refused(text):
    with pytest.raises(UserError, match="write HH:MM:SS or D-HH:MM:SS"):
        minutes(text)


def test_place_is_what_torchrun_would_say():
    place = RankPlace(rank=11, local_rank=3, world_size=16, nodes=2, first_host="n1", job_id="12345678_3")
    environment = place.environment()
    assert environment["RANK"] == "11" and environment["LOCAL_RANK"] == "3"
    assert environment["WORLD_SIZE"] == "16" and environment["LOCAL_WORLD_SIZE"] == "8"
    assert environment["MASTER_ADDR"] == "n1" and 20_000 <= int(environment["MASTER_PORT"]) < 40_000
    other = RankPlace(rank=0, local_rank=0, world_size=16, nodes=2, first_host="n1", job_id="12345678_3")
    assert other.environment()["MASTER_PORT"] == environment["MASTER_PORT"]


def test_one_task_per_gpu_and_a_warning_before_the_end():
    asked = parameters(SlurmOptions(nodes=2, partition="long", memory_gb=200))
    assert (asked["nodes"], asked["tasks_per_node"], asked["gpus_per_node"]) == (2, 8, 8)
    assert asked["slurm_signal_delay_s"] > slurm.SAVE_LIMIT_S and asked["slurm_partition"] == "long"
    assert "slurm_account" not in asked and asked["mem_gb"] == 200
    local = parameters(SlurmOptions(gpus_per_node=0, cluster="local"))
    assert local["tasks_per_node"] == 1 and "gpus_per_node" not in local
    assert not any(name.startswith("slurm") for name in local)


TRAINER = """
import os, signal, sys, time
from pathlib import Path
def save(number, frame):
    Path(sys.argv[1]).write_text(f"{signal.Signals(number).name} rank {os.environ['RANK']}")
    sys.exit(0)
signal.signal(signal.SIGUSR2, save)
print("ready", flush=True)
time.sleep(60)
"""


def test_the_trainer_saves_before_the_job_is_requeued(tmp_path, monkeypatch):
    (tmp_path / "trainer.py").write_text(TRAINER)
    task = RankTask(["trainer", str(tmp_path / "saved")])
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "RANK": "5"}
    statuses = []
    running = threading.Thread(target=lambda: statuses.append(task.run(environment)))
    running.start()
    time.sleep(1.5)
    helpers = SimpleNamespace(DelayedSubmission=lambda task: ("again", task.command))
    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(helpers=helpers))
    assert task.checkpoint() == ("again", task.command)
    assert (tmp_path / "saved").read_text() == "SIGUSR2 rank 5"
    running.join(timeout=10)
    assert statuses == [0]


def test_a_failed_trainer_fails_the_task(monkeypatch):
    job = SimpleNamespace(
        global_rank=1, local_rank=1, num_tasks=2, num_nodes=1, hostnames=["here"], raw_job_id="7"
    )
    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(JobEnvironment=lambda: job))
    with pytest.raises(RuntimeError, match=r"rank 1 ended with status 1: no\.such\.module"):
        RankTask(["no.such.module"])()


class FakeExecutor:
    made: list[FakeExecutor] = []

    def __init__(self, **options: object) -> None:
        self.options = options
        FakeExecutor.made.append(self)

    def update_parameters(self, **values: object) -> None:
        self.values = values

    def submit(self, task: RankTask) -> SimpleNamespace:
        self.task = task
        return SimpleNamespace(job_id="42", paths=SimpleNamespace(stdout="out.log"))


def test_command_line_is_split_at_the_divider(monkeypatch, capsys):
    fake = ModuleType("submitit")
    fake.AutoExecutor = FakeExecutor
    monkeypatch.setitem(sys.modules, "submitit", fake)
    assert main(["--nodes", "2", "--time", "1:00:00", "--", "pretrain", "--run.seed", "3"]) == 0
    executor = FakeExecutor.made[-1]
    assert executor.task.command == ["avion_dali", "pretrain", "--run.seed", "3"]
    assert executor.values["nodes"] == 2 and executor.values["timeout_min"] == 60
    assert executor.options["cluster"] == "slurm" and executor.options["slurm_max_num_timeout"] == 20
    assert "job 42" in capsys.readouterr().out
    with pytest.raises(UserError, match="there is no command to run"):
        main(["--nodes", "2"])
    with pytest.raises(UserError, match="`train.pretrain` is not a command for SLURM; write one of pretrain"):
        main(["--", "train.pretrain"])


def test_without_submitit_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r'pip install "avion_dali\[slurm\]"'):
        main(["--", "pretrain"])


def test_two_local_tasks_meet(tmp_path, monkeypatch):
    """The whole path through submitit's own local executor."""
    submitit = pytest.importorskip("submitit", reason="needs the extra `slurm`")
    executor = submitit.LocalExecutor(folder=tmp_path / "logs")
    executor.update_parameters(tasks_per_node=2, timeout_min=5, nodes=1)
    (tmp_path / "meet.py").write_text(
        "import os, sys\nfrom pathlib import Path\nsys.path.insert(0, sys.argv[2])\n"
        "from avion_dali.engine.distributed import all_gather_rows, distributed_session\nimport torch\n"
        "with distributed_session(use_cuda=False) as here:\n"
        "    total = int(all_gather_rows(torch.tensor([here.rank + 1])).sum())\n"
        "Path(sys.argv[1], str(here.rank)).write_text(str(total))\n"
    )
    paths = [str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    job = executor.submit(RankTask(["meet", str(tmp_path), str(ROOT)]))
    job.results()
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["3", "3"]
