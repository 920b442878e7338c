from collections.abc import Iterator
from fractions import Fraction
from itertools import chain
from typing import get_args

import av
import make_videos as mv
import numpy as np
import pytest

from avion_dali.data.encoding import write_chunk
from avion_dali.data.probe import probe_chunk
from avion_dali.data.profiles import PROFILES, ProfileName

FRAMES = 125  # below 128, where the pictures change so much that x264 would start a new group
H264 = ("compat", "balanced", "fast", "intra")
KEYFRAMES = {"compat": 250, "balanced": 48, "fast": 64, "intra": 1, "hevc": 32, "vp9": 32}
REFERENCES = {"balanced": 8, "fast": 8, "hevc": 8}  # distance of frames that others refer to, inside a group
SEI_HEVC = (39, 40)


@pytest.fixture(scope="module")
def chunks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profiles")
    return {name: make_chunk(folder / f"{name}.mp4", name) for name in PROFILES}


def make_chunk(path, name):
    pictures = (av.VideoFrame.from_ndarray(mv.draw_frame(number), format="rgb24") for number in range(FRAMES))
    yuv = (picture.reformat(format="yuv420p") for picture in pictures)
    write_chunk(path, yuv, profile=PROFILES[name], fps=Fraction(30))
    return path


def packets_of(path):
    with av.open(str(path)) as container:
        return [packet for packet in container.demux(video=0) if packet.size]


def nal_units(data: bytes) -> Iterator[bytes]:
    """Units of an mp4 packet, whose lengths take four bytes."""
    at = 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 4 + size]
        at += 4 + size


def parameter_sets(path) -> tuple[bytes, bytes]:
    """The one SPS and one PPS of an avcC record (ISO/IEC 14496-15, section 5.3.3.1)."""
    with av.open(str(path)) as container:
        record = container.streams.video[0].codec_context.extradata
    assert record[5] & 0x1F == 1
    sps_end = 8 + int.from_bytes(record[6:8], "big")
    assert record[sps_end] == 1
    return record[8:sps_end], record[sps_end + 3 :]


def decode(path, **options):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        stream.codec_context.options = options
        return np.stack([frame.to_ndarray() for frame in container.decode(stream)])


def test_every_name_has_a_profile():
    assert tuple(get_args(ProfileName)) == tuple(PROFILES)


@pytest.mark.parametrize("name", PROFILES)
def test_tags_format_and_frames(chunks, name):
    facts = probe_chunk(chunks[name])
    assert (facts.pix_fmt, facts.color_range, facts.colorspace) == ("yuv420p", "limited", "smpte170m")
    assert (facts.fps, facts.is_cfr, facts.num_frames) == (30, True, FRAMES)
    assert (facts.width, facts.height) == (128, 96)
    assert facts.codec == {"vp9": "vp9", "hevc": "hevc"}.get(name, "h264")
    assert mv.frame_numbers(chunks[name]) == list(range(FRAMES))


@pytest.mark.parametrize("name", PROFILES)
def test_index_stands_before_the_pictures(chunks, name):
    data = chunks[name].read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize("name", PROFILES)
def test_keyframe_distance(chunks, name):
    shown = sorted(packets_of(chunks[name]), key=lambda packet: packet.pts)
    keys = [i for i, packet in enumerate(shown) if packet.is_keyframe]
    assert keys == list(range(0, FRAMES, KEYFRAMES[name]))


@pytest.mark.parametrize("name", PROFILES)
def test_groups_are_closed(chunks, name):
    for packet in packets_of(chunks[name]):
        if packet.is_keyframe:
            key_time = packet.pts
        assert packet.pts >= key_time, "a picture is shown before the keyframe it comes after"


@pytest.mark.parametrize("name", PROFILES)
def test_groups_decode_alone(chunks, name):
    whole, packets = decode(chunks[name]), packets_of(chunks[name])
    keys = [i for i, packet in enumerate(packets) if packet.is_keyframe]
    for start, stop in list(zip(keys, [*keys[1:], len(packets)], strict=True))[:4]:
        with av.open(str(chunks[name])) as container:
            stream = container.streams.video[0]
            context = av.CodecContext.create(stream.codec_context.name, "r")
            context.extradata = stream.codec_context.extradata
            fed = chain(packets[start:stop], [None])
            frames = [frame.to_ndarray() for packet in fed for frame in context.decode(packet)]
        assert np.array_equal(frames, whole[start:stop])


@pytest.mark.parametrize("name", H264)
def test_h264_keyframes_are_idr(chunks, name):
    kinds = [
        ([unit[0] & 0x1F for unit in nal_units(bytes(packet)) if unit[0] & 0x1F in (1, 5)], packet.is_keyframe)
        for packet in packets_of(chunks[name])
    ]
    assert all(units == [5 if is_keyframe else 1] for units, is_keyframe in kinds)


def is_reference_hevc(packet):
    """Slice types up to 15 with an even number are of pictures nobody refers to (ITU-T H.265, Table 7-1)."""
    (unit,) = nal_units(bytes(packet))
    kind = unit[0] >> 1 & 0x3F
    assert kind not in SEI_HEVC
    return kind > 15 or kind % 2 == 1


@pytest.mark.parametrize("name", REFERENCES)
def test_frames_between_references_are_referred_to_by_none(chunks, name):
    is_reference = is_reference_hevc if name == "hevc" else mv.is_reference
    shown = sorted(packets_of(chunks[name]), key=lambda packet: packet.pts)
    gop = KEYFRAMES[name]
    groups = [shown[start : start + gop] for start in range(0, FRAMES, gop)]
    for group in groups:
        references = {*range(0, len(group), REFERENCES[name]), len(group) - 1}  # the last closes its group
        assert {i for i, packet in enumerate(group) if is_reference(packet)} == references


@pytest.mark.parametrize("name", REFERENCES)
def test_frames_nobody_refers_to_may_be_left_out(chunks, name):
    is_reference = is_reference_hevc if name == "hevc" else mv.is_reference
    whole, packets = decode(chunks[name]), packets_of(chunks[name])
    shown = sorted(packet.pts for packet in packets)
    with av.open(str(chunks[name])) as container:
        context = container.streams.video[0].codec_context
        fed = chain((packet for packet in packets if is_reference(packet)), [None])
        frames = {frame.pts: frame.to_ndarray() for packet in fed for frame in context.decode(packet)}
    assert len(frames) < FRAMES / 5
    assert all(np.array_equal(frame, whole[shown.index(pts)]) for pts, frame in frames.items())


@pytest.mark.parametrize("name", H264)
def test_entropy_coding(chunks, name):
    _, pps = parameter_sets(chunks[name])
    # Two numbers that are zero, one bit each, stand before entropy_coding_mode_flag (ITU-T H.264, 7.3.2.2).
    assert pps[0] & 0x1F == 8 and pps[1] & 0xC0 == 0xC0
    assert bool(pps[1] & 0x20) == (name == "compat")


@pytest.mark.parametrize("name", H264)
def test_deblocking(chunks, name):
    is_filtered = not np.array_equal(decode(chunks[name]), decode(chunks[name], skip_loop_filter="all"))
    assert is_filtered == (name in ("compat", "balanced"))


@pytest.mark.parametrize("name", [name for name in PROFILES if name != "vp9"])
def test_coded_size_is_display_size(chunks, name):
    with av.open(str(chunks[name])) as container:
        context = container.streams.video[0].codec_context
        next(container.decode(video=0))
        assert (context.coded_width, context.coded_height) == (128, 96)
