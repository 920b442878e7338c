"""Determines which samples form which batch, as pure functions of (seed, epoch, step, rank)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from avion_dali.contracts import UserError
from avion_dali.data.randomness import generator


@lru_cache(maxsize=1)  # steps are requested in order, so earlier epochs are not needed again
def epoch_order(num_samples: int, *, seed: int, epoch: int) -> np.ndarray:
    """Return the order of one training epoch: a different permutation of all rows for each epoch.

    Four bytes per row are used if they suffice: 35,000,000 rows take 140 MB per rank.

    Args:
        num_samples: number of rows.
        seed: the run's seed.
        epoch: epoch number, >= 0.

    Returns:
        int32 array (num_samples,), or int64 from 2^31 rows on; read-only.
    """
    order = np.arange(num_samples, dtype=np.int32 if num_samples <= 1 << 31 else np.int64)
    generator("order", seed=seed, epoch=epoch).shuffle(order)
    order.flags.writeable = False
    return order


@dataclass(frozen=True)
class BatchSchedule:
    """Determines the clips of every micro-batch of one rank.

    In training, each sample has one clip. In evaluation, a sample may have several, which are neighbors: clip c
    is clip `c % clips_per_sample` of sample `c // clips_per_sample`.

    Global batch k of an epoch consists of the same clips for any number of ranks and any micro-batch: it is a
    slice of the epoch's order, which is divided into equal contiguous parts for the ranks, and each part into
    micro-batches.

    Args:
        num_samples: rows of the manifest.
        global_batch: clips per optimizer step over all ranks.
        micro_batch: clips per forward pass on one rank.
        rank: rank of this process.
        world_size: number of processes.
        seed: the run's seed.
        training: True shuffles each epoch and drops the last partial global batch; False keeps the order of the
            manifest and drops nothing.
        clips_per_sample: clips per row of the manifest; 1 in training.

    Raises:
        UserError: when the sizes are not divisible, or a training set is smaller than one global batch.
        ValueError: when several clips per sample are requested in training.
    """

    num_samples: int
    global_batch: int
    micro_batch: int
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    training: bool = True
    clips_per_sample: int = 1

    def __post_init__(self) -> None:
        if self.training and self.clips_per_sample != 1:
            raise ValueError(f"training takes one clip per sample, not {self.clips_per_sample}")
        per_pass = self.micro_batch * self.world_size
        if self.global_batch % per_pass:
            raise UserError(
                f"`global_batch` = {self.global_batch} must be a multiple of `micro_batch` x ranks "
                f"= {self.micro_batch} x {self.world_size} = {per_pass}; change one of them"
            )
        if self.num_samples == 0 or (self.training and self.num_samples < self.global_batch):
            raise UserError(
                f"the manifest has {self.num_samples} samples, fewer than one global batch "
                f"({self.global_batch}); lower `global_batch` or add data"
            )

    @property
    def num_clips(self) -> int:
        """Number of clips of all ranks in an epoch before dropping: `num_samples * clips_per_sample`."""
        return self.num_samples * self.clips_per_sample

    @property
    def accum_steps(self) -> int:
        """Micro-batches per optimizer step on each rank."""
        return self.global_batch // (self.micro_batch * self.world_size)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
        full, rest = divmod(self.num_clips, self.global_batch)
        return full if self.training or not rest else full + 1

    def micro_batch_ids(self, step: int, micro: int) -> tuple[int, np.ndarray]:
        """Return (epoch, clips) of one micro-batch of this rank.

        Args:
            step: optimizer step counted over all epochs.
            micro: index of the micro-batch in the step, in [0, accum_steps).

        Returns:
            The epoch and an int64 array of clip indices in [0, num_clips); in training, these are sample ids.
            The array is shorter than `micro_batch`, or empty, only at the end of an evaluation.
        """
        epoch, batch = divmod(step, self.steps_per_epoch)
        share = self.global_batch // self.world_size
        start = batch * self.global_batch + self.rank * share + micro * self.micro_batch
        stop = start + self.micro_batch
        if not self.training:
            return epoch, np.arange(min(start, self.num_clips), min(stop, self.num_clips))
        return epoch, epoch_order(self.num_samples, seed=self.seed, epoch=epoch)[start:stop].astype(np.int64)
