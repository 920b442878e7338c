"""A rank that dies under torchrun ends the job with its cause, and the job goes on where it was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from toy_training import assert_same

from avion_dali.engine.checkpoint import LATEST_NAME, load_checkpoint
from avion_dali.engine.run_log import LOG_NAME, read_rows

SCRIPT = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from toy_training import ToyLoader, make_loop, make_settings
from avion_dali.engine.checkpoint import find_checkpoint
from avion_dali.engine.distributed import distributed_session

with distributed_session(use_cuda=False) as here:
    folder, dying_step = Path(sys.argv[1]), int(sys.argv[2])
    settings = make_settings(folder, save_every=1)
    loader = ToyLoader(rank=here.rank, steps_per_epoch=4)
    loop = make_loop(folder, loader=loader, settings=settings, distributed=here)
    path = find_checkpoint(folder, "auto")
    if path:
        loop.restore(path)
    if here.rank == 1:
        loop.after_step = lambda: os.kill(os.getpid(), signal.SIGKILL) if loop.step == dying_step else None
    loop.run()
"""


def launch(tmp_path: Path, name: str, dying_step: int) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "ranks.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [*torchrun, str(script), str(tmp_path / name), str(dying_step)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)


def test_a_killed_rank_ends_the_job_and_it_resumes_exactly(tmp_path):
    assert launch(tmp_path, "whole", -1).returncode == 0
    dead = launch(tmp_path, "dead", 5)
    assert dead.returncode != 0
    assert "rank: 1 " in dead.stderr.replace("\t", " ") or "local_rank: 1" in dead.stderr, dead.stderr[-2000:]
    assert "Signal 9 (SIGKILL)" in dead.stderr
    step = load_checkpoint(tmp_path / "dead" / LATEST_NAME).step
    assert 4 <= step <= 5
    again = launch(tmp_path, "dead", -1)
    assert again.returncode == 0, again.stderr
    steps = [row["step"] for row in read_rows(tmp_path / "dead" / LOG_NAME) if row["kind"] == "train"]
    assert steps == list(range(1, 9))
    whole, resumed = (load_checkpoint(tmp_path / name / LATEST_NAME).model for name in ("whole", "dead"))
    # With three ranks the sum of a gradient depends on its order, which DDP chooses anew after a start.
    assert_same(dict(whole), dict(resumed), atol=1e-6)
    assert all(torch.isfinite(tensor).all() for tensor in whole.values())
