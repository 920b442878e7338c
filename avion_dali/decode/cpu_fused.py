"""`--decoder cpu-fused`: decodes only the needed packets; one filter graph crops, scales and converts to RGB.

Decoders and graphs are kept for the next clip; a process with several threads calls it under `one_thread`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from avion_dali.decode.clip import ClipDecoder
from avion_dali.decode.reading import read_planned, reused_decoder
from avion_dali.decode.rendering import forget_graphs, fused_view


def forget_kept() -> None:
    """Discard the decoders and filter graphs that are kept for the next clip."""
    reused_decoder.cache_clear()
    forget_graphs()


_lock = threading.Lock()


@contextmanager
def one_thread() -> Iterator[None]:
    """Let one thread at a time use what is kept; a decoder that two threads use at once crashes the process.

    Yields:
        Nothing.
    """
    with _lock:
        yield


def _start_anew() -> None:
    """Discard what is kept in a forked child: another thread may have been using it, which the child lacks."""
    global _lock
    _lock = threading.Lock()
    forget_kept()


os.register_at_fork(after_in_child=_start_anew)

decode_clip = ClipDecoder("cpu-fused", read_planned, fused_view, forget=forget_kept)
"""Decodes a clip into an array; only the needed packets are decoded."""
