from fractions import Fraction
from typing import get_args

import av
import make_videos as mv
import pytest

from avion_dali.data.encoding import ChunkWriter
from avion_dali.data.probe import probe_chunk
from avion_dali.data.profiles import PROFILES, ProfileName


@pytest.fixture(scope="module", params=list(PROFILES))
def chunk(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param) / "0.mp4"
    with ChunkWriter(path, PROFILES[request.param], fps=Fraction(30)) as writer:
        for number in range(125):
            picture = av.VideoFrame.from_ndarray(mv.draw_frame(number), format="rgb24")
            writer.write(picture.reformat(format="yuv420p"))
        writer.finish()
    return request.param, path


def packets_of(path):
    with av.open(str(path)) as container:
        return [packet for packet in container.demux(video=0) if packet.size]


def test_every_name_has_a_profile():
    assert set(get_args(ProfileName)) == set(PROFILES)


def test_tags_format_and_frames(chunk):
    name, path = chunk
    facts = probe_chunk(path)
    assert (facts.pix_fmt, facts.color_range, facts.colorspace) == ("yuv420p", "limited", "smpte170m")
    assert (facts.fps, facts.is_cfr, facts.num_frames) == (30, True, 125)
    assert facts.codec == ("vp9" if name == "vp9" else "h264")
    assert mv.frame_numbers(path) == list(range(125))


def test_index_stands_before_the_pictures(chunk):
    data = chunk[1].read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


def test_keyframe_distance(chunk):
    name, path = chunk
    keys = [i for i, packet in enumerate(packets_of(path)) if packet.is_keyframe]
    assert keys == {"compat": [0], "balanced": [0, 32, 64, 96], "vp9": [0, 60, 120]}[name]


def test_groups_are_closed(chunk):
    for packet in packets_of(chunk[1]):
        if packet.is_keyframe:
            key_time = packet.pts
        assert packet.pts >= key_time, "a picture is shown before the keyframe it comes after"


def test_groups_decode_alone(chunk):
    packets = packets_of(chunk[1])
    for start in [i for i, packet in enumerate(packets) if packet.is_keyframe]:
        with av.open(str(chunk[1])) as container:
            stream = container.streams.video[0]
            container.seek(packets[start].pts, stream=stream)
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert [mv.read_frame_number(frame) for frame in frames] == list(range(start, 125))


def test_balanced_references_one_frame_of_eight(tmp_path):
    path = tmp_path / "0.mp4"
    with ChunkWriter(path, PROFILES["balanced"], fps=Fraction(30)) as writer:
        for number in range(64):
            picture = av.VideoFrame.from_ndarray(mv.draw_frame(number), format="rgb24")
            writer.write(picture.reformat(format="yuv420p"))
        writer.finish()
    shown = sorted(packets_of(path)[:32], key=lambda packet: packet.pts)
    assert [i for i, packet in enumerate(shown) if mv.is_reference(packet)] == [0, 8, 16, 24, 31]
