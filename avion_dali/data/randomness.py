"""Counter-based random numbers: one generator per clip, independent of workers, ranks and resumption."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.random.bit_generator import ISeedSequence

Purpose = Literal["order", "clip", "substitute"]
_PURPOSES: dict[Purpose, int] = {"order": 0, "clip": 1, "substitute": 2}


def generator(purpose: Purpose, *, seed: int, epoch: int, index: int = 0) -> np.random.Generator:
    """Return the generator of (purpose, seed, epoch, index); it depends on nothing else.

    Philox (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3") maps a key and a
    counter to random bits without any state, so these four values determine all numbers.

    Args:
        purpose: what the numbers are for; different purposes never share numbers.
        seed: the run's seed, in [0, 2^63).
        epoch: epoch number, >= 0.
        index: sample id, or 0 for draws that belong to the epoch.
    """
    # The lowest word of the counter advances with each draw; the other three identify the stream.
    counter = np.array([0, index, epoch, _PURPOSES[purpose]], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(_key(seed), counter=counter))


class _Key(ISeedSequence):
    """A seed as a key of Philox, as for `Philox(key=...)`, which also gathers entropy without using it."""

    def __init__(self, seed: int) -> None:
        self._key = np.array([seed, 0], dtype=np.uint64)

    def generate_state(self, _n_words: int, _dtype: Any = np.uint32) -> np.ndarray:
        """Return the key; Philox requests it once, as two 64-bit words."""
        return self._key


_key: Callable[[int], Any] = lru_cache(maxsize=16)(_Key)
