"""Three processes: one is stopped; the others notice, say who it was, and end."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from test_distributed import RANK_VARIABLES, free_port

from avion_dali.engine.heartbeat import Heartbeat

SCRIPT = """
import os, sys, time
from avion_dali.engine.distributed import Distributed, init_distributed
from avion_dali.engine.heartbeat import Heartbeat
import torch, torch.distributed as dist
torch.set_num_threads(1)
here = init_distributed(use_cuda=False, timeout_s=100)
with Heartbeat(here.rank, here.world_size, limit_s=1.5, interval_s=0.1):
    dist.barrier()
    sys.stdout.write("ready" + chr(10))
    sys.stdout.flush()
    if here.rank == 1:
        time.sleep(100)
    group = dist.new_group([0, 2])
    dist.recv(torch.ones(1), src=2 - here.rank, group=group)  # never sent: nothing but the watch can end it
"""


def start_ranks() -> list[subprocess.Popen[str]]:
    port, root = str(free_port()), str(Path(__file__).parents[1])
    ranks = []
    for rank in range(3):
        values = (str(rank), str(rank), "3", "127.0.0.1", port)
        environment = os.environ | dict(zip(RANK_VARIABLES, values, strict=True)) | {"PYTHONPATH": root}
        command = [sys.executable, "-c", SCRIPT]
        ranks.append(subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True))
    for process in ranks:
        assert process.stdout.readline() == "ready\n"
    return ranks


def test_a_stopped_rank_ends_the_others_with_the_cause():
    ranks = start_ranks()
    try:
        ranks[1].send_signal(signal.SIGSTOP)
        for rank in (0, 2):
            _, console = ranks[rank].communicate(timeout=60)
            assert ranks[rank].returncode == 1, console
            assert "Start again to continue" in console
            if rank == 0 or "the first machine of the run no longer answers" not in console:
                assert "error: rank 1 (" in console and f"process {ranks[1].pid})" in console
                assert "has not responded for" in console
    finally:
        for process in ranks:
            process.kill()
            process.wait()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    return server


def test_ranks_that_leave_in_order_or_stay_long_are_not_missed(store):
    causes: list[str] = []
    options = {"limit_s": 0.5, "interval_s": 0.05, "on_loss": causes.append}
    with Heartbeat(0, 2, **options):
        with Heartbeat(1, 2, **options):
            time.sleep(1.0)
        time.sleep(1.0)  # rank 1 has said that it is done
    assert causes == []


def test_a_rank_that_fails_is_missed(store):
    causes: list[str] = []
    options = {"limit_s": 0.4, "interval_s": 0.05, "on_loss": causes.append}
    with Heartbeat(0, 2, **options):
        with pytest.raises(ZeroDivisionError), Heartbeat(1, 2, **options):
            raise ZeroDivisionError
        time.sleep(1.0)
    assert causes and causes[0].startswith("rank 1 (")


def test_a_lost_store_is_noticed(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    context, causes = mp.get_context("spawn"), []
    port = free_port()
    keeper = context.Process(target=keep_store, args=(port,))
    keeper.start()
    monkeypatch.setenv("MASTER_PORT", str(port))
    with Heartbeat(0, 1, limit_s=0.3, interval_s=0.05, on_loss=causes.append):
        keeper.kill()
        keeper.join()
        deadline = time.monotonic() + 30
        while not causes and time.monotonic() < deadline:
            time.sleep(0.05)
    assert "the first machine of the run no longer answers" in causes[0]


def keep_store(port: int) -> None:
    kept = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    time.sleep(100)
    del kept
