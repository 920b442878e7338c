"""Counter-based random numbers: one generator per clip, independent of worker, rank and resume point."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.random.bit_generator import ISeedSequence

Purpose = Literal["order", "clip", "substitute"]
_PURPOSES: dict[Purpose, int] = {"order": 0, "clip": 1, "substitute": 2}


def generator(purpose: Purpose, *, seed: int, epoch: int, index: int = 0) -> np.random.Generator:
    """Return the generator that belongs to (purpose, seed, epoch, index), whoever asks and whenever.

    Philox (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3") maps a key and a
    counter to random bits without any state, so these four numbers are the whole history.

    Args:
        purpose: what is drawn; different purposes never share numbers.
        seed: the run's seed, in [0, 2^63).
        epoch: epoch number, >= 0.
        index: sample id, or 0 for draws that belong to the epoch.
    """
    # The lowest counter word advances while drawing; the other three name the stream.
    counter = np.array([0, index, epoch, _PURPOSES[purpose]], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(_key(seed), counter=counter))


class _Key(ISeedSequence):
    """A seed as Philox's key. `Philox(key=...)` is the same, but gathers entropy first and throws it away."""

    def __init__(self, seed: int) -> None:
        self._key = np.array([seed, 0], dtype=np.uint64)

    def generate_state(self, _n_words: int, _dtype: Any = np.uint32) -> np.ndarray:
        """Return the key; Philox asks for it once, as two 64-bit words."""
        return self._key


_key: Callable[[int], Any] = lru_cache(maxsize=16)(_Key)
