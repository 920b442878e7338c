"""The order of pictures that their headers state is that of the container, and damage is told from it."""

from pathlib import Path

import av
import make_videos as mv
import numpy as np
import pytest
from field_videos import Style, write

from avion_dali.contracts import DecodeError
from avion_dali.data.bitstream import nal_length_size, split_units
from avion_dali.data.picture_order import OrderReader
from avion_dali.data.probe import probe_chunk

B_FRAMES = {"preset": "medium", "threads": "1"}
LAYERS = {"preset": "ultrafast", "x265-params": "log-level=none:keyint=12:bframes=4:temporal-layers=1"}
STYLES = {
    "444.mp4": Style(pix_fmt="yuv444p", options=B_FRAMES),
    "matrices.mkv": Style(options=B_FRAMES | {"x264-params": "cqm=jvt"}),
    "layers.mp4": Style("libx265", options=LAYERS),
    "10bit.mkv": Style("libx265", pix_fmt="yuv420p10le", options=mv.HEVC_FAST),
    "annexb.ts": Style(options=B_FRAMES),
    "annexb-hevc.ts": Style("libx265", options=LAYERS),
}


def reader_of(stream: av.VideoStream) -> OrderReader:
    codec, extradata = stream.codec_context.codec.canonical_name, stream.codec_context.extradata or b""
    return OrderReader(codec, extradata, length_size=nal_length_size(codec, extradata))


def assert_same_order(path: Path) -> None:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        reader = reader_of(stream)
        packets = [packet for packet in container.demux(stream) if packet.size]
        coded = [reader.read(bytes(packet)) for packet in packets]
    assert reader.tells
    by_time = sorted(range(len(packets)), key=lambda i: packets[i].pts)
    assert sorted(range(len(packets)), key=coded.__getitem__) == by_time
    assert len(set(coded)) == len(coded)


@pytest.mark.parametrize(
    "style", ["x264-default", "balanced", "no-b", "intra", "open-gop", "hevc", "mkv", "mov"]
)
def test_headers_and_container_agree(gop_videos: dict[str, Path], style: str) -> None:
    assert_same_order(gop_videos[style])


@pytest.mark.parametrize("name", STYLES)
def test_headers_of_other_kinds(tmp_path: Path, name: str) -> None:
    assert_same_order(write(tmp_path / name, STYLES[name], count=60))


@pytest.mark.parametrize("style", ["vp9", "mjpeg"])
def test_other_codecs_are_not_examined(gop_videos: dict[str, Path], style: str) -> None:
    with av.open(str(gop_videos[style])) as container:
        assert not reader_of(container.streams.video[0]).tells


@pytest.mark.parametrize("style", ["balanced", "hevc"])
def test_any_bytes_have_an_answer(gop_videos: dict[str, Path], style: str) -> None:
    rng = np.random.default_rng(0)
    with av.open(str(gop_videos[style])) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        codec, extradata = context.codec.canonical_name, context.extradata
        packets = [bytes(packet) for packet in container.demux(stream) if packet.size]
    for _ in range(300):
        damaged, data = bytearray(extradata), bytearray(packets[int(rng.integers(len(packets)))])
        for buffer in (damaged, data):
            buffer[int(rng.integers(min(len(buffer), 60)))] = int(rng.integers(256))
        reader = OrderReader(codec, bytes(damaged), length_size=4)
        group, place = reader.read(bytes(data))
        assert isinstance(group, int) and isinstance(place, int)
        assert reader.read(b"") == (0, 0)
        assert not reader.tells


def test_a_length_that_no_count_can_have_is_not_used() -> None:
    """Such a count would need a number of as many bits as memory has."""

    def unit(kind: int, bits: str) -> bytes:
        padded = bits.ljust(-len(bits) % 8 + len(bits), "0")
        return b"\0\0\1" + bytes([kind << 1, 1]) + int(padded, 2).to_bytes(len(padded) // 8, "big")

    for length, tells in (("1", True), ("0" * 48 + "1" * 49, False)):
        sequence = unit(33, "0" * 8 + "01" * 48 + "1" + "010" + "1" * 2 + "0" + "1" * 2 + length + "1")
        reader = OrderReader("hevc", sequence + unit(34, "11" + "00" + "000" + "1"), length_size=0)
        assert reader.read(unit(19, "10" + "1" * 5)) == (int(tells), 0)
        assert reader.tells == tells


def test_units_end_where_the_next_begins() -> None:
    units = [b"\x67abc", b"\x68d", b"\x65efgh"]
    prefixed = b"".join(len(unit).to_bytes(4, "big") + unit for unit in units)
    assert [prefixed[a:b] for a, b in split_units(prefixed, 4)] == units
    parted = b"".join(b"\0\0\1" + unit for unit in units)
    assert [parted[a:b] for a, b in split_units(parted, 0)] == units


@pytest.mark.parametrize("style", ["balanced", "hevc", "open-gop"])
def test_a_damaged_order_is_refused_when_it_is_indexed(
    gop_videos: dict[str, Path], tmp_path: Path, style: str
) -> None:
    data = bytearray(gop_videos[style].read_bytes())
    at = data.rfind(b"ctts") + 12
    first, second = (int.from_bytes(data[at + 8 * i + 4 : at + 8 * i + 8], "big") for i in (0, 1))
    frame = 512  # ticks from one picture to the next; the two pictures change their places
    assert first - frame != second
    data[at + 4 : at + 8] = (second + frame).to_bytes(4, "big")
    data[at + 12 : at + 16] = (first - frame).to_bytes(4, "big")
    path = tmp_path / "v.mp4"
    path.write_bytes(data)
    probe_chunk(path, tolerant=True)
    with pytest.raises(DecodeError, match="states another order of pictures"):
        probe_chunk(path, index=True)
