"""`--decoder cpu-fused`: decodes only the needed packets; one filter graph crops, scales and converts to RGB.

Decoders and graphs are kept for the next clip, so each process must call this decoder from one thread.
"""

from __future__ import annotations

from avion_dali.decode.clip import ClipDecoder
from avion_dali.decode.reading import read_planned, reused_decoder
from avion_dali.decode.rendering import forget_graphs, fused_view


def forget_kept() -> None:
    """Discard the decoders and filter graphs that are kept for the next clip."""
    reused_decoder.cache_clear()
    forget_graphs()


decode_clip = ClipDecoder("cpu-fused", read_planned, fused_view, forget=forget_kept)
"""Decodes a clip into an array; only the needed packets are decoded."""
