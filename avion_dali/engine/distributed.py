"""The place of this process among all processes of a run, and the collectives that the engine needs.

A single process works without a process group: every function here then does the same locally. Several
processes are started by `torchrun`, whose environment variables are read by `init_distributed`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from avion_dali.contracts import UserError
from avion_dali.engine.heartbeat import Heartbeat

COLLECTIVE_TIMEOUT_S = 600.0
"""How long a rank waits for ranks that are alive but busy: longer than writing a large checkpoint takes. Ranks
that are dead or stopped are noticed much sooner, see `heartbeat.py`."""


@dataclass(frozen=True)
class Distributed:
    """This process among all processes of the run.

    Args:
        rank: number of this process over all machines.
        world_size: number of processes.
        local_rank: number of this process on its machine; picks its GPU.
        device: where this process computes.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and console lines."""
        return self.rank == 0


def _read_environment() -> tuple[int, int, int]:
    """Return (rank, world size, local rank) as torchrun sets them; (0, 1, 0) without it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1, int(os.environ.get("LOCAL_RANK", "0"))
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but {', '.join(missing)} is not set; "
            "launch with torchrun, or unset WORLD_SIZE to run one process"
        )
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])


def _pick_device(local_rank: int, *, use_cuda: bool) -> torch.device:
    """Return the GPU of this local rank, which becomes the current one, or the CPU."""
    if not use_cuda:
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no GPU: this machine shows {torch.cuda.device_count()}; "
            "lower --nproc_per_node or check CUDA_VISIBLE_DEVICES"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def init_distributed(*, use_cuda: bool | None = None, timeout_s: float = COLLECTIVE_TIMEOUT_S) -> Distributed:
    """Read torchrun's environment, pick the device and, with several processes, join the process group.

    Args:
        use_cuda: compute on GPUs (nccl) or on the CPU (gloo); None takes GPUs where there are any.
        timeout_s: seconds until joining or a collective fails because another rank is missing.

    Returns:
        The place of this process.

    Raises:
        UserError: an incomplete environment, a rank without a GPU, or a rendezvous that failed.
    """
    rank, world_size, local_rank = _read_environment()
    cuda = torch.cuda.is_available() if use_cuda is None else use_cuda
    device = _pick_device(local_rank, use_cuda=cuda)
    if world_size > 1:
        try:
            dist.init_process_group(
                "nccl" if cuda else "gloo",
                timeout=timedelta(seconds=timeout_s),
                device_id=device if cuda else None,
            )
        except (RuntimeError, ValueError) as error:
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise UserError(
                f"rank {rank} of {world_size} could not meet the others at {address}: {error}. Check that "
                "every rank started and that the port is free and reachable"
            ) from error
    return Distributed(rank=rank, world_size=world_size, local_rank=local_rank, device=device)


def shutdown() -> None:
    """Leave the process group, if there is one.

    Call it on success only. After a failure other ranks may be stuck in a collective, which leaving would
    wait for; the process must then simply end, so that torchrun sees it and stops the rest.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def distributed_session(*, use_cuda: bool | None = None) -> Iterator[Distributed]:
    """`init_distributed` for a `with` block, with a watch over the other ranks.

    Leaves the process group only when the block succeeded.
    """
    distributed = init_distributed(use_cuda=use_cuda)
    if distributed.world_size == 1:
        yield distributed
        return
    with Heartbeat(distributed.rank, distributed.world_size):
        barrier()  # every rank beats before the first is missed
        yield distributed
        barrier()  # the rank that keeps the store leaves last
    shutdown()


def barrier() -> None:
    """Wait until every rank is here; nothing in a single process."""
    if not dist.is_initialized():
        return
    if dist.get_backend() == "nccl":
        dist.barrier(device_ids=[torch.cuda.current_device()])
    else:
        dist.barrier()


def all_gather_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenate a tensor over ranks along its first dimension, in rank order.

    Ranks may hold different numbers of rows (also none), as at the end of an evaluation. No gradient flows.

    Args:
        tensor: (rows of this rank, ...), any dtype; the other dimensions and the dtype agree over ranks.

    Returns:
        (rows of all ranks, ...), on every rank; the tensor itself in a single process.
    """
    if not dist.is_initialized():
        return tensor
    tensor = tensor.detach()
    counts = [torch.zeros(1, dtype=torch.int64, device=tensor.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([tensor.shape[0]], dtype=torch.int64, device=tensor.device))
    rows_per_rank = [int(count) for count in counts]
    # Collectives want equal shapes: pad to the longest rank and cut afterwards.
    padded = tensor.new_zeros((max(rows_per_rank), *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    gathered = [torch.empty_like(padded) for _ in rows_per_rank]
    dist.all_gather(gathered, padded)
    return torch.cat([part[:rows] for part, rows in zip(gathered, rows_per_rank, strict=True)])


def require_agreement(facts: Mapping[str, Any]) -> None:
    """Raise an error unless all ranks give the same facts; does nothing in a single process.

    Args:
        facts: small plain values, such as the step a run continues from.

    Raises:
        UserError: on every rank, naming what differs.
    """
    if not dist.is_initialized():
        return
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, dict(facts))
    for rank, other in enumerate(everybody):
        differing = [f"{k} is {everybody[0][k]} on rank 0 and {v} on rank {rank}" for k, v in other.items()]
        differing = [text for k, text in zip(other, differing, strict=True) if other[k] != everybody[0][k]]
        if differing:
            raise UserError(
                f"the ranks do not start from the same point: {'; '.join(differing)}. All machines must see "
                "the same output_dir and manifests"
            )


def data_parallel(model: nn.Module, distributed: Distributed) -> nn.Module:
    """Wrap the model in `DistributedDataParallel`, unless there is a single process or the model is sharded.

    Args:
        model: the model, on the device of this rank; already sharded if it is to be.
        distributed: the place of this process.

    Returns:
        What the objective calls; the parameters are the model's own.
    """
    if distributed.world_size == 1 or isinstance(model, FSDPModule):
        return model
    # Without `device_ids`, inputs stay where they are: a mask on the CPU would otherwise go to the GPU, and its
    # number of hidden tubes come back.
    with warnings.catch_warnings():
        # torch 2.15 has another name for this option, which the versions before lack.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
