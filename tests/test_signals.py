"""Stop signals: saved at a step's end, ended cleanly, resumed to the same weights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from toy_training import assert_same, make_loop, weights

from avion_dali.engine.checkpoint import LATEST_NAME, load_checkpoint
from avion_dali.engine.run_log import LOG_NAME, read_rows
from avion_dali.engine.signals import STOP_SIGNALS, RankVotes, StopSignals, exit_status

NAMES = [signal.Signals(number).name for number in STOP_SIGNALS]


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_saves_and_stops_at_the_step_and_resuming_is_exact(tmp_path, name, capsys):
    loop = make_loop(tmp_path / "a", evaluate=lambda: {"score": 1.0})
    loop.after_step = lambda: os.kill(os.getpid(), signal.Signals[name]) if loop.step == 3 else None
    summary = loop.run()
    assert (summary.step, summary.stopped_by) == (4, name)
    assert load_checkpoint(tmp_path / "a" / LATEST_NAME).step == 4 and loop.loader.closed == 1
    assert f"{name}: saved and stopped after step 4" in capsys.readouterr().out
    assert read_rows(tmp_path / "a" / LOG_NAME)[-1]["stopped_by"] == name
    again = make_loop(tmp_path / "a", evaluate=lambda: {"score": 1.0})
    again.restore(tmp_path / "a" / LATEST_NAME)
    assert again.run().stopped_by == "" and again.loader.asked == [4, 5]
    straight = make_loop(tmp_path / "b")
    straight.run()
    assert_same(weights(straight.model), weights(again.model))


def test_a_signal_at_an_epochs_end_leaves_the_evaluation_for_later(tmp_path):
    scores = []

    def evaluate() -> dict[str, float]:
        scores.append(loop.step)
        return {"score": 1.0}

    loop = make_loop(tmp_path, evaluate=evaluate)
    loop.after_step = lambda: os.kill(os.getpid(), signal.SIGTERM) if loop.step == 5 else None
    assert loop.run().stopped_by == "SIGTERM"  # all steps are done, the last evaluation is not
    assert scores == [3]
    loop = make_loop(tmp_path, evaluate=evaluate)
    loop.restore(tmp_path / LATEST_NAME)
    assert loop.run().stopped_by == "" and scores == [3, 6]


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with StopSignals() as signals:
        assert signal.getsignal(signal.SIGTERM) == signals._remember
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # the second one ends the process
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_other_threads_may_train_without_signals(tmp_path):
    done = []
    thread = threading.Thread(target=lambda: done.append(make_loop(tmp_path).run().step))
    thread.start()
    thread.join()
    assert done == [6]


def test_exit_statuses():
    assert exit_status("") == exit_status("SIGUSR1") == exit_status("SIGUSR2") == 0
    assert exit_status("SIGTERM") == 143


def test_one_process_agrees_with_itself():
    votes = RankVotes(2)
    assert votes.exchange([15, 0]) == [15, 0] and votes.exchange([0, 1]) == [0, 1]
    votes.close()


RANK_SCRIPT = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from toy_training import ToyLoader, make_loop, make_settings
from avion_dali.engine.distributed import distributed_session
with distributed_session(use_cuda=False) as here:
    folder = Path(sys.argv[1])
    loop = make_loop(folder, loader=ToyLoader(rank=here.rank), settings=make_settings(folder), distributed=here)
    if here.rank == 1:
        loop.after_step = lambda: os.kill(os.getpid(), signal.SIGUSR1) if loop.step == 1 else None
    summary = loop.run()
    (folder / f"rank{{here.rank}}").write_text(f"{{summary.step}} {{summary.stopped_by}}")
"""


def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANK_SCRIPT.format(tests=str(Path(__file__).parent)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    # The wish of step 2 is known to all after step 3.
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == ["3 SIGUSR1"] * 2
    assert load_checkpoint(tmp_path / LATEST_NAME).step == 3
