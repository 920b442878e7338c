"""Stand-ins for a data set: what they hold, and what their clips need, counted against real reads."""

import os
from fractions import Fraction

import make_videos
import numpy as np
import pytest

from avion_dali.contracts import ChunkRef, ClipPart, ClipRequest, CropWindow, PacketIndexRef, UserError
from avion_dali.data.probe import probe_chunk
from avion_dali.decode.source import gather_packets
from avion_dali.inspection import sampling


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A chunk folder with two chunks of three seconds, 30 fps, numbered from 0."""
    root = tmp_path_factory.mktemp("sampled") / "chunks"
    (root / "a").mkdir(parents=True)
    for second in (0, 3):
        make_videos.write_video(root / "a" / f"{second}.mp4", first_number=second * 30, gop=30)
    return root


def indexed(path, folder):
    facts = probe_chunk(path, index=True)
    assert facts.packet_index
    record = folder / f"{path.name}.index"
    record.write_bytes(facts.packet_index)
    index = PacketIndexRef(str(record), 0, len(facts.packet_index))
    return ChunkRef(str(path), facts.size_bytes, facts.num_frames, facts.width, facts.height, index)


def request_of(*parts, views=1):
    count = sum(len(part.frame_ids) for part in parts)
    windows = (CropWindow(0, 0, 64, 64),) * views
    return ClipRequest(0, 0, parts, tuple(range(count)), windows, (False,) * views, 32)


class CountedReads:
    """Stands in for `os.pread`."""

    def __init__(self, monkeypatch):
        self.sizes, self._pread = [], os.pread
        monkeypatch.setattr(os, "pread", self)

    def __call__(self, file, size, offset):
        data = self._pread(file, size, offset)
        self.sizes.append(len(data))
        return data


@pytest.mark.parametrize("style", ["x264-default", "balanced", "intra", "open-gop", "hevc", "vp9", "mkv"])
@pytest.mark.parametrize("frame_ids", [(0,), (7, 20, 33, 61), (88, 89)])
def test_needs_are_what_decoding_really_reads(style, frame_ids, gop_videos, tmp_path, monkeypatch):
    chunk = indexed(gop_videos[style], tmp_path)
    part = ClipPart(chunk, frame_ids)
    needs = sampling.clip_needs(request_of(part))
    reads = CountedReads(monkeypatch)
    payloads = [p for run in gather_packets(part, decoder="test").runs for p in run.payloads]
    assert needs.decoded == len(payloads)
    assert needs.picture_bytes == sum(map(len, payloads))
    assert (needs.reads, needs.read_bytes) == (len(reads.sizes), sum(reads.sizes))
    assert needs.rendered == len(frame_ids)
    assert needs.chunk_bytes == chunk.size_bytes


def test_needs_add_up_over_parts_and_views(gop_videos, tmp_path):
    one, other = (ClipPart(indexed(gop_videos[s], tmp_path), (5, 40)) for s in ("balanced", "no-b"))
    both, first, second = map(sampling.clip_needs, (request_of(one, other), request_of(one), request_of(other)))
    for name in ("decoded", "rendered", "picture_bytes", "reads", "read_bytes", "chunk_bytes"):
        assert getattr(both, name) == getattr(first, name) + getattr(second, name)
    views = sampling.clip_needs(request_of(one, views=3))
    assert (views.rendered, views.decoded) == (3 * first.rendered, first.decoded)


def test_needs_ask_for_an_index(gop_videos):
    path = gop_videos["balanced"]
    part = ClipPart(ChunkRef(str(path), path.stat().st_size, 90, 128, 96), (0,))
    with pytest.raises(UserError, match="no packet index"):
        sampling.clip_needs(request_of(part))


@pytest.mark.parametrize(("stands_for", "crossing"), [(None, 1 / 3), (10.0, 0.1), (1.0, 1.0)])
def test_clips_cross_borders_as_often_as_they_will(stands_for, crossing, clip_folder, tmp_path):
    manifest = sampling.write_sample_manifest(
        clip_folder, tmp_path / "m", clip_seconds=1.0, chunk_seconds=stands_for
    )
    samples = [manifest.sample(row) for row in range(manifest.num_samples)]
    assert len(samples) == sampling.CLIPS
    assert np.mean([sample.num_chunks == 2 for sample in samples]) == pytest.approx(crossing, abs=0.1)
    for sample in samples:
        first, last = (manifest.chunk(sample.first_chunk + i) for i in (0, sample.num_chunks - 1))
        assert first.start_s <= sample.start_s < first.end_s
        assert last.start_s < sample.end_s <= last.end_s
        assert first.video == last.video
        assert sample.end_s - sample.start_s == pytest.approx(1.0)


def test_clips_longer_than_chunks_touch_all_they_span(clip_folder, tmp_path):
    manifest = sampling.write_sample_manifest(clip_folder, tmp_path / "m", clip_seconds=7.0)
    assert {manifest.sample(row).num_chunks for row in range(manifest.num_samples)} == {3, 4}
    requests = sampling.sample_requests(manifest, num_frames=14, frame_size=32, count=20)
    assert len(requests) == 20
    assert all(len(request.gather) == 14 for request in requests)
    assert all(len(request.parts) >= 3 for request in requests)


def test_figures_of_chunks(clip_folder, tmp_path):
    manifest = sampling.write_sample_manifest(clip_folder, tmp_path / "m", clip_seconds=1.0)
    figures = sampling.chunk_figures(manifest)
    files = sum(path.stat().st_size for path in clip_folder.rglob("*.mp4"))
    index = (tmp_path / "m" / "packets.bin").stat().st_size
    assert figures.chunk_seconds == pytest.approx(3.0)
    assert figures.mbit_per_s == pytest.approx(files * 8 / 6 / 1e6)
    assert figures.bytes_per_hour == pytest.approx((files + index) * 600)


def test_chunks_without_index_are_refused(tmp_path):
    (tmp_path / "chunks" / "v").mkdir(parents=True)
    make_videos.write_video(tmp_path / "chunks" / "v" / "0.mp4", frames=10, codec="mpeg4", options={})
    with pytest.raises(UserError, match="mpeg4 has no packet index"):
        sampling.write_sample_manifest(tmp_path / "chunks", tmp_path / "m", clip_seconds=1.0)


def test_some_chunks_of_a_folder_are_linked(clip_folder, tmp_path):
    links = sampling.link_some_chunks(clip_folder, tmp_path, count=1)
    (link,) = links.rglob("*.mp4")
    assert link.resolve().parent == (clip_folder / "a").resolve()
    assert len(list(sampling.link_some_chunks(clip_folder, tmp_path / "all").rglob("*.mp4"))) == 2


def test_procedural_pictures_move_and_have_detail():
    pictures = sampling.procedural_pictures(seconds=0.2, short_side=96)
    assert pictures.planes.shape == (6, 96 * 3 // 2, 176)
    assert pictures.seconds == pytest.approx(0.2)
    luma = pictures.planes[:, :96].astype(float)
    assert luma.std() > 20
    assert all(np.abs(a - b).mean() > 2 for a, b in zip(luma, luma[1:], strict=False))
    assert np.array_equal(pictures.planes, sampling.procedural_pictures(seconds=0.2, short_side=96).planes)


def test_pictures_come_from_the_middle_of_a_video(gop_videos, tmp_path):
    pictures = sampling.video_pictures(gop_videos["x264-gop30"], seconds=1.0, short_side=96)
    assert (len(pictures.planes), pictures.fps) == (30, 30)
    sampling.encode_samples(pictures, [("balanced", 1.0, tmp_path)], name="v")
    numbers = make_videos.frame_numbers(tmp_path / "v" / "0.mp4")
    assert numbers == list(range(numbers[0], numbers[0] + 30))
    assert 25 <= numbers[0] <= 30


def test_a_stretch_is_cut_into_whole_chunks(gop_videos, tmp_path):
    pictures = sampling.video_pictures(gop_videos["balanced"], seconds=60.0, short_side=96)
    assert pictures.seconds == pytest.approx(3.0)
    tasks = [("balanced", 1.0, tmp_path / "one"), ("compat", 9.0, tmp_path / "nine")]
    sampling.encode_samples(pictures, tasks, name="v")
    assert sorted(p.name for p in (tmp_path / "one" / "v").iterdir()) == ["0.mp4", "1.mp4", "2.mp4"]
    assert make_videos.frame_numbers(tmp_path / "one" / "v" / "2.mp4") == list(range(60, 90))
    assert [p.name for p in (tmp_path / "nine" / "v").iterdir()] == ["0.mp4"]


def test_what_is_no_video_is_named(tmp_path):
    path = tmp_path / "notes.mp4"
    path.write_text("no video")
    with pytest.raises(UserError, match=r"--videos: .*notes\.mp4 cannot be used"):
        sampling.video_pictures(path, seconds=1.0, short_side=96)


def test_only_chunks_shorter_than_a_gop_cut_it():
    assert sampling.cuts_gops("compat", 5)
    assert not sampling.cuts_gops("compat", 15)
    assert not sampling.cuts_gops("balanced", 5)


@pytest.mark.parametrize(
    ("average", "plain"),
    [
        (Fraction(19001, 317), Fraction(60000, 1001)),
        (Fraction(25), Fraction(25)),
        (Fraction(2999, 100), Fraction(30)),
        (Fraction(1, 5), Fraction(1)),
    ],
)
def test_rates_become_plain(average, plain):
    assert abs(sampling._plain_rate(average) - plain) < Fraction(1, 20)
    assert sampling._plain_rate(average).denominator in (1, 1001)
