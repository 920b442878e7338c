"""The rank of this process among all processes of a run, and the collectives that the engine needs.

A single process works without a process group, and every function here then acts locally. Several processes are
started by `torchrun`, whose environment variables are read by `init_distributed`.
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
"""Seconds that a rank waits for ranks that are alive but busy; longer than writing a large checkpoint takes.
`heartbeat.py` detects dead or stopped ranks much earlier."""


@dataclass(frozen=True)
class Distributed:
    """This process among all processes of the run.

    Args:
        rank: number of this process over all machines.
        world_size: number of processes.
        local_rank: number of this process on its machine; selects its GPU.
        device: device of this process.
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
    """Return (rank, world size, local rank) as torchrun sets them; (0, 1, 0) without torchrun."""
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
    """Return the GPU of this local rank and make it the current device, or return the CPU."""
    if not use_cuda:
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no GPU, because this machine has {torch.cuda.device_count()}; "
            "lower --nproc_per_node or check CUDA_VISIBLE_DEVICES"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def init_distributed(*, use_cuda: bool | None = None, timeout_s: float = COLLECTIVE_TIMEOUT_S) -> Distributed:
    """Read torchrun's environment, select the device and, with several processes, join the process group.

    Args:
        use_cuda: compute on GPUs (NCCL) or on the CPU (gloo); None uses GPUs if there are any.
        timeout_s: seconds until joining or a collective fails because another rank is missing.

    Returns:
        This process among all processes of the run.

    Raises:
        UserError: the environment is incomplete, a rank has no GPU, or the rendezvous failed.
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
                f"rank {rank} of {world_size} could not join the process group at {address}: {error}. Check "
                "that every rank has started and that the port is free and reachable"
            ) from error
    return Distributed(rank=rank, world_size=world_size, local_rank=local_rank, device=device)


def shutdown() -> None:
    """Leave the process group, if there is one.

    Call it only on success. After a failure, other ranks may be blocked in a collective, for which this
    function would wait; the process must then end directly, so that torchrun stops the others.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def distributed_session(*, use_cuda: bool | None = None) -> Iterator[Distributed]:
    """Run `init_distributed` for a `with` block and watch the other ranks with a `Heartbeat`.

    The process group is left only if the block succeeds.
    """
    distributed = init_distributed(use_cuda=use_cuda)
    if distributed.world_size == 1:
        yield distributed
        return
    with Heartbeat(distributed.rank, distributed.world_size):
        barrier()  # every heartbeat has started before any rank can be considered dead
        yield distributed
        barrier()  # the rank that hosts the store leaves last
    shutdown()


def barrier() -> None:
    """Wait until every rank has called this function; do nothing in a single process."""
    if not dist.is_initialized():
        return
    if dist.get_backend() == "nccl":
        dist.barrier(device_ids=[torch.cuda.current_device()])
    else:
        dist.barrier()


def all_gather_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenate a tensor over ranks along its first dimension, in rank order.

    Ranks may hold different numbers of rows, including none, as at the end of an evaluation. Gradients are not
    propagated.

    Args:
        tensor: (rows of this rank, ...), any dtype; the other dimensions and the dtype are equal on all ranks.

    Returns:
        (rows of all ranks, ...), on every rank; the tensor itself in a single process.
    """
    if not dist.is_initialized():
        return tensor
    tensor = tensor.detach()
    counts = [torch.zeros(1, dtype=torch.int64, device=tensor.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([tensor.shape[0]], dtype=torch.int64, device=tensor.device))
    rows_per_rank = [int(count) for count in counts]
    # Collectives need equal shapes, so tensors are padded to the largest number of rows and cut afterwards.
    padded = tensor.new_zeros((max(rows_per_rank), *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    gathered = [torch.empty_like(padded) for _ in rows_per_rank]
    dist.all_gather(gathered, padded)
    return torch.cat([part[:rows] for part, rows in zip(gathered, rows_per_rank, strict=True)])


def require_agreement(facts: Mapping[str, Any]) -> None:
    """Raise an error unless all ranks give the same facts; do nothing in a single process.

    Args:
        facts: small plain values, such as the step from which a run continues.

    Raises:
        UserError: on every rank, if facts differ; names those that differ.
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
        model: the model, on the device of this rank, sharded before if sharding is configured.
        distributed: this process among all processes of the run.

    Returns:
        The module that the objective calls; its parameters are those of the model.
    """
    if distributed.world_size == 1 or isinstance(model, FSDPModule):
        return model
    # Without `device_ids`, inputs stay on their devices. Otherwise a mask on the CPU would be copied to the
    # GPU, and reading its number of hidden tubes would wait for the device.
    with warnings.catch_warnings():
        # torch 2.15 renames this option; earlier versions do not have the new name.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
