"""Parses the header bits of coded pictures that random access needs; no pixels are decoded.

Two facts are needed of each packet: whether decoding can start there, and whether other pictures refer to it.
H.264 and HEVC state them in the first bytes of their NAL units; for other codecs, the container's keyframe
flag is used. For damaged or unknown packets the result is safe: decoding cannot start there, and they are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from itertools import chain, pairwise

_START_CODE = b"\0\0\1"
_IGNORED, _SLICE, _KEPT = 0, 1, 2  # flags: contains picture data; needed to decode other pictures


class Entry(IntEnum):
    """Whether and how decoding can start at a picture.

    - NONE: decoding cannot start here.
    - OPEN: frames shown at or after this picture are exact; frames shown before it refer to earlier pictures
      (non-IDR recovery points, CRA).
    - CLEAN: no frame that a decoder delivers from here on refers to anything earlier (IDR, BLA, or a keyframe
      of another codec).
    """

    NONE = 0
    OPEN = 1
    CLEAN = 2


@dataclass(frozen=True, slots=True)
class PictureTraits:
    """Properties of a coded picture that random access needs.

    Args:
        entry: how decoding can start here.
        is_reference: False only when it is certain that no other picture of the same temporal layer refers to
            this one, and its packet contains nothing else (parameter sets) that others need.
        layer: temporal sub-layer, >= 0; a picture refers only to pictures of its own and of lower layers. 0 for
            codecs without layers.
    """

    entry: Entry
    is_reference: bool
    layer: int


_traits = cache(PictureTraits)  # millions of packets share a few dozen values
_UNKNOWN = PictureTraits(Entry.NONE, True, 0)


def nal_length_size(codec: str, extradata: bytes) -> int:
    """Return the number of bytes of the length field before each NAL unit of a stream.

    This is lengthSizeMinusOne of the avcC and hvcC records (ISO/IEC 14496-15, sections 5.3.3.1 and 8.3.3.1).

    Args:
        codec: FFmpeg's canonical codec name.
        extradata: the stream's decoder configuration.

    Returns:
        1 to 4, or 0 for units separated by start codes (ITU-T H.264 and H.265, Annex B) and for other codecs.
    """
    if codec == "h264" and len(extradata) >= 7 and extradata[0] == 1:
        return (extradata[4] & 3) + 1
    # Early muxers wrote hvcC version 0; the profile byte after it still distinguishes it from a start code.
    if codec == "hevc" and len(extradata) >= 23 and extradata[0] <= 1 and extradata[:3] > _START_CODE:
        return (extradata[21] & 3) + 1
    return 0


def picture_traits(
    data: bytes | memoryview, *, codec: str, length_size: int, is_keyframe: bool
) -> PictureTraits:
    """Parse the traits of one packet.

    The function returns a result for any bytes, in time linear in their number; usually it only reads up to the
    first slice.

    Args:
        data: the packet's bytes.
        codec: FFmpeg's canonical codec name.
        length_size: bytes of each NAL unit's length, see `nal_length_size`.
        is_keyframe: the container's flag; without it, decoding can only start at IDR pictures of H.264, which
            their headers identify.
    """
    roles = _ROLES.get(codec)
    if roles is None:
        stands_alone = is_keyframe and (codec != "mjpeg" or _brings_tables(bytes(data)))
        return _traits(Entry.CLEAN if stands_alone else Entry.NONE, True, 0)
    units = _prefixed_units(data, length_size) if length_size else _parted_units(bytes(data))
    ahead: list[int] = []
    try:
        for unit in units:
            ahead.append(unit)
            if roles[data[unit]] & _SLICE:
                break
        else:
            return _UNKNOWN
        # The slices of a picture agree, but a packet may contain two fields, which are separate pictures.
        needed = roles[data[unit]] & _KEPT or any(roles[data[u]] & _KEPT for u in chain(ahead, units))
    except ValueError:
        return _UNKNOWN
    if codec == "hevc":
        return _hevc_traits(data[unit], data[unit + 1], is_reference=bool(needed), is_keyframe=is_keyframe)
    return _traits(_h264_entry(data, ahead, length_size=length_size, is_keyframe=is_keyframe), bool(needed), 0)


def split_units(data: bytes, length_size: int) -> Iterator[tuple[int, int]]:
    """Yield the first byte of each NAL unit, its header, and the byte after its last one.

    Args:
        data: the bytes of a packet.
        length_size: bytes of each NAL unit's length, see `nal_length_size`.

    Raises:
        ValueError: when a length is impossible.
    """
    gap = length_size or len(_START_CODE)
    units = _prefixed_units(data, length_size) if length_size else _parted_units(data)
    for unit, following in pairwise(chain(units, [len(data) + gap])):
        yield unit, following - gap


def brings_parameter_sets(data: bytes | memoryview, *, codec: str, length_size: int, known: bytes) -> bool:
    """Return whether a packet contains parameter sets before its slices that are not yet known.

    Decoding from here needs them, and they replace sets with the same number for all following pictures.

    Args:
        data: the packet's bytes.
        codec: FFmpeg's canonical codec name.
        length_size: bytes of each NAL unit's length, see `nal_length_size`.
        known: the stream's extradata.
    """
    roles = _ROLES.get(codec)
    if roles is None:
        return False
    units = _prefixed_units(data, length_size) if length_size else _parted_units(bytes(data))
    gap = length_size or len(_START_CODE)
    try:
        for unit, following in pairwise(units):
            if roles[data[unit]] & _SLICE:
                break
            if roles[data[unit]] == _KEPT and bytes(data[unit : following - gap]).rstrip(b"\0") not in known:
                return True
    except ValueError:
        pass  # damaged: `picture_traits` returns `Entry.NONE` for this packet
    return False


def shows_picture(data: bytes | memoryview, *, codec: str) -> bool:
    """Return whether decoding a packet produces a frame.

    VP8 has pictures that are only references, in separate packets (RFC 6386, section 9.1, show_frame), and so
    may VP9 (bitstream specification 0.6, section 6.2); a VP9 superframe shows one of its pictures. Packets of
    other codecs that contain such pictures also contain one that is shown.

    Args:
        data: the packet's bytes, at least one.
        codec: FFmpeg's canonical codec name.
    """
    if codec == "vp9":
        is_profile_3 = data[0] & 0x30 == 0x30
        flags = data[0] >> (0 if is_profile_3 else 1)  # show_existing_frame, frame_type, show_frame
        return bool(flags & 0b101) or is_superframe(data)
    return codec != "vp8" or bool(data[0] & 0x10)


def is_superframe(data: bytes | memoryview) -> bool:
    """Return whether a VP9 packet has several pictures, one of which is shown (specification 0.6, annex B).

    Args:
        data: the packet's bytes, at least one.
    """
    last = data[-1]
    index_bytes = 2 + ((last >> 3 & 3) + 1) * ((last & 7) + 1)
    return last & 0xE0 == 0xC0 and len(data) >= index_bytes and data[-index_bytes] == last


def _brings_tables(jpeg: bytes) -> bool:
    """Return whether a JPEG picture contains all tables needed to decode it (ITU-T T.81, section B.2).

    Motion JPEG may omit them; a decoder then uses those of earlier pictures.

    Args:
        jpeg: the picture, from its start marker.
    """
    at, found = 2, set[int]()
    while at + 4 <= len(jpeg) and jpeg[at] == 0xFF:
        marker = jpeg[at + 1]
        if marker == 0xDA:  # start of scan: coded data follows
            break
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        found.add(marker)
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return {0xDB, 0xC4} <= found  # quantization and Huffman tables


def _prefixed_units(data: bytes | memoryview, length_size: int) -> Iterator[int]:
    """Yield the position of each NAL unit's header; raise ValueError when a length is impossible."""
    at, end = 0, len(data)
    while at + length_size + 2 <= end:  # shorter units are neither slices nor parameter sets
        size = int.from_bytes(data[at : at + length_size], "big")
        at += length_size
        if not 0 < size <= end - at:
            raise ValueError("damaged NAL unit length")
        yield at
        at += size


def _parted_units(data: bytes) -> Iterator[int]:
    """Yield the position of each NAL unit's header, which follows its start code."""
    at = data.find(_START_CODE)
    while 0 <= at <= len(data) - 5:
        yield at + 3
        at = data.find(_START_CODE, at + 3)


def _h264_role(header: int) -> int:
    """Classify NAL units by their first byte (ITU-T H.264, section 7.4.1 and Table 7-1)."""
    kind = header & 0x1F
    if header & 0x80:  # forbidden_zero_bit: decoders skip such a unit
        return _IGNORED
    if 1 <= kind <= 5:
        return _SLICE | _KEPT if header & 0x60 else _SLICE  # nal_ref_idc
    return _KEPT if kind in (7, 8, 13, 15) else _IGNORED  # parameter sets


def _hevc_role(header: int) -> int:
    """Classify NAL units by their first byte (ITU-T H.265, section 7.4.2.2 and Table 7-1)."""
    kind = header >> 1 & 0x3F
    if header & 0x80:
        return _IGNORED
    if kind < 32:
        return _SLICE if kind < 16 and kind % 2 == 0 else _SLICE | _KEPT  # sub-layer non-reference pictures
    return _KEPT if kind <= 34 else _IGNORED  # parameter sets


_ROLES = {
    "h264": tuple(_h264_role(header) for header in range(256)),
    "hevc": tuple(_hevc_role(header) for header in range(256)),
}


def _hevc_traits(first: int, second: int, *, is_reference: bool, is_keyframe: bool) -> PictureTraits:
    """Parse the two bytes of a slice's NAL header (ITU-T H.265, section 7.3.1.2)."""
    kind, layer = first >> 1, (second & 7) - 1
    if layer < 0:  # nuh_temporal_id_plus1 is never 0
        return _UNKNOWN
    entry = Entry.NONE
    if is_keyframe and 16 <= kind <= 21:
        entry = Entry.OPEN if kind == 21 else Entry.CLEAN  # 16-18 BLA, 19-20 IDR, 21 CRA
    return _traits(entry, is_reference, layer)


def _h264_entry(
    data: bytes | memoryview, units: Sequence[int], *, length_size: int, is_keyframe: bool
) -> Entry:
    """Return how decoding can start at a picture, given its NAL units up to its first slice."""
    if data[units[-1]] & 0x1F == 5:
        return Entry.CLEAN
    if is_keyframe:
        gap = length_size or len(_START_CODE)
        for unit, following in pairwise(units):
            if data[unit] & 0x9F == 6 and _recovers_at_once(bytes(data[unit + 1 : following - gap])):
                return Entry.OPEN
    return Entry.NONE


def _recovers_at_once(message: bytes) -> bool:
    """Return whether SEI messages contain a recovery point (type 6) that is exact from this picture on.

    This requires recovery_frame_cnt == 0, whose Exp-Golomb code is the single bit 1, followed by
    exact_match_flag (ITU-T H.264, sections 7.3.2.3.1, 9.1 and D.2.8). With a count above 0 (gradual intra
    refresh), or with approximate frames, a clip would differ from frames decoded from the start of the file.
    """
    message = message.replace(b"\0\0\3", b"\0\0")  # emulation prevention
    at = 0
    while at < len(message):
        kind, at = _sum_bytes(message, at)
        size, at = _sum_bytes(message, at)
        if kind == 6:
            return 0 < size <= len(message) - at and message[at] & 0xC0 == 0xC0
        at += size
    return False


def _sum_bytes(message: bytes, at: int) -> tuple[int, int]:
    """Read a number stored as bytes of 255 and a last smaller byte; return it and the position after it."""
    total = 0
    while at < len(message) and message[at] == 255:
        total, at = total + 255, at + 1
    return total + (message[at] if at < len(message) else 0), at + 1
