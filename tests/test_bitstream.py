"""Bitstream headers: properties of real streams with libavcodec as the judge, then hand-made packets."""

import random
from dataclasses import dataclass
from pathlib import Path

import av
import pytest
from av.bitstream import BitStreamFilterContext
from make_videos import VP9_FAST, X264_FAST, write_video

from avion_dali.data.bitstream import Entry, PictureTraits, nal_length_size, picture_traits

X264 = {"preset": "medium", "threads": "1"}
HEVC = "log-level=none:pools=none:frame-threads=1:keyint=15:min-keyint=15:b-adapt=0:b-pyramid=1:"
OPEN_GOP = "open-gop=1:keyint=15:min-keyint=15:bframes=4:scenecut=0:b-adapt=0"
FLAT = "b-pyramid=none:bframes=7:keyint=24:min-keyint=24:scenecut=0:b-adapt=0"


def x264(params: str, **more: str) -> tuple[str, dict[str, str]]:
    return "libx264", X264 | {"x264-params": params} | more


def x265(params: str) -> tuple[str, dict[str, str]]:
    return "libx265", {"preset": "ultrafast", "x265-params": HEVC + params}


STYLES: dict[str, tuple[str, tuple[str, dict[str, str]]]] = {
    "h264-pyramid": ("mp4", x264("keyint=24:b-adapt=0:bframes=4")),
    "h264-flat": ("mp4", x264(FLAT)),
    "h264-slices": ("mkv", x264("slices=3:keyint=24:scenecut=0")),
    "h264-interlaced": ("mp4", x264("keyint=24:scenecut=0:bframes=3", flags="+ildct+ilme")),
    "h264-open": ("mp4", x264(OPEN_GOP)),
    "h264-open-ts": ("ts", x264(OPEN_GOP)),
    "h264-refresh": ("mp4", x264("intra-refresh=1:keyint=15:bframes=2")),
    "h264-mkv": ("mkv", ("libx264", X264_FAST | {"g": "15"})),
    "h264-avi": ("avi", ("libx264", X264_FAST | {"g": "15", "bf": "0"})),
    "hevc-open": ("mp4", x265("open-gop=1:bframes=4")),
    "hevc-open-ts": ("ts", x265("open-gop=1:bframes=4")),
    "hevc-layers": ("mp4", x265("open-gop=1:temporal-layers=3:bframes=7:rc-lookahead=10")),
    "hevc-radl": ("mkv", x265("open-gop=0:radl=2:bframes=4:repeat-headers=1")),
    "vp9": ("webm", ("libvpx-vp9", VP9_FAST | {"g": "15"})),
    "mjpeg": ("mov", ("mjpeg", {"q": "3"})),
    "mpeg4": ("avi", ("mpeg4", {"g": "15"})),
}
OPEN_STYLES = ["h264-open", "h264-open-ts", "hevc-open", "hevc-open-ts", "hevc-layers"]
NAL_STYLES = [name for name in STYLES if name.startswith("h")]
# Where every packet has its own time, so that frames can be told apart.
TIMED_STYLES = [name for name, (ending, _) in STYLES.items() if ending != "avi"]
JUDGED_STYLES = [name for name in NAL_STYLES if name in TIMED_STYLES]


@dataclass(frozen=True)
class Stream:
    path: Path
    codec: str
    extradata: bytes
    data: list[bytes]
    pts: list[int]
    keys: list[bool]
    traits: list[PictureTraits]

    @property
    def layers(self) -> list[int]:
        return [t.layer for t in self.traits]

    @property
    def entries(self) -> list[Entry]:
        return [t.entry for t in self.traits]

    @property
    def droppable(self) -> list[int]:
        return [i for i, t in enumerate(self.traits) if not t.is_reference]

    def decode(self, positions) -> dict[int, bytes]:
        """Pixels of every frame that a fresh libavcodec decoder makes of these packets, by time."""
        context = av.CodecContext.create(self.codec, "r")
        context.extradata, context.thread_count = self.extradata or None, 1
        frames = []
        for position in positions:
            packet = av.Packet(self.data[position])
            packet.pts = self.pts[position]
            frames += context.decode(packet)
        frames += context.decode(None)
        assert len({frame.pts for frame in frames}) == len(frames)
        return {frame.pts: frame.to_ndarray().tobytes() for frame in frames}

    def from_entry(self, entry: int, *, leading: bool) -> list[int]:
        """Positions from an entry on, with or without the frames shown before it."""
        later = range(entry, len(self.data))
        return [i for i in later if leading or self.pts[i] >= self.pts[entry]]

    def expected(self, positions) -> dict[int, bytes]:
        """What sequential decoding shows for these packets."""
        whole = self.decode(range(len(self.data)))
        return {pts: whole[pts] for pts in (self.pts[i] for i in positions)}


def read_stream(path: Path) -> Stream:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        codec, extradata = stream.codec_context.codec.canonical_name, stream.codec_context.extradata or b""
        packets = [packet for packet in container.demux(stream) if packet.size]
    data, keys = [bytes(p) for p in packets], [p.is_keyframe for p in packets]
    size = nal_length_size(codec, extradata)
    traits = [
        picture_traits(d, codec=codec, length_size=size, is_keyframe=k) for d, k in zip(data, keys, strict=True)
    ]
    return Stream(path, codec, extradata, data, [p.pts for p in packets], keys, traits)


@pytest.fixture(scope="module")
def streams(tmp_path_factory) -> dict[str, Stream]:
    folder = tmp_path_factory.mktemp("bitstream")
    made = {}
    for name, (ending, (codec, options)) in STYLES.items():
        pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        path = write_video(
            folder / f"{name}.{ending}", frames=50, size=(96, 64), codec=codec, options=options, pix_fmt=pix_fmt
        )
        made[name] = read_stream(path)
    return made


def droppable_set(stream: Stream, rng: random.Random) -> set[int]:
    """A random choice of pictures that nobody needs, the highest temporal layer first."""
    dropped: set[int] = set()
    for layer in range(max(stream.layers), -1, -1):
        free = [i for i in stream.droppable if stream.layers[i] == layer]
        dropped |= set(free) if rng.random() < 0.5 else {i for i in free if rng.random() < 0.7}
        if any(stream.layers[i] == layer for i in range(len(stream.data)) if i not in dropped):
            break  # what is kept of this layer may lean on the layers below
    return dropped


@pytest.mark.parametrize("style", JUDGED_STYLES)
def test_dropping_what_nobody_references_changes_no_other_frame(streams, style):
    stream, rng = streams[style], random.Random(style)
    assert len(stream.droppable) >= 8
    for _ in range(4):
        dropped = droppable_set(stream, rng)
        kept = [i for i in range(len(stream.data)) if i not in dropped]
        assert stream.decode(kept) == stream.expected(kept)


def test_no_picture_leans_on_a_higher_layer(streams):
    stream = streams["hevc-layers"]
    for top in range(max(stream.layers)):
        kept = [i for i, layer in enumerate(stream.layers) if layer <= top]
        assert 3 <= len(kept) < len(stream.data)
        assert stream.decode(kept) == stream.expected(kept)


@pytest.mark.parametrize("style", TIMED_STYLES)
def test_decoding_from_any_entry_equals_sequential_decoding(streams, style):
    stream = streams[style]
    entries = [i for i, entry in enumerate(stream.entries) if entry]
    assert entries[0] == 0 and (len(entries) >= 3 or style == "h264-refresh")
    for entry in entries:
        positions = stream.from_entry(entry, leading=stream.entries[entry] is Entry.CLEAN)
        assert stream.decode(positions) == stream.expected(positions)


@pytest.mark.parametrize("style", JUDGED_STYLES)
def test_dropping_a_reference_changes_other_frames(streams, style):
    stream = streams[style]  # the judge finds fault with what the traits forbid
    assert stream.traits[1].is_reference
    kept = [0, *range(2, len(stream.data))]
    assert stream.decode(kept) != stream.expected(kept)


@pytest.mark.parametrize("style", OPEN_STYLES)
def test_frames_shown_before_an_open_entry_need_what_came_before(streams, style):
    stream = streams[style]
    entry = stream.entries.index(Entry.OPEN)
    positions = stream.from_entry(entry, leading=True)
    assert any(stream.pts[i] < stream.pts[entry] for i in positions)
    assert stream.decode(positions) != stream.expected(positions)


def test_keyframes_of_gradual_refresh_are_no_entries(streams):
    stream = streams["h264-refresh"]
    flagged = [i for i, key in enumerate(stream.keys) if key]
    assert len(flagged) >= 3
    assert [stream.entries[i] for i in flagged] == [Entry.CLEAN] + [Entry.NONE] * (len(flagged) - 1)
    positions = stream.from_entry(flagged[1], leading=False)
    assert stream.decode(positions) != stream.expected(positions)


@pytest.mark.parametrize("style", [name for name in STYLES if name != "h264-refresh"])
def test_every_keyframe_is_an_entry_of_the_right_kind(streams, style):
    stream = streams[style]
    kinds = [entry for entry, key in zip(stream.entries, stream.keys, strict=True) if key]
    repeated = Entry.OPEN if style in OPEN_STYLES else Entry.CLEAN
    assert len(kinds) >= 3 and kinds == [Entry.CLEAN] + [repeated] * (len(kinds) - 1)
    assert not any(entry for entry, key in zip(stream.entries, stream.keys, strict=True) if not key)


def test_references_and_layers_of_known_gops(streams):
    def references(style: str) -> str:
        return "".join("r" if t.is_reference else "-" for t in streams[style].traits)

    assert references("h264-flat")[:18] == "r" + "r-------" * 2 + "r"
    assert "rr---rr---" in references("h264-pyramid")  # each P-frame is followed by a B-frame others refer to
    assert set(references("h264-avi")) == {"r"}
    assert set(references("vp9")) == set(references("mjpeg")) == set(references("mpeg4")) == {"r"}
    layers = streams["hevc-layers"].layers
    assert layers[:10] == [0, 0, 1, 2, 2, 0, 1, 2, 2, 0]
    assert all(max(streams[style].layers) == 0 for style in STYLES if style != "hevc-layers")


@pytest.mark.parametrize("style", [name for name in NAL_STYLES if STYLES[name][0] in ("mp4", "mkv")])
def test_start_codes_and_lengths_say_the_same(streams, style):
    stream = streams[style]
    with av.open(str(stream.path)) as container:
        video = container.streams.video[0]
        to_annexb = BitStreamFilterContext(f"{stream.codec}_mp4toannexb", video)
        packets = [p for packet in container.demux(video) for p in to_annexb.filter(packet) if p.size]
    assert b"\0\0\1" in bytes(packets[0])[:4]
    traits = [
        picture_traits(memoryview(p), codec=stream.codec, length_size=0, is_keyframe=p.is_keyframe)
        for p in packets
    ]
    assert traits == stream.traits


def test_length_size_of_real_streams(streams):
    for name, stream in streams.items():
        expected = 4 if name in NAL_STYLES and STYLES[name][0] in ("mp4", "mkv") else 0
        assert nal_length_size(stream.codec, stream.extradata) == expected, name


@pytest.mark.parametrize("codec", ["h264", "hevc"])
def test_length_size_of_records(codec):
    whole = bytearray(40)
    whole[:2] = b"\1\1"
    at, shortest = (4, 7) if codec == "h264" else (21, 23)
    for size in (1, 2, 3, 4):
        whole[at] = 0xFC | size - 1
        assert nal_length_size(codec, bytes(whole)) == size
        assert nal_length_size(codec, bytes(whole[:shortest])) == size
    assert nal_length_size(codec, bytes(whole[: shortest - 1])) == 0
    for other in (b"", b"\1", b"\0\0\0\1" + bytes(whole), b"\0\0\1" + bytes(whole), b"\xff" * 40):
        assert nal_length_size(codec, other) == 0
    assert nal_length_size("mpeg4", bytes(whole)) == 0


def prefixed(*units: bytes, size: int = 4) -> bytes:
    return b"".join(len(unit).to_bytes(size, "big") + unit for unit in units)


def escaped(payload: bytes) -> bytes:
    """Byte stream form of a payload: a 3 goes in where two zeros meet a byte of 0 to 3."""
    out = bytearray()
    for byte in payload:
        if out[-2:] == b"\0\0" and byte <= 3:
            out.append(3)
        out.append(byte)
    return bytes(out)


def sei(*messages: tuple[int, bytes]) -> bytes:
    """An H.264 SEI unit."""
    body = b""
    for kind, payload in messages:
        for number in (kind, len(payload)):
            body += b"\xff" * (number // 255) + bytes([number % 255])
        body += payload
    return b"\6" + escaped(body + b"\x80")


def traits_of(data: bytes, codec: str = "h264", *, key: bool = True, size: int = 4) -> PictureTraits:
    return picture_traits(data, codec=codec, length_size=size, is_keyframe=key)


NON_IDR, NOT_REFERENCED, IDR = b"\x41\x9a\x12", b"\x01\x9e\x34", b"\x65\x88\x84"
AUD, SPS, PPS = b"\x09\xf0", b"\x67\x64\x00\x1e", b"\x68\xeb\xe3"
EXACT_NOW, EXACT_LATER, CLOSE_NOW = b"\xc4", b"\x58", b"\x84"  # recovery points: 1 1.., 010 1.., 1 0..


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4])
@pytest.mark.parametrize(
    ("units", "entry"),
    [
        ([sei((6, EXACT_NOW)), NON_IDR], Entry.OPEN),
        ([AUD, SPS, PPS, sei((6, EXACT_NOW)), NON_IDR], Entry.OPEN),
        ([sei((5, bytes(20) + b"\6\1\xc4"), (6, EXACT_NOW)), NON_IDR], Entry.OPEN),
        ([sei((5, b"\0\0\1\0\0\0" * 20)), sei((1, b"\0\0\3"), (6, EXACT_NOW)), NON_IDR], Entry.OPEN),
        ([sei((300, b"\xff" * 100), (6, EXACT_NOW)), NON_IDR], Entry.OPEN),
        ([sei((5, bytes(20) + b"\6\1\xc4")), NON_IDR], Entry.NONE),
        ([sei((6, EXACT_LATER)), NON_IDR], Entry.NONE),
        ([sei((6, CLOSE_NOW)), NON_IDR], Entry.NONE),
        ([sei((6, b"")), NON_IDR], Entry.NONE),
        ([b"\6\6\5\xc4", NON_IDR], Entry.NONE),  # the message claims more than there is
        ([b"\6\xff\xff", NON_IDR], Entry.NONE),
        ([NON_IDR, sei((6, EXACT_NOW))], Entry.NONE),  # belongs to what comes next
        ([NON_IDR], Entry.NONE),
        ([sei((6, EXACT_LATER)), IDR], Entry.CLEAN),
    ],
)
def test_h264_recovery_points(units, entry, size):
    data = prefixed(*units, size=size) if size else b"".join(b"\0\0\0\1" + unit for unit in units)
    assert traits_of(data, size=size) == PictureTraits(entry, True, 0)
    unflagged = Entry.CLEAN if entry is Entry.CLEAN else Entry.NONE
    assert traits_of(data, size=size, key=False).entry is unflagged


def test_a_recovery_point_behind_a_long_message():
    message = sei((5, b"\xff" * 600), (6, EXACT_NOW))
    assert traits_of(prefixed(message, NON_IDR, size=2), size=2).entry is Entry.OPEN
    assert traits_of(b"\0\0\1" + message + b"\0\0\1" + NON_IDR, size=0).entry is Entry.OPEN


def test_what_must_not_be_dropped():
    assert not traits_of(prefixed(AUD, NOT_REFERENCED, NOT_REFERENCED)).is_reference
    assert traits_of(prefixed(NOT_REFERENCED, NON_IDR)).is_reference  # the second field is referenced
    assert traits_of(prefixed(AUD, PPS, NOT_REFERENCED)).is_reference  # later pictures need the parameters
    assert traits_of(b"\0\0\1" + NOT_REFERENCED + b"\0\0\1" + NON_IDR, size=0).is_reference
    vps, leaf = b"\x40\x01\x0c", bytes([0, 3, 0x80])
    assert not traits_of(prefixed(leaf, leaf), "hevc").is_reference
    assert traits_of(prefixed(vps, leaf), "hevc").is_reference


@pytest.mark.parametrize("kind", range(32))
def test_hevc_unit_types(kind):
    data = prefixed(b"\x46\x01\x50", bytes([kind << 1, 3, 0x80, 0]))
    entry = Entry.CLEAN if 16 <= kind <= 20 else Entry.OPEN if kind == 21 else Entry.NONE
    is_reference = kind not in (0, 2, 4, 6, 8, 10, 12, 14)
    assert traits_of(data, "hevc") == PictureTraits(entry, is_reference, 2)
    assert traits_of(data, "hevc", key=False) == PictureTraits(Entry.NONE, is_reference, 2)


@pytest.mark.parametrize("codec", ["vp8", "vp9", "av1", "mpeg4", "mpeg2video", "unheard-of"])
def test_other_codecs_are_taken_at_their_word(codec):
    for data in (b"", IDR, prefixed(NOT_REFERENCED)):
        assert traits_of(data, codec) == PictureTraits(Entry.CLEAN, True, 0)
        assert traits_of(data, codec, key=False) == PictureTraits(Entry.NONE, True, 0)


DAMAGED = {
    "empty": b"",
    "one byte": b"\0",
    "start code": b"\0\0\0\1",
    "no slice": prefixed(AUD, SPS),
    "cut": prefixed(IDR)[:-1],
    "zero length": prefixed(AUD) + bytes(4) + prefixed(IDR),
    "huge length": b"\xff\xff\xff\xff" + IDR,
    "zero length behind the slice": prefixed(NOT_REFERENCED) + b"\0\0\0\0\1\1",
    "forbidden bit": prefixed(b"\xe5\x88\x84"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damage_is_no_entry_and_not_dropped(what):
    assert traits_of(DAMAGED[what]) == PictureTraits(Entry.NONE, True, 0)


def test_hevc_without_a_layer_is_damage():
    assert traits_of(prefixed(bytes([19 << 1, 0, 1])), "hevc") == PictureTraits(Entry.NONE, True, 0)
    assert traits_of(b"\0\0\1\0\0\1\x26\x01\xaf", "hevc", size=0) == PictureTraits(Entry.NONE, True, 0)


def damaged_strings(streams: dict[str, Stream], rng: random.Random):
    """10,000 strings: noise, noise of telling bytes, and real packets with wrong bytes, cut at random."""
    telling = b"\0\0\0\0\1\1\2\3\6\6\x26\x2a\x41\x65\xff\xc4"
    real = [data for name in NAL_STYLES for data in streams[name].data[:20]]
    for i in range(10_000):
        if i % 3 == 0:
            yield rng.randbytes(rng.randrange(40))
        elif i % 3 == 1:
            yield bytes(rng.choices(telling, k=rng.randrange(60)))
        else:
            data = bytearray(rng.choice(real)[: rng.randrange(1, 400)])
            for _ in range(rng.randrange(4)):
                data[rng.randrange(len(data))] = rng.choice(telling)
            yield bytes(data)


def test_any_bytes_have_an_answer(streams):
    rng = random.Random(20)
    seen = set()
    for data in damaged_strings(streams, rng):
        for codec in ("h264", "hevc"):
            size, key = rng.randrange(5), rng.random() < 0.8
            traits = traits_of(data, codec, key=key, size=size)
            assert 0 <= traits.layer <= 6 and isinstance(traits.entry, Entry) and traits.is_reference in (0, 1)
            assert traits == traits_of(memoryview(data), codec, key=key, size=size)
            assert nal_length_size(codec, data) in range(5)
            seen.add(traits)
    assert len(seen) >= 20  # the strings reach every branch, not only the first check


@pytest.mark.parametrize("filler", [b"\0", b"\1", b"\xff", b"\0\0\1", b"\0\0\1\6", b"\0\0\1\6\xff\xff"])
@pytest.mark.parametrize("size", [0, 1, 4])
def test_a_megabyte_of_nothing_ends(filler, size):
    data = (filler * 1_000_000)[:1_000_000]
    for codec in ("h264", "hevc"):
        assert traits_of(data, codec, size=size).entry is Entry.NONE
