"""Whatever is planned, dropped, indexed or reused: the frames are those of plain sequential decoding."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import av
import make_videos as mv
import numpy as np
import pytest

from avion_dali.contracts import ChunkRef, ClipPart, ClipRequest, CropWindow, DecodeError, PacketIndexRef
from avion_dali.data.probe import probe_chunk
from avion_dali.decode import cpu_fused
from avion_dali.decode.reading import read_planned, read_spanned, reused_decoder
from avion_dali.decode.rendering import forget_graphs
from avion_dali.decode.source import gather_packets

FRAMES = 60
FRAME_SETS = 24
VFR = {"times": (np.cumsum(np.tile([1, 3, 2], FRAMES // 3)) / 60).tolist(), "start": 7.5}


def x264(**options: object) -> dict[str, str]:
    parameters = ":".join(f"{name.replace('_', '-')}={value}" for name, value in options.items())
    return mv.X264_FAST | {"x264-params": f"scenecut=0:{parameters}"}


def x265(**options: object) -> dict[str, str]:
    parameters = ":".join(f"{name.replace('_', '-')}={value}" for name, value in options.items())
    quiet = "log-level=none:pools=none:frame-threads=1:scenecut=0"
    return {"preset": "ultrafast", "crf": "24", "x265-params": f"{quiet}:{parameters}"}


LAYERED = x265(keyint=32, open_gop=0, bframes=7, b_pyramid=1, temporal_layers=3, rc_lookahead=10)
VP8 = {"deadline": "realtime", "cpu-used": "8", "g": "20", "b": "400k"}
STYLES: dict[str, tuple[str, str, dict[str, str], dict[str, object]]] = {
    "pyramid": ("mp4", "libx264", x264(bframes=7, b_pyramid="normal", keyint=40), {}),
    "balanced": ("mp4", "libx264", {"preset": "veryfast", "threads": "1", "x264-params": mv.BALANCED}, {}),
    "intra": ("mp4", "libx264", mv.X264_FAST | {"g": "1", "bf": "0"}, {}),
    "open-gop mp4": ("mp4", "libx264", x264(keyint=15, open_gop=1, bframes=3), {}),
    "open-gop mkv": ("mkv", "libx264", x264(keyint=15, open_gop=1, bframes=3, b_pyramid="strict"), {}),
    "intra-refresh": ("mp4", "libx264", x264(keyint=20, intra_refresh=1, bframes=0), {}),
    "intra-refresh and B": ("mkv", "libx264", x264(keyint=20, intra_refresh=1, bframes=2), {}),
    "interlaced": ("mov", "libx264", x264(keyint=15, bframes=2, tff=1), {}),
    "repeated headers": ("mp4", "libx264", x264(keyint=15, bframes=2, repeat_headers=1), {}),
    "fragments": (
        "mp4",
        "libx264",
        x264(keyint=15, bframes=2),
        {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    ),
    "vfr mp4": ("mp4", "libx264", x264(keyint=20, bframes=3), VFR),
    "vfr mkv": ("mkv", "libx264", x264(keyint=20, bframes=3), VFR),
    "avi": ("avi", "libx264", x264(keyint=20, bframes=0), {}),
    "avi and B": ("avi", "libx264", x264(keyint=20, bframes=3), {}),
    "transport stream": ("ts", "libx264", x264(keyint=15, bframes=2), {}),
    "hevc": ("mp4", "libx265", x265(keyint=20, open_gop=0, bframes=3), {}),
    "hevc CRA": ("mp4", "libx265", x265(keyint=15, min_keyint=15, open_gop=1, bframes=4), {}),
    "hevc CRA mkv": ("mkv", "libx265", x265(keyint=15, min_keyint=15, open_gop=1, bframes=4, b_pyramid=1), {}),
    "hevc layers": ("mp4", "libx265", LAYERED, {}),
    "vp9 webm": ("webm", "libvpx-vp9", mv.VP9_FAST | {"g": "20"}, {}),
    "vp9 hidden": (
        "webm",
        "libvpx-vp9",
        {"deadline": "good", "cpu-used": "5", "g": "20", "crf": "30", "b": "0", "lag-in-frames": "16"},
        {},
    ),
    "vp8": ("webm", "libvpx", VP8, {}),
    "av1": ("mp4", "libsvtav1", {"preset": "12", "g": "20", "crf": "40", "svtav1-params": "lp=1"}, {}),
    "mjpeg": ("mov", "mjpeg", {"q": "3"}, {"pix_fmt": "yuvj420p"}),
    "mjpeg avi": ("avi", "mjpeg", {"q": "3"}, {"pix_fmt": "yuvj420p"}),
    "mpeg4": ("mp4", "mpeg4", {"g": "15", "bf": "2", "b": "400k"}, {}),
    "mpeg4 simple": ("mov", "mpeg4", {"g": "15", "bf": "0", "b": "400k"}, {}),
    "png": ("mov", "png", {}, {"pix_fmt": "rgb24"}),
}
UNINDEXED = {"transport stream", "mpeg4", "mpeg4 simple", "png"}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A video of every style whose encoder this FFmpeg has."""
    folder = tmp_path_factory.mktemp("styles")
    return {
        name: mv.write_video(
            folder / f"{name.replace(' ', '-')}.{ending}", frames=FRAMES, codec=codec, options=options, **more
        )
        for name, (ending, codec, options, more) in STYLES.items()
        if codec in av.codecs_available
    }


def indexed_ref(path: Path) -> ChunkRef:
    """A chunk with its packet index beside it, or without one where it can have none."""
    facts = probe_chunk(path, index=True)
    ref = ChunkRef(str(path), facts.size_bytes, facts.num_frames, facts.width, facts.height)
    if not facts.packet_index:
        return ref
    index = path.with_suffix(".packets")
    index.write_bytes(facts.packet_index)
    return replace(ref, index=PacketIndexRef(str(index), 0, len(facts.packet_index)))


def raw_frames(path: Path) -> list[np.ndarray]:
    """All frames as stored, by FFmpeg alone, from the first packet to the last."""
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        return [frame.to_ndarray().copy() for frame in container.decode(stream)]


def frame_sets(num_frames: int, seed: int) -> list[tuple[int, ...]]:
    """First, last, all, and random sets of one to eight frames, near each other or far."""
    rng = np.random.default_rng(seed)
    sets: list[tuple[int, ...]] = [(0,), (num_frames - 1,), (0, num_frames - 1), tuple(range(num_frames))]
    while len(sets) < FRAME_SETS:
        first = int(rng.integers(0, num_frames - 1))
        span = int(rng.integers(1, num_frames - first + 1))
        picks = rng.choice(span, size=min(span, int(rng.integers(1, 9))), replace=False)
        sets.append(tuple(sorted((picks + first).tolist())))
    return sets


def assert_exact(path: Path, *, indexed: bool = True, seed: int = 0) -> None:
    """With the index, without it, and as the paper reads: all give the frames of sequential decoding."""
    expected, ref = raw_frames(path), indexed_ref(path)
    assert ref.num_frames == len(expected)
    assert (ref.index is not None) == indexed
    unindexed = replace(ref, index=None)
    ways = [("container", unindexed, read_planned), ("spanned", unindexed, read_spanned)]
    if indexed:
        ways.append(("index", ref, read_planned))
    for ids in frame_sets(ref.num_frames, seed):
        for name, chunk, read in ways:
            for frame_id, frame in zip(ids, read(ClipPart(chunk, ids)), strict=True):
                np.testing.assert_array_equal(frame.to_ndarray(), expected[frame_id], err_msg=f"{name} {ids}")


@pytest.mark.parametrize("style", STYLES)
def test_frames_equal_sequential_decoding(videos: dict[str, Path], style: str) -> None:
    if style not in videos:
        pytest.skip(f"this FFmpeg has no {STYLES[style][1]}")
    assert_exact(videos[style], indexed=style not in UNINDEXED, seed=list(STYLES).index(style))


def test_an_edit_list_and_an_open_gop_without_its_beginning(videos: dict[str, Path], tmp_path: Path) -> None:
    assert_exact(mv.edit_list_video(tmp_path / "edited.mp4", frames=FRAMES, hidden=10))
    with av.open(str(videos["open-gop mp4"])) as container:
        packets = [p for p in container.demux(container.streams.video[0]) if p.size]
    second_key = [i for i, p in enumerate(packets) if p.is_keyframe][1]
    shift = -int(packets[second_key].pts)
    cut = tmp_path / "cut.mkv"
    assert_exact(mv.remux(videos["open-gop mp4"], cut, from_packet=second_key, shift=shift))


def payloads(path: Path, frame_ids: Sequence[int]) -> list[bytes]:
    """The packets a clip is decoded from, with the index; without it they are the same."""
    ref = indexed_ref(path)
    with_index, without = (
        [p for run in gather_packets(ClipPart(chunk, tuple(frame_ids)), decoder="x").runs for p in run.payloads]
        for chunk in (ref, replace(ref, index=None))
    )
    assert with_index == without
    return with_index


def test_pictures_nobody_needs_are_dropped(videos: dict[str, Path]) -> None:
    """The balanced profile shows I b b b b b b b P ...: a clip needs the I, the Ps and what it asks for."""
    with av.open(str(videos["balanced"])) as container:
        packets = [p for p in container.demux(container.streams.video[0]) if p.size]
    references = [bytes(p) for p in packets if mv.is_reference(p)]
    assert len(packets) - len(references) > 40
    for frame_id in range(33, FRAMES):
        read = payloads(videos["balanced"], [frame_id])
        unwanted = [p for p in read if p not in references]
        assert len(unwanted) <= 1
        assert len(read) <= 2 + -(-(frame_id - 32) // 8)


def temporal_layer(packet: bytes) -> int:
    """Of the first slice in a length-prefixed HEVC packet (ITU-T H.265, section 7.3.1.2)."""
    at = 0
    while packet[at + 4] >> 1 >= 32:  # no slice
        at += 4 + int.from_bytes(packet[at : at + 4], "big")
    return (packet[at + 5] & 7) - 1


def test_layers_nobody_needs_are_dropped(videos: dict[str, Path]) -> None:
    with av.open(str(videos["hevc layers"])) as container:
        packets = [bytes(p) for p in container.demux(container.streams.video[0]) if p.size]
    top = max(map(temporal_layer, packets))
    assert top == 2 and sum(temporal_layer(p) == top for p in packets) > FRAMES // 3
    counts = []
    for frame_id in range(FRAMES):
        read = payloads(videos["hevc layers"], [frame_id])
        counts.append(len(read))
        assert sum(temporal_layer(p) == top for p in read) <= 1
    assert sum(counts[:32]) < 0.6 * sum(range(1, 33))


def test_clips_of_intra_chunks_decode_the_wanted_frames_alone(videos: dict[str, Path]) -> None:
    for style in ("intra", "mjpeg"):
        for ids in frame_sets(FRAMES, seed=1):
            assert len(payloads(videos[style], ids)) == len(ids)


class _Bits:
    """Reads a bit string as H.264 headers are written (ITU-T H.264, section 9.1)."""

    def __init__(self, data: bytes) -> None:
        self.text, self.at = "".join(f"{byte:08b}" for byte in data), 0

    def number(self, count: int) -> int:
        self.at += count
        return int(self.text[self.at - count : self.at], 2)

    def golomb(self) -> int:
        zeros = self.text.index("1", self.at) - self.at
        self.at += zeros
        return self.number(zeros + 1) - 1


def without_reorder_facts(sps: bytes) -> bytes:
    """Drop the VUI of an x264 sequence parameter set: then nothing says how far pictures are reordered."""
    bits = _Bits(sps[1:].replace(b"\0\0\3", b"\0\0"))
    profile = bits.number(24) >> 16
    bits.golomb()
    if profile == 100:
        assert [bits.golomb() for _ in range(3)] == [1, 0, 0] and bits.number(2) == 0
    bits.golomb()
    if bits.golomb() == 0:  # how picture order counts are stored
        bits.golomb()
    bits.golomb()
    bits.number(1)
    bits.golomb(), bits.golomb()
    assert bits.number(1) == 1  # frames only
    bits.number(1)
    if bits.number(1):  # cropping
        assert len([bits.golomb() for _ in range(4)]) == 4
    text = bits.text[: bits.at] + "01"  # no VUI, end mark
    text += "0" * (-len(text) % 8)
    data = bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))
    assert b"\0\0" not in data
    return sps[:1] + data


@pytest.mark.parametrize("style", ["pyramid", "open-gop mkv"])
def test_streams_that_do_not_tell_their_reordering(videos: dict[str, Path], tmp_path: Path, style: str) -> None:
    """FFmpeg guesses, and would lose frames of a decoder that begins in the middle."""
    path = tmp_path / "silent.mp4"
    with av.open(str(videos[style])) as reader, av.open(str(path), "w") as writer:
        source = reader.streams.video[0]
        extradata = source.codec_context.extradata or b""
        sps, _ = mv.parameter_sets(extradata)
        short = without_reorder_facts(sps)
        target = writer.add_stream_from_template(source)
        target.codec_context.extradata = (
            extradata[:6] + struct.pack(">H", len(short)) + short + extradata[8 + len(sps) :]
        )
        for packet in (p for p in reader.demux(source) if p.size):
            packet.stream = target
            writer.mux(packet)
    assert [mv.read_frame_number(f) for f in mv.decode_all(path)] == list(range(FRAMES))
    assert_exact(path)


def halves(folder: Path, first: dict[str, object], second: dict[str, object], **more: object) -> list[Path]:
    """Two videos of half the frames each, encoded differently; `more` is for the second."""
    common = {"keyint": 10, "bframes": 2, "ref": 2}
    return [
        mv.write_video(folder / "a.mp4", frames=30, options=x264(**common, **first)),
        mv.write_video(
            folder / "b.mp4", **{"frames": 30, "first_number": 30, "options": x264(**common, **second), **more}
        ),
    ]


@pytest.mark.parametrize("repeat", [True, False])
@pytest.mark.parametrize("difference", [("chroma_qp_offset", 0, 6), ("cabac", 1, 0), ("cqm", "flat", "jvt")])
def test_joined_files_bring_parameter_sets_of_their_own(
    tmp_path: Path, difference: tuple[str, object, object], repeat: bool
) -> None:
    """A decoder used for the second half must not keep its parameters for the first."""
    name, before, after = difference
    pair = halves(tmp_path, {name: before}, {name: after})
    assert_exact(mv.join_videos(tmp_path / "joined.mp4", *pair, repeat=repeat))


def test_pictures_of_another_size_or_format_in_mid_file_are_refused(tmp_path: Path) -> None:
    """A filter graph made for large pictures would read beyond the end of small ones."""
    smaller = mv.join_videos(tmp_path / "s.mp4", *halves(tmp_path, {}, {}, size=(64, 48)), repeat=True)
    ref = indexed_ref(smaller)
    for chunk in (ref, replace(ref, index=None)):
        assert len(read_planned(ClipPart(chunk, (3, 29)))) == 2
        for ids in [(3, 40), (40,)]:
            with pytest.raises(DecodeError, match=r"is 64x48 yuv420p, not 128x96|Invalid data"):
                read_planned(ClipPart(chunk, ids))
    other = mv.join_videos(tmp_path / "f.mp4", *halves(tmp_path, {}, {}, pix_fmt="yuv444p"), repeat=True)
    with pytest.raises(DecodeError, match=r"is 128x96 yuv444p, not 128x96 yuv420p|Invalid data"):
        read_planned(ClipPart(indexed_ref(other), (3, 40)))


def test_vp8_pictures_that_are_not_shown_are_not_counted(videos: dict[str, Path], tmp_path: Path) -> None:
    """Two-pass VP8 keeps pictures that only others refer to in packets of their own."""
    path = tmp_path / "hidden.webm"
    with av.open(str(videos["vp8"])) as reader, av.open(str(path), "w") as writer:
        target = writer.add_stream_from_template(reader.streams.video[0])
        for i, packet in enumerate(p for p in reader.demux(video=0) if p.size):
            data = bytearray(bytes(packet))
            data[0] &= 0xFF if i % 7 != 5 else ~0x10 & 0xFF  # show_frame (RFC 6386, section 9.1)
            hidden = av.Packet(bytes(data))
            hidden.pts, hidden.dts, hidden.time_base = packet.pts, packet.dts, packet.time_base
            hidden.is_keyframe, hidden.stream = packet.is_keyframe, target
            writer.mux(hidden)
    expected, ref = raw_frames(path), indexed_ref(path)
    assert len(expected) < FRAMES
    assert ref.index is None
    for ids in frame_sets(len(expected) - 1, seed=3):
        for read in (read_planned, read_spanned):
            for frame_id, frame in zip(ids, read(ClipPart(ref, ids)), strict=True):
                np.testing.assert_array_equal(frame.to_ndarray(), expected[frame_id])


def random_request(ref: ChunkRef, rng: np.random.Generator, clip: int) -> ClipRequest:
    ids = tuple(sorted(rng.choice(ref.num_frames, int(rng.integers(1, 6)), replace=False).tolist()))
    width, height = (int(rng.integers(8, side // 2)) * 2 for side in (ref.width, ref.height))
    x, y = (
        int(rng.integers(0, (side - size) // 2 + 1)) * 2
        for side, size in ((ref.width, width), (ref.height, height))
    )
    flip, side = bool(rng.integers(2)), int(rng.choice([24, 32, 40]))
    gather = tuple(range(len(ids)))
    return ClipRequest(
        clip, 0, (ClipPart(ref, ids),), gather, (CropWindow(x, y, width, height),), (flip,), side
    )


def clip_of(request: ClipRequest) -> np.ndarray | str:
    frames = np.zeros(request.frames_shape, np.uint8)
    try:
        cpu_fused.decode_clip(request, frames)
    except DecodeError as error:
        return error.kind
    return frames


def test_a_clip_does_not_depend_on_the_clips_before_it(videos: dict[str, Path], tmp_path: Path) -> None:
    """Decoders and filter graphs are reused: over files, codecs, sizes, flips, and after failures."""
    rng = np.random.default_rng(5)
    chunks = [indexed_ref(path) for path in videos.values()]
    chunks += [replace(ref, index=None) for ref in chunks]
    for size in [(96, 64), (64, 96)]:
        chunks.append(indexed_ref(mv.write_video(tmp_path / f"{size[0]}.mp4", frames=20, size=size)))
    joined = mv.join_videos(tmp_path / "j.mp4", *halves(tmp_path, {"cqm": "flat"}, {"cqm": "jvt"}), repeat=True)
    chunks += [indexed_ref(joined)] * 4
    for style in ("balanced", "hevc", "vp9 webm", "mjpeg"):
        damaged = bytearray(videos[style].read_bytes())
        damaged[len(damaged) // 3 : len(damaged) // 2] = bytes(len(damaged) // 2 - len(damaged) // 3)
        path = tmp_path / f"damaged-{videos[style].name}"
        path.write_bytes(damaged)
        chunks += [replace(indexed_ref(videos[style]), path=str(path), index=None)] * 2
    requests = [random_request(ref, rng, i) for i, ref in enumerate(chunks * 2)]
    alone = []
    for request in requests:
        reused_decoder.cache_clear()
        forget_graphs()
        alone.append(clip_of(request))
    assert sum(isinstance(clip, str) for clip in alone) >= 4
    for _ in range(2):
        for i in rng.permutation(len(requests)).tolist():
            np.testing.assert_array_equal(clip_of(requests[i]), alone[i], err_msg=str(requests[i].parts))
