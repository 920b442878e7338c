"""`--decoder paper-fused`: AVION's method, which decodes from the keyframe on and fuses the filters."""

from __future__ import annotations

from avion_dali.decode.clip import ClipDecoder
from avion_dali.decode.reading import read_spanned
from avion_dali.decode.rendering import fresh_fused_view

decode_clip = ClipDecoder("paper-fused", read_spanned, fresh_fused_view)
"""Decodes a clip into an array as AVION does (arXiv 2309.16669, section 4.1 and appendix A)."""
