"""Text to token ids, once, when the manifest is built; open_clip is imported nowhere else on this path."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

CONTEXT_LENGTH = 77
END_OF_TEXT = 49407


def clip_tokenizer() -> Callable[[str], tuple[int, ...]]:
    """Return CLIP's byte-pair encoder (49,408 entries): text to ids with start and end markers.

    The import takes seconds, so it happens here and not with the module.
    """
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()

    def encode(text: str) -> tuple[int, ...]:
        return (tokenizer.sot_token_id, *tokenizer.encode(text), tokenizer.eot_token_id)

    return encode


def cut_to_context(ids: tuple[int, ...]) -> tuple[int, ...]:
    """Cut over-long text to 77 ids; it keeps its end marker (Radford et al., arXiv 2103.00020, section 2.4).

    Args:
        ids: of one text, start and end markers included.
    """
    return ids if len(ids) <= CONTEXT_LENGTH else (*ids[: CONTEXT_LENGTH - 1], ids[-1])


def pad_tokens(rows: Sequence[tuple[int, ...]], context_length: int) -> np.ndarray:
    """Stack token ids into one zero-padded array.

    Args:
        rows: ids of each text, the end marker last.
        context_length: L; longer rows are cut and keep their last id, the end marker.

    Returns:
        int64 array (B, L).
    """
    padded = np.zeros((len(rows), context_length), dtype=np.int64)
    for row, ids in zip(padded, rows, strict=True):
        kept = ids if len(ids) <= context_length else (*ids[: context_length - 1], ids[-1])
        row[: len(kept)] = kept
    return padded
