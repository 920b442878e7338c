"""What DALI would count wrongly is recognised, and nothing else."""

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_reading import chunk_ref

from avion_dali.contracts import ClipPart
from avion_dali.decode.source import PartPackets, gather_packets
from pipelines.codecs import DECODABLE, holds_two_fields, require_decodable, shows_one_picture
from pipelines.mini_clip import UnfitForMiniClipError, build_mini_clip


def packets_of(path: Path, frame_ids: tuple[int, ...] = (10, 40, 80)) -> PartPackets:
    return gather_packets(ClipPart(chunk_ref(path), frame_ids), decoder="dali")


@pytest.mark.parametrize("style", ["balanced", "x264-default", "intra", "hevc", "vp9", "mjpeg"])
def test_usual_videos_fit_the_devices_that_decode_them(gop_videos: dict[str, Path], style: str) -> None:
    part = packets_of(gop_videos[style])
    for device, codecs in DECODABLE.items():
        if part.stream.codec in codecs:
            require_decodable([part], device=device)
        else:
            with pytest.raises(UnfitForMiniClipError, match=f"does not decode {part.stream.codec} "):
                require_decodable([part], device=device)


def test_what_is_decodable_fits_a_mini_clip(gop_videos: dict[str, Path]) -> None:
    """Two lists of codecs that must not drift apart."""
    known = set.union(*map(set, DECODABLE.values()))
    for style in ("balanced", "vp9", "mjpeg"):
        part = packets_of(gop_videos[style])
        known.discard(part.stream.codec)
        build_mini_clip([part])
    assert known == {"hevc", "vp8"}  # made by other tests


def with_payload(part: PartPackets, payload: bytes) -> PartPackets:
    """The packets with another second one."""
    (run, *others) = part.runs
    return replace(part, runs=(replace(run, payloads=(run.payloads[0], payload, *run.payloads[2:])), *others))


@pytest.mark.parametrize(("width", "height"), [(128, 95), (127, 96)])
def test_odd_sizes_do_not_fit_nvdec(gop_videos: dict[str, Path], width: int, height: int) -> None:
    part = packets_of(gop_videos["vp9"])
    require_decodable([part], device="mixed")
    odd = replace(part, stream=replace(part.stream, width=width, height=height))
    require_decodable([odd], device="cpu")
    with pytest.raises(UnfitForMiniClipError, match=f"odd side .{width}x{height}."):
        require_decodable([odd], device="mixed")


def test_hidden_pictures_of_vp9_do_not_fit_nvdec(gop_videos: dict[str, Path]) -> None:
    part = packets_of(gop_videos["vp9"])
    first, second, *_ = part.runs[0].payloads
    index = bytes([0xC9, *len(first).to_bytes(2, "little"), *len(second).to_bytes(2, "little"), 0xC9])
    packed = with_payload(part, first + second + index)
    require_decodable([packed], device="cpu")
    with pytest.raises(UnfitForMiniClipError, match="hidden"):
        require_decodable([packed], device="mixed")


def test_superframes_are_told_from_payloads_that_end_alike() -> None:
    shown, hidden, existing = b"\x82abc", b"\x80abc", b"\x88"
    index = bytes([0xC1, 4, 4, 0xC1])  # two pictures of 4 bytes
    assert shows_one_picture(shown)
    assert not shows_one_picture(hidden)
    assert not shows_one_picture(existing)
    assert not shows_one_picture(hidden + shown + index)
    assert shows_one_picture(shown + b"\xc1")
    assert shows_one_picture(shown + bytes(2) + b"\xc1")


def nal(kind: int, first_macroblock_is_0: bool) -> bytes:
    body = bytes([0x60 | kind, 0x80 if first_macroblock_is_0 else 0x40, 1, 2, 3])
    return struct.pack(">I", len(body)) + body


@pytest.mark.parametrize(
    ("units", "two"),
    [
        ([(5, True)], False),
        ([(7, True), (8, True), (6, True), (5, True)], False),
        ([(1, True), (1, False), (1, False)], False),
        ([(1, True), (1, True)], True),
        ([(6, False), (5, True), (1, True)], True),
        ([(1, True), (1, False), (1, True), (1, False)], True),
    ],
)
def test_fields_are_told_from_slices(units: list[tuple[int, bool]], two: bool) -> None:
    assert holds_two_fields(b"".join(nal(*unit) for unit in units), 4) == two


def test_interlaced_h264_does_not_fit_nvdec(gop_videos: dict[str, Path]) -> None:
    part = packets_of(gop_videos["balanced"])
    first = part.runs[0].payloads[0]
    with pytest.raises(UnfitForMiniClipError, match="interlaced"):
        require_decodable([with_payload(part, first + first)], device="mixed")


def test_damaged_lengths_end_the_search() -> None:
    rng = np.random.default_rng(0)
    for size in range(40):
        holds_two_fields(rng.bytes(size), 4)
    assert not holds_two_fields(b"", 4)
    assert not holds_two_fields(b"\0" * 40, 4)
