"""Parses the order in which H.264 and HEVC pictures are shown from their headers; no pixels are decoded.

The container states this order as well. Where both disagree, one of them is damaged, and decoders that follow
the one show other pictures than decoders that follow the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from avion_dali.data.bitstream import split_units

# Slice headers up to the picture order count are shorter, and so are parameter sets up to what is read of them.
_HEADER_BYTES, _PARAMETER_BYTES = 48, 1024
_MOST_COUNT_BITS = 16
_HIGH_PROFILES = frozenset({100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135})


class _UntoldError(ValueError):
    """The headers do not tell the order of pictures in a way that is parsed here."""


class _Bits:
    """Reads the numbers of a header (ITU-T H.264, sections 7.2 and 9.1); zeros follow its end."""

    def __init__(self, data: bytes) -> None:
        data = data.replace(b"\0\0\3", b"\0\0")  # emulation prevention
        self._value, self._left = int.from_bytes(data, "big"), 8 * len(data)

    def fixed(self, count: int) -> int:
        self._left -= count
        if self._left < 0:
            raise _UntoldError("the header ends too early")
        return self._value >> self._left & ((1 << count) - 1)

    def golomb(self) -> int:
        zeros = 0
        while not self.fixed(1):
            zeros += 1
        return (1 << zeros) - 1 + self.fixed(zeros)

    def count_bits(self) -> int:
        """Read the length of picture order counts, of which a damaged header may make any number."""
        length = self.golomb() + 4
        if length > _MOST_COUNT_BITS:
            raise _UntoldError(f"counts of {length} bits")
        return length

    def signed_golomb(self) -> int:
        code = self.golomb()
        return (code + 1) // 2 if code & 1 else -(code // 2)


@dataclass(frozen=True, slots=True)
class _Sequence:
    """What slice headers need of a sequence parameter set.

    Args:
        count_bits: bits of the picture order count in slice headers; 0 if pictures are shown in decode order.
        frame_num_bits: bits of the frame number (H.264).
        has_fields: whether pictures may be fields (H.264).
        has_planes: whether slices name a color plane.
    """

    count_bits: int
    frame_num_bits: int = 0
    has_fields: bool = False
    has_planes: bool = False


@dataclass(frozen=True, slots=True)
class _Picture:
    """What slice headers need of a picture parameter set: its sequence, and bits ahead of the count (HEVC)."""

    sequence: int
    extra_bits: int = 0
    has_output_flag: bool = False


class OrderReader:
    """Reads the place of each picture in presentation order, in decode order of the pictures.

    Args:
        codec: FFmpeg's canonical codec name.
        extradata: the stream's decoder configuration.
        length_size: bytes of each NAL unit's length, see `nal_length_size`.
    """

    def __init__(self, codec: str, extradata: bytes, *, length_size: int) -> None:
        self._codec, self._length_size = codec, length_size
        self._sequences: dict[int, _Sequence] = {}
        self._pictures: dict[int, _Picture] = {}
        self._group = self._count = 0
        self._before = (0, 0)  # upper and lower part of the count of the previous reference picture
        self.tells = codec in ("h264", "hevc")
        try:
            for unit in _configured_units(codec, extradata, length_size) if self.tells else ():
                self._read_parameters(unit)
        except (ValueError, IndexError):
            self.tells = False

    def read(self, data: bytes) -> tuple[int, int]:
        """Return a picture's group, which begins at an IDR or BLA picture, and its place in it.

        Args:
            data: the next packet. Afterwards `tells` is False if the order of this stream is not parsed.
        """
        try:
            for start, end in split_units(data, self._length_size) if self.tells else ():
                unit = data[start : min(end, start + _PARAMETER_BYTES)]
                if self._is_slice(unit):
                    self._count += 1
                    return self._place(unit[:_HEADER_BYTES])
                self._read_parameters(unit)
        except (ValueError, KeyError, IndexError):
            pass
        self.tells = False
        return 0, 0

    def _is_slice(self, unit: bytes) -> bool:
        return unit[0] & 0x1F in (1, 5) if self._codec == "h264" else unit[0] >> 1 & 0x3F < 32

    def _read_parameters(self, unit: bytes) -> None:
        bits = _Bits(unit)
        if self._codec == "h264":
            kind = bits.fixed(8) & 0x1F
            if kind == 7:
                number, sequence = _h264_sequence(bits)
                self._sequences[number] = sequence
            elif kind == 8:
                self._pictures[bits.golomb()] = _Picture(bits.golomb())
            return
        kind = bits.fixed(16) >> 9 & 0x3F
        if kind == 33:
            number, sequence = _hevc_sequence(bits)
            self._sequences[number] = sequence
        elif kind == 34:
            number, sequence_number = bits.golomb(), bits.golomb()
            bits.fixed(1)
            has_output_flag = bool(bits.fixed(1))
            self._pictures[number] = _Picture(sequence_number, bits.fixed(3), has_output_flag)

    def _place(self, unit: bytes) -> tuple[int, int]:
        return self._h264_place(unit) if self._codec == "h264" else self._hevc_place(unit)

    def _h264_place(self, unit: bytes) -> tuple[int, int]:
        """Parse a slice header (ITU-T H.264, section 7.3.3)."""
        bits = _Bits(unit)
        header = bits.fixed(8)
        bits.golomb(), bits.golomb()
        sequence = self._sequences[self._pictures[bits.golomb()].sequence]
        bits.fixed(2 * sequence.has_planes + sequence.frame_num_bits)
        if sequence.has_fields and bits.fixed(1):
            raise _UntoldError("fields")
        is_idr = header & 0x1F == 5
        if is_idr:
            bits.golomb()
            self._group, self._before = self._group + 1, (0, 0)
        if not sequence.count_bits:
            return self._group, self._count
        return self._group, self._whole_count(
            bits.fixed(sequence.count_bits), sequence.count_bits, is_reference=bool(header & 0x60)
        )

    def _hevc_place(self, unit: bytes) -> tuple[int, int]:
        """Parse a slice segment header (ITU-T H.265, section 7.3.6.1)."""
        bits = _Bits(unit)
        header = bits.fixed(16)
        kind, layer = header >> 9 & 0x3F, (header & 7) - 1
        bits.fixed(2 if 16 <= kind <= 23 else 1)
        picture = self._pictures[bits.golomb()]
        sequence = self._sequences[picture.sequence]
        bits.fixed(picture.extra_bits)
        bits.golomb()
        bits.fixed(picture.has_output_flag + 2 * sequence.has_planes)
        if 16 <= kind <= 20:  # BLA and IDR pictures
            self._group, self._before = self._group + 1, (0, 0)
        low = 0 if kind in (19, 20) else bits.fixed(sequence.count_bits)
        if 16 <= kind <= 18:
            self._before = (0, low)
        is_reference = layer == 0 and (kind >= 16 or (kind < 6 and kind % 2 == 1))
        return self._group, self._whole_count(low, sequence.count_bits, is_reference=is_reference)

    def _whole_count(self, low: int, bits: int, *, is_reference: bool) -> int:
        """Complete a picture order count (ITU-T H.264, section 8.2.1.1, and H.265, section 8.3.1)."""
        high, before = self._before
        period = 1 << bits
        if low < before and before - low >= period // 2:
            high += period
        elif low > before and low - before > period // 2:
            high -= period
        if is_reference:
            self._before = (high, low)
        return high + low


def _configured_units(codec: str, extradata: bytes, length_size: int) -> Iterator[bytes]:
    """Yield the parameter sets of an avcC or hvcC record (ISO/IEC 14496-15), or of a byte stream."""
    if not length_size:
        yield from (extradata[start:end] for start, end in split_units(extradata, 0))
        return
    at, arrays = (5, 2) if codec == "h264" else (23, extradata[22])
    for number in range(arrays):
        if codec == "h264":
            count, at = extradata[at] & (0x1F if number == 0 else 0xFF), at + 1
        else:
            count, at = int.from_bytes(extradata[at + 1 : at + 3], "big"), at + 3
        for _ in range(count):
            size = int.from_bytes(extradata[at : at + 2], "big")
            yield extradata[at + 2 : at + 2 + size]
            at += 2 + size


def _h264_sequence(bits: _Bits) -> tuple[int, _Sequence]:
    """Parse a sequence parameter set (ITU-T H.264, section 7.3.2.1.1) after its first byte."""
    profile = bits.fixed(24) >> 16
    number, has_planes = bits.golomb(), False
    if profile in _HIGH_PROFILES:
        chroma = bits.golomb()
        has_planes = chroma == 3 and bool(bits.fixed(1))
        bits.golomb(), bits.golomb(), bits.fixed(1)
        if bits.fixed(1):
            _skip_scaling(bits, lists=12 if chroma == 3 else 8)
    frame_num_bits = bits.golomb() + 4
    kind = bits.golomb()
    if kind == 1:
        raise _UntoldError("counts that follow a table")
    count_bits = bits.count_bits() if kind == 0 else 0
    bits.golomb(), bits.fixed(1), bits.golomb(), bits.golomb()
    return number, _Sequence(count_bits, frame_num_bits, not bits.fixed(1), has_planes)


def _skip_scaling(bits: _Bits, *, lists: int) -> None:
    """Skip scaling matrices (ITU-T H.264, section 7.3.2.1.1.1)."""
    for number in range(lists):
        last = following = 8
        for _ in range((16 if number < 6 else 64) * bits.fixed(1)):
            if following:
                following = (last + bits.signed_golomb()) % 256
            last = following or last


def _hevc_sequence(bits: _Bits) -> tuple[int, _Sequence]:
    """Parse a sequence parameter set (ITU-T H.265, section 7.3.2.2.1) after its first two bytes."""
    layers = bits.fixed(8) >> 1 & 7
    bits.fixed(96)
    present = [bits.fixed(2) for _ in range(layers)]
    bits.fixed(2 * (8 - layers) if layers else 0)
    for flags in present:
        bits.fixed(88 * (flags >> 1) + 8 * (flags & 1))
    number, chroma = bits.golomb(), bits.golomb()
    has_planes = chroma == 3 and bool(bits.fixed(1))
    bits.golomb(), bits.golomb()
    if bits.fixed(1):
        bits.golomb(), bits.golomb(), bits.golomb(), bits.golomb()
    bits.golomb(), bits.golomb()
    return number, _Sequence(bits.count_bits(), has_planes=has_planes)
