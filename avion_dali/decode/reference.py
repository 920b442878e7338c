"""`--decoder reference`: decodes the whole file, converts full frames, then crops and resizes arrays."""

from __future__ import annotations

from avion_dali.decode.clip import ClipDecoder
from avion_dali.decode.reading import read_everything
from avion_dali.decode.rendering import ReferenceView

decode_clip = ClipDecoder("reference", read_everything, ReferenceView)
"""Decodes a clip into an array without optimizations."""
