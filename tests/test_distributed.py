"""Two gloo ranks, started once: gathering, exact training over ranks, and a rank that dies."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from toy_training import (
    ToyContrastive,
    ToyLoader,
    ToySamplewise,
    assert_same,
    gradients_after_one_step,
    make_loop,
    make_settings,
    reference_gradients,
    weights,
)

from avion_dali.contracts import UserError
from avion_dali.engine.checkpoint import LATEST_NAME
from avion_dali.engine.distributed import (
    Distributed,
    all_gather_rows,
    barrier,
    data_parallel,
    distributed_session,
    init_distributed,
    shutdown,
)
from avion_dali.engine.run_log import LOG_NAME, read_rows

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def rank_main(rank: int, folder: Path, port: int) -> None:
    """What each of the two processes does; results go to files, asserted by the tests."""
    torch.set_num_threads(1)
    os.environ.update(
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    )
    here = init_distributed(use_cuda=False, timeout_s=30)
    results: dict[str, object] = {"place": (here.rank, here.world_size, here.is_main, str(here.device))}
    results["rows"] = all_gather_rows(torch.full((rank * 2 + 1, 2), float(rank)))
    results["flags"] = all_gather_rows(torch.ones(rank, dtype=torch.bool))
    results["wide"] = all_gather_rows(torch.tensor([[2**62 + rank]]))
    for name, objective in (("coupled", ToyContrastive()), ("samplewise", ToySamplewise())):
        for accum in (1, 2):
            loader = ToyLoader(accum_steps=accum, rank=rank)
            loop = make_loop(folder / "none", objective=objective, loader=loader, distributed=here)
            results[f"{name}{accum}"] = gradients_after_one_step(loop)
    loop = make_loop(
        folder / "run",
        loader=ToyLoader(accum_steps=2, rank=rank),
        settings=make_settings(folder / "run"),
        distributed=here,
        evaluate=lambda: {"score": float(all_gather_rows(torch.ones(1)).sum())},
    )
    loop.run()
    results["weights"] = weights(loop.model)
    results["files"] = sorted(path.name for path in (folder / "run").iterdir())
    barrier()
    torch.save(results, folder / f"rank{rank}.pt")
    if rank == 1:
        os._exit(3)  # dies without a word, as under the out-of-memory killer
    start = time.monotonic()
    try:
        barrier()
        barrier()
    except RuntimeError:
        (folder / "noticed").write_text(str(time.monotonic() - start))
    os._exit(0)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two_ranks")
    context = mp.get_context("spawn")
    port = free_port()
    ranks = [context.Process(target=rank_main, args=(rank, folder, port)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=60)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in ranks] == [0, 3]
    return folder


@pytest.fixture(scope="module")
def results(two_ranks: Path) -> list[dict]:
    return [torch.load(two_ranks / f"rank{rank}.pt") for rank in range(2)]


def test_ranks_know_their_place(results):
    assert results[0]["place"] == (0, 2, True, "cpu")
    assert results[1]["place"] == (1, 2, False, "cpu")


def test_unequal_rows_are_gathered_in_rank_order(results):
    for result in results:
        assert result["rows"].tolist() == [[0.0, 0.0]] + [[1.0, 1.0]] * 3
        assert result["flags"].tolist() == [True]  # rank 0 has none
        assert result["wide"].tolist() == [[2**62], [2**62 + 1]]


@pytest.mark.parametrize("accum_steps", [1, 2])
@pytest.mark.parametrize("objective", [ToyContrastive(), ToySamplewise()], ids=["coupled", "samplewise"])
def test_ranks_and_accumulation_equal_one_large_batch(results, objective, accum_steps):
    name = "coupled" if objective.couples_samples else "samplewise"
    reference = reference_gradients(objective, micro_batches=accum_steps, ranks=2)
    for result in results:
        assert_same(result[f"{name}{accum_steps}"], reference, atol=1e-6)


def test_ranks_hold_identical_weights_after_training(results):
    assert_same(results[0]["weights"], results[1]["weights"])


def test_one_set_of_files_with_numbers_of_all_ranks(results, two_ranks):
    assert results[1]["files"] == sorted([LATEST_NAME, LOG_NAME, "checkpoint_best.pt"])
    rows = [row for row in read_rows(two_ranks / "run" / LOG_NAME) if row["kind"] == "train"]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[0]["delivered"] == 2 * 2 * 4  # ranks x micro-batches x rows
    assert rows[0]["clips_per_s"] == pytest.approx(2 * rows[0]["clips_per_s_per_rank"])


def test_checkpoint_of_two_ranks_continues_on_one(two_ranks, tmp_path):
    loop = make_loop(tmp_path, loader=ToyLoader(accum_steps=4))
    loop.restore(two_ranks / "run" / LATEST_NAME)
    assert loop.step == 6 and loop.state.best_metric == 2.0


def test_a_dead_rank_is_noticed_within_seconds(two_ranks):
    assert float((two_ranks / "noticed").read_text()) < 10


def test_single_process_needs_no_group(bare_environment):
    place = init_distributed(use_cuda=False)
    assert place == Distributed() and place.is_main
    assert not torch.distributed.is_initialized()
    rows = torch.ones(2, 3)
    assert all_gather_rows(rows) is rows
    model = nn.Linear(2, 2)
    assert data_parallel(model, place) is model
    barrier()
    shutdown()


def test_session_passes_errors_through(bare_environment):
    with pytest.raises(ZeroDivisionError), distributed_session(use_cuda=False) as place:
        assert place.world_size == 1
        raise ZeroDivisionError


def test_incomplete_environment_is_a_user_error(bare_environment):
    bare_environment.setenv("WORLD_SIZE", "2")
    bare_environment.setenv("RANK", "0")
    with pytest.raises(
        UserError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set; launch with torchrun"
    ):
        init_distributed(use_cuda=False)


def test_rank_without_a_gpu_is_a_user_error(bare_environment):
    bare_environment.setenv("LOCAL_RANK", "99")
    bare_environment.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="local rank 99 has no GPU, because this machine has 1"):
        init_distributed(use_cuda=True)


def test_absent_peers_are_a_user_error(bare_environment):
    port = str(free_port())
    for name, value in zip(RANK_VARIABLES, ("1", "1", "2", "127.0.0.1", port), strict=True):
        bare_environment.setenv(name, value)
    with pytest.raises(UserError, match=f"rank 1 of 2 could not join the process group at 127.0.0.1:{port}"):
        init_distributed(use_cuda=False, timeout_s=1)


def test_ranks_that_start_from_different_points_are_told(monkeypatch):
    from avion_dali.engine import distributed

    others = [{"step": 4, "seed": 0}, {"step": 0, "seed": 0}]
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(
        distributed.dist, "all_gather_object", lambda out, mine: out.__setitem__(slice(None), [mine, others[1]])
    )
    with pytest.raises(UserError, match="step is 4 on rank 0 and 0 on rank 1"):
        distributed.require_agreement(others[0])
    distributed.require_agreement(others[1])
