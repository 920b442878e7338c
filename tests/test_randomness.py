"""Generators against Philox written out, and against numpy's own way of moving along its counter."""

import subprocess
import sys

import numpy as np
import pytest

from avion_dali.data.randomness import generator

MASK = 2**64 - 1
PURPOSES = ("order", "clip", "substitute")


def philox_block(counter: list[int], key: list[int]) -> list[int]:
    """Philox-4x64 with ten rounds (Salmon et al., SC 2011, section 3.3)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        low, high = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (high >> 64) ^ c1 ^ k0, high & MASK, (low >> 64) ^ c3 ^ k1, low & MASK
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(
    ("purpose", "seed", "epoch", "index"),
    [("order", 0, 0, 0), ("clip", 7, 3, 12_345), ("substitute", 2**63 - 1, 10_000, 2**40)],
)
def test_bits_are_philox_of_the_four_numbers(purpose: str, seed: int, epoch: int, index: int) -> None:
    drawn = generator(purpose, seed=seed, epoch=epoch, index=index).bit_generator.random_raw(8)
    blocks = [philox_block([n, index, epoch, PURPOSES.index(purpose)], [seed, 0]) for n in (1, 2)]
    assert drawn.tolist() == [*blocks[0], *blocks[1]]


def test_neighbouring_clips_lie_2_to_the_64_blocks_apart() -> None:
    ahead = np.random.Philox(key=np.array([5, 0], dtype=np.uint64), counter=0)
    ahead.advance((1 << 192) + (2 << 128) + (9 << 64))
    here = generator("clip", seed=5, epoch=2, index=9)
    assert here.bit_generator.random_raw(6).tolist() == ahead.random_raw(6).tolist()


def test_no_two_streams_share_their_first_draws() -> None:
    first = {
        int(generator(purpose, seed=seed, epoch=epoch, index=index).bit_generator.random_raw())
        for purpose in PURPOSES
        for seed in (0, 1, 2)
        for epoch in range(5)
        for index in range(5)
    }
    assert len(first) == 3 * 3 * 5 * 5


def test_each_call_starts_afresh_whatever_was_drawn_before() -> None:
    used = generator("clip", seed=1, epoch=0, index=4)
    used.random(100)
    np.random.seed(3)
    again = generator("clip", seed=1, epoch=0, index=4)
    np.testing.assert_array_equal(again.random(5), generator("clip", seed=1, epoch=0, index=4).random(5))


def test_another_process_draws_the_same() -> None:
    code = (
        "from avion_dali.data.randomness import generator; "
        "print(generator('clip', seed=11, epoch=2, index=77).random(3).tolist())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert run.stdout.strip() == str(generator("clip", seed=11, epoch=2, index=77).random(3).tolist())


def test_first_draws_over_clips_are_uniform() -> None:
    drawn = np.sort([generator("clip", seed=0, epoch=0, index=i).random() for i in range(4000)])
    largest_gap = np.abs(drawn - (np.arange(4000) + 0.5) / 4000).max()
    assert largest_gap < 1.63 / np.sqrt(4000)  # Kolmogorov-Smirnov, 1 %
