"""Random numbers for operations on the device, as a pure function of (seed, step, sample).

A few numbers per clip are drawn on the CPU. They do not depend on the kind of device, the number of ranks, or
the division of a batch into micro-batches, and a second forward pass repeats them.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

Purpose = Literal["mask", "augment", "erase", "mix"]
_PURPOSES: dict[Purpose, int] = {"mask": 0, "augment": 1, "erase": 2, "mix": 3}


class StepKey(NamedTuple):
    """Identifies one optimizer step of one run."""

    seed: int
    step: int


def step_generator(purpose: Purpose, key: StepKey, *, index: int = 0) -> np.random.Generator:
    """Return the generator of (purpose, seed, step, index).

    Philox (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3") maps a key and a counter to
    random bits without any state.

    Args:
        purpose: what the numbers are used for; different purposes have independent streams.
        key: seed and optimizer step.
        index: sample id times views plus view, or 0 for numbers that a whole step shares.
    """
    counter = np.array([0, index, key.step, _PURPOSES[purpose]], dtype=np.uint64)
    # The second key word separates these streams from those of the planner.
    return np.random.Generator(np.random.Philox(key=np.array([key.seed, 1], dtype=np.uint64), counter=counter))
