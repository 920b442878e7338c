import dataclasses

import pytest
import torch

from benchmarks.train.memory import (
    METHODS,
    PARTS,
    REST,
    SavedBytes,
    Subject,
    count,
    draw,
    saved_bytes,
    tables,
)

TINY = Subject(size="tiny", frames=2, frame_size=64)
TOKENS, WIDTH, HEADS, BLOCKS = 1 + 2 * 16, 192, 3, 4
STREAM = TOKENS * WIDTH * 2  # bytes: one bfloat16 number for every token and column


def test_counts_are_those_of_the_formula():
    plain, fused, recomputed = (saved_bytes(TINY, method) for method in METHODS)
    # Of a norm: its input, mean and deviation. The last sees the class token alone, but holds all others.
    norms = (2 * BLOCKS + 2) * STREAM
    assert norms < fused["LayerNorm"] < 1.02 * norms
    # Of a block's attention: its input, queries, keys and values, what comes out, one number a head and token.
    assert fused["attention"] == BLOCKS * (5 * STREAM + HEADS * TOKENS * 4)
    # Of its MLP: its input, and the wide layer before and after the activation.
    assert fused["MLP"] == BLOCKS * 9 * STREAM
    # Written out: the matrix and the scaled queries more.
    matrix = HEADS * TOKENS**2 * 2
    assert plain["attention"] == BLOCKS * (6 * STREAM + matrix)
    assert plain["MLP"] == fused["MLP"] and plain["LayerNorm"] == fused["LayerNorm"]
    # Recomputed: the blocks' inputs. The patches and what is projected are kept in any case.
    assert "attention" not in recomputed and "MLP" not in recomputed
    assert recomputed[REST] - fused[REST] == BLOCKS * STREAM
    assert fused[REST] == 2 * 16 * 768 * 2 + WIDTH * 2


@pytest.fixture(scope="module")
def rows():
    return [count(TINY, method) for method in METHODS]


def test_parts_add_up_and_methods_save(rows):
    for row in rows:
        assert sum(row[f"{part} MiB"] for part in PARTS) == pytest.approx(row["MiB a clip"], abs=0.3)
    assert [row["MiB a clip"] for row in rows] == sorted((row["MiB a clip"] for row in rows), reverse=True)


@pytest.mark.parametrize("encoder", ["timesformer", "videomae"])
def test_every_encoder_is_counted(encoder):
    saved = saved_bytes(dataclasses.replace(TINY, encoder=encoder), METHODS[1])
    assert set(saved) == set(PARTS)


def test_no_memory_is_counted_twice():
    """Three views of one matrix are one matrix."""

    class Views(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = torch.nn.Linear(4, 12, bias=False)

        def forward(self, x):
            a, b, c = self.mlp(x).chunk(3, dim=-1)
            return (a * b * c).sum()

    model = Views()
    saved = SavedBytes(model)
    with saved.watching():
        model(torch.randn(5, 4))
    # The input; then the joint output, and the product of its first two thirds.
    assert dict(saved.by_part) == {"MLP": 5 * 4 * 4, REST: 5 * 12 * 4 + 5 * 4 * 4}


def test_table_and_picture(rows, tmp_path):
    table = tables(rows)
    assert len(table.splitlines()) == 2 + len(rows)
    assert {line.count("|") for line in table.splitlines()} == {len(PARTS) + 4}
    draw(rows).savefig(tmp_path / "memory.png")
    assert (tmp_path / "memory.png").stat().st_size > 1000
