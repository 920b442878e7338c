"""Which samples form which batch: pure functions of (seed, epoch, step, rank)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from avion_dali.contracts import UserError
from avion_dali.data.randomness import generator


@lru_cache(maxsize=1)  # steps come in order, so the epoch before is not asked for again
def epoch_order(num_samples: int, *, seed: int, epoch: int) -> np.ndarray:
    """Return the order of one training epoch: a permutation of all rows, another one each epoch.

    Four bytes per row where they suffice: 35,000,000 rows take 140 MB per rank.

    Args:
        num_samples: rows to order.
        seed: the run's seed.
        epoch: epoch number, >= 0.

    Returns:
        int32 array (num_samples,), int64 from 2^31 rows on, read-only.
    """
    order = np.arange(num_samples, dtype=np.int32 if num_samples <= 1 << 31 else np.int64)
    generator("order", seed=seed, epoch=epoch).shuffle(order)
    order.flags.writeable = False
    return order


@dataclass(frozen=True)
class BatchSchedule:
    """The clips of every micro-batch of one rank.

    In training each sample gives one clip. In evaluation a sample may give several, which are neighbors: clip c
    is clip `c % clips_per_sample` of sample `c // clips_per_sample`.

    Global batch k of an epoch is the same set of clips for any number of ranks and any micro-batch: it is a
    slice of the epoch's order, cut into equal contiguous shares for the ranks, and each share into
    micro-batches.

    Args:
        num_samples: rows of the manifest.
        global_batch: clips per optimizer step over all ranks.
        micro_batch: clips per forward pass on one rank.
        rank: this process.
        world_size: number of processes.
        seed: the run's seed.
        training: shuffle each epoch anew and drop the last partial global batch; else keep the
            manifest's order and drop nothing.
        clips_per_sample: clips made from each row of the manifest; 1 in training.

    Raises:
        UserError: when the sizes do not divide, or a training set is smaller than one global batch.
        ValueError: when several clips per sample are asked for in training.
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
                f"optim.global_batch = {self.global_batch} must be a multiple of optim.micro_batch x ranks "
                f"= {self.micro_batch} x {self.world_size} = {per_pass}; change one of them"
            )
        if self.num_samples == 0 or (self.training and self.num_samples < self.global_batch):
            raise UserError(
                f"the manifest has {self.num_samples} samples, fewer than one global batch "
                f"({self.global_batch}); lower optim.global_batch or add data"
            )

    @property
    def num_clips(self) -> int:
        """Clips to choose from in an epoch over all ranks: `num_samples * clips_per_sample`."""
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
            micro: which micro-batch of the step, in [0, accum_steps).

        Returns:
            The epoch and an int64 array of clip numbers in [0, num_clips), in training the same as sample ids.
            It is shorter than `micro_batch`, or empty, only at the end of an evaluation.
        """
        epoch, batch = divmod(step, self.steps_per_epoch)
        share = self.global_batch // self.world_size
        start = batch * self.global_batch + self.rank * share + micro * self.micro_batch
        stop = start + self.micro_batch
        if not self.training:
            return epoch, np.arange(min(start, self.num_clips), min(stop, self.num_clips))
        return epoch, epoch_order(self.num_samples, seed=self.seed, epoch=epoch)[start:stop].astype(np.int64)
