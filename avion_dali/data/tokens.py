"""Converts texts to token ids when a manifest is built; loading and training do not import open_clip."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

CONTEXT_LENGTH = 77
END_OF_TEXT = 49407
LENGTH_STEP = 16


def clip_tokenizer() -> Callable[[str], tuple[int, ...]]:
    """Return CLIP's byte-pair encoder (49,408 entries), which maps a text to ids with start and end markers.

    The import takes seconds, so it happens in this function.
    """
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()

    def encode(text: str) -> tuple[int, ...]:
        return (tokenizer.sot_token_id, *tokenizer.encode(text), tokenizer.eot_token_id)

    return encode


def cut_to_context(ids: tuple[int, ...]) -> tuple[int, ...]:
    """Truncate a text to 77 ids; the end marker is kept (Radford et al., arXiv 2103.00020, section 2.4).

    Args:
        ids: token ids of one text, including start and end markers.
    """
    return ids if len(ids) <= CONTEXT_LENGTH else (*ids[: CONTEXT_LENGTH - 1], ids[-1])


def batch_length(rows: Sequence[tuple[int, ...]], context_length: int) -> int:
    """Return a length to which the texts of a batch may be cut.

    A causal text tower gives the same vectors at every length that no text exceeds. Steps of 16 keep the number
    of different shapes small.

    Args:
        rows: ids of each text.
        context_length: largest length.

    Returns:
        The length of the longest text, rounded up to a multiple of 16, at most `context_length`.
    """
    return _in_steps(max((len(ids) for ids in rows), default=0), context_length)


def cut_to_longest(tokens_BL: np.ndarray) -> np.ndarray:
    """Cut the padding that all texts of a batch have in common, see `batch_length`.

    Args:
        tokens_BL: int64 (B, L), zero-padded; the last id of a text is the end marker, which is not 0.

    Returns:
        A view of the first columns, at least one.
    """
    used = np.flatnonzero(tokens_BL.any(axis=0))
    longest = int(used[-1]) + 1 if len(used) else 0
    return tokens_BL[:, : _in_steps(longest, tokens_BL.shape[1])]


def _in_steps(longest: int, context_length: int) -> int:
    return min(context_length, -(-max(1, longest) // LENGTH_STEP) * LENGTH_STEP)


def pad_tokens(rows: Sequence[tuple[int, ...]], context_length: int) -> np.ndarray:
    """Stack token ids into one zero-padded array.

    Args:
        rows: ids of each text, with the end marker last.
        context_length: L; longer rows are truncated but keep their last id, the end marker.

    Returns:
        int64 array (B, L).
    """
    padded = np.zeros((len(rows), context_length), dtype=np.int64)
    for row, ids in zip(padded, rows, strict=True):
        kept = ids if len(ids) <= context_length else (*ids[: context_length - 1], ids[-1])
        row[: len(kept)] = kept
    return padded
