"""Token ids against vectors of CLIP's own tokenizer, and padding that keeps the end marker."""

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

from avion_dali.data.tokens import (
    CONTEXT_LENGTH,
    END_OF_TEXT,
    batch_length,
    clip_tokenizer,
    cut_to_context,
    cut_to_longest,
    pad_tokens,
)


@pytest.fixture(scope="session")
def encode() -> Callable[[str], tuple[int, ...]]:
    return clip_tokenizer()


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("#C C picks the knife", (49406, 258, 322, 322, 8551, 518, 8960, 49407)),
        ("take plate", (49406, 1172, 5135, 49407)),
        ("it's &amp; 12", (49406, 585, 568, 261, 272, 273, 49407)),
        ("  TAKE \n\t plate ", (49406, 1172, 5135, 49407)),
        ("", (49406, 49407)),
    ],
)
def test_ids_equal_the_recorded_vectors(
    encode: Callable[[str], tuple[int, ...]], text: str, ids: tuple[int, ...]
) -> None:
    assert encode(text) == ids


def test_over_long_text_is_cut_and_keeps_its_end_marker(encode: Callable[[str], tuple[int, ...]]) -> None:
    exact, over = cut_to_context(encode("plate " * 75)), cut_to_context(encode("plate " * 76))
    assert exact == encode("plate " * 75) == over == (49406, *[5135] * 75, END_OF_TEXT)
    assert len(over) == CONTEXT_LENGTH
    assert len(cut_to_context(encode("plate " * 74))) == 76


def test_ids_fit_the_manifest_column(encode: Callable[[str], tuple[int, ...]]) -> None:
    ids = np.array(encode("日本語 café 😀 a\x00b"))
    assert ids.max() == END_OF_TEXT < 2**16
    assert (ids[1:-1] < 49406).all()


def test_importing_the_module_does_not_import_open_clip() -> None:
    code = "import sys, avion_dali.data.tokens; print([m for m in ('open_clip', 'torch') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert run.stdout.strip() == "[]"


def test_padding_is_zeros_on_the_right() -> None:
    padded = pad_tokens([(9, 1, 8), (9, 8), ()], 5)
    assert padded.dtype == np.int64
    assert padded.tolist() == [[9, 1, 8, 0, 0], [9, 8, 0, 0, 0], [0] * 5]


def test_padding_cuts_long_rows_and_keeps_their_last_id() -> None:
    assert pad_tokens([(9, 1, 2, 3, 8)], 5).tolist() == [[9, 1, 2, 3, 8]]
    assert pad_tokens([(9, 1, 2, 3, 8)], 4).tolist() == [[9, 1, 2, 8]]
    assert pad_tokens([(9, 1, 2, 3, 8)], 2).tolist() == [[9, 8]]


def test_padding_of_no_rows() -> None:
    assert pad_tokens([], 4).shape == (0, 4)


@pytest.mark.parametrize(
    ("lengths", "context", "cut"),
    [((2, 16), 77, 16), ((17, 3), 77, 32), ((65,), 77, 77), ((9,), 8, 8), ((2,), 40, 16), ((), 77, 16)],
)
def test_a_batch_is_as_long_as_its_longest_text_in_steps_of_16(lengths, context, cut) -> None:
    rows = [(0,) * (length - 1) + (1,) for length in lengths]
    assert batch_length(rows, context) == cut
    assert cut_to_longest(pad_tokens(rows, context)).shape == (len(rows), cut)
