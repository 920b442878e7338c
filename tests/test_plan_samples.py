"""Stand-ins for a data set: what they hold, and what their clips need, as the reader plans it."""

from fractions import Fraction

import make_videos
import numpy as np
import pytest
from chunk_folders import indexed_chunk

from avion_dali.contracts import ChunkRef, ClipPart, ClipRequest, CropWindow, UserError
from avion_dali.data.hand_held import draw_pictures
from avion_dali.data.planner import ClipRules, Planner
from avion_dali.decode.source import gather_packets
from avion_dali.inspection import plan_samples


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A chunk folder with two chunks of three seconds, 30 fps, numbered from 0."""
    root = tmp_path_factory.mktemp("sampled") / "chunks"
    (root / "a").mkdir(parents=True)
    for second in (0, 3):
        make_videos.write_video(root / "a" / f"{second}.mp4", first_number=second * 30, gop=30)
    return root


def request_of(*parts, views=1):
    count = sum(len(part.frame_ids) for part in parts)
    windows = (CropWindow(0, 0, 64, 64),) * views
    return ClipRequest(0, 0, parts, tuple(range(count)), windows, (False,) * views, 32)


def test_needs_add_up_over_the_parts_of_a_clip(gop_videos, tmp_path):
    one, other = (ClipPart(indexed_chunk(gop_videos[s], tmp_path), (5, 40)) for s in ("balanced", "no-b"))
    both, first, second = (
        plan_samples.clip_needs(request_of(*parts)) for parts in ((one, other), (one,), (other,))
    )
    assert both == (first[0] + second[0], first[1] + second[1])
    payloads = [
        p for part in (one, other) for run in gather_packets(part, decoder="x").runs for p in run.payloads
    ]
    assert both[0] == len(payloads)
    assert sum(both[1]) > sum(map(len, payloads))  # the packet index is read too


def test_views_share_one_decode(gop_videos, tmp_path):
    part = ClipPart(indexed_chunk(gop_videos["balanced"], tmp_path), (5, 40))
    assert plan_samples.clip_needs(request_of(part, views=3)) == plan_samples.clip_needs(request_of(part))


def test_needs_ask_for_an_index(gop_videos):
    path = gop_videos["balanced"]
    part = ClipPart(ChunkRef(str(path), path.stat().st_size, 90, 128, 96), (0,))
    with pytest.raises(UserError, match="no packet index"):
        plan_samples.clip_needs(request_of(part))


@pytest.mark.parametrize(("stands_for", "crossing"), [(None, 1 / 3), (10.0, 0.1), (1.0, 1.0)])
def test_clips_cross_borders_as_often_as_they_will(stands_for, crossing, clip_folder, tmp_path):
    manifest = plan_samples.write_sample_manifest(
        clip_folder, tmp_path / "m", clip_seconds=1.0, chunk_seconds=stands_for
    )
    samples = [manifest.sample(row) for row in range(manifest.num_samples)]
    assert len(samples) == plan_samples.CLIPS
    assert np.mean([sample.num_chunks == 2 for sample in samples]) == pytest.approx(crossing, abs=0.1)
    for sample in samples:
        first, last = (manifest.chunk(sample.first_chunk + i) for i in (0, sample.num_chunks - 1))
        assert first.start_s <= sample.start_s < first.end_s
        assert last.start_s < sample.end_s <= last.end_s
        assert first.video == last.video
        assert sample.end_s - sample.start_s == pytest.approx(1.0)


def test_clips_longer_than_chunks_touch_all_they_span(clip_folder, tmp_path):
    manifest = plan_samples.write_sample_manifest(clip_folder, tmp_path / "m", clip_seconds=7.0)
    assert {manifest.sample(row).num_chunks for row in range(manifest.num_samples)} == {3, 4}
    requests = plan_samples.sample_requests(Planner(manifest, ClipRules(14, 32, training=True), seed=0))
    assert len(requests) == plan_samples.CLIPS
    assert all(len(request.gather) == 14 for request in requests)
    assert all(len(request.parts) >= 3 for request in requests)


def test_figures_of_chunks(clip_folder, tmp_path):
    manifest = plan_samples.write_sample_manifest(clip_folder, tmp_path / "m", clip_seconds=1.0)
    seconds, bytes_per_s = plan_samples.mean_chunk(manifest)
    files = sum(path.stat().st_size for path in clip_folder.rglob("*.mp4"))
    index = (tmp_path / "m" / "packets.bin").stat().st_size
    assert seconds == pytest.approx(3.0)
    assert bytes_per_s == pytest.approx((files + index) / 6)


def test_chunks_without_index_are_refused(tmp_path):
    (tmp_path / "chunks" / "v").mkdir(parents=True)
    make_videos.write_video(tmp_path / "chunks" / "v" / "0.mp4", frames=10, codec="mpeg4", options={})
    with pytest.raises(UserError, match="mpeg4 has no packet index"):
        plan_samples.write_sample_manifest(tmp_path / "chunks", tmp_path / "m", clip_seconds=1.0)


def test_some_chunks_of_a_folder_are_opened(clip_folder, tmp_path, monkeypatch):
    both = plan_samples.open_chunks(clip_folder, tmp_path / "both", clip_seconds=1.0)
    assert len({both.chunk(row).ref.path for row in range(both.num_chunks)}) == 2
    monkeypatch.setattr(plan_samples, "_LINKED", 1)
    manifest = plan_samples.open_chunks(clip_folder, tmp_path / "one", clip_seconds=1.0)
    assert len({manifest.chunk(row).ref.path for row in range(manifest.num_chunks)}) == 1
    (link,) = (tmp_path / "one").rglob("*.mp4")
    assert link.resolve().parent == (clip_folder / "a").resolve()


def test_a_manifest_is_opened_as_it_is(clip_folder, tmp_path):
    written = plan_samples.write_sample_manifest(clip_folder, tmp_path / "m", clip_seconds=1.0)
    opened = plan_samples.open_chunks(tmp_path / "m", tmp_path / "scratch", clip_seconds=2.0)
    assert [opened.sample(row) for row in range(5)] == [written.sample(row) for row in range(5)]
    assert not (tmp_path / "scratch").exists()


def test_procedural_pictures_move_and_have_detail():
    planes, fps = draw_pictures(seconds=0.2, short_side=96)
    assert (planes.shape, fps) == ((6, 96 * 3 // 2, 176), 30)
    luma = planes[:, :96].astype(float)
    assert luma.std() > 20
    assert all(np.abs(a - b).mean() > 2 for a, b in zip(luma, luma[1:], strict=False))
    assert np.array_equal(planes, draw_pictures(seconds=0.2, short_side=96)[0])


def test_pictures_come_from_the_middle_of_a_video(gop_videos, tmp_path):
    planes, fps = plan_samples.video_pictures(gop_videos["x264-gop30"], seconds=1.0, short_side=96)
    assert (len(planes), fps) == (30, 30)
    plan_samples.encode_samples(planes, fps, tasks=[("balanced", 1.0, tmp_path)], name="v")
    numbers = make_videos.frame_numbers(tmp_path / "v" / "0.mp4")
    assert numbers == list(range(numbers[0], numbers[0] + 30))
    assert 25 <= numbers[0] <= 30


def test_a_stretch_is_cut_into_whole_chunks(gop_videos, tmp_path):
    planes, fps = plan_samples.video_pictures(gop_videos["balanced"], seconds=60.0, short_side=96)
    assert len(planes) / fps == pytest.approx(3.0)
    tasks = [("balanced", 1.0, tmp_path / "one"), ("compat", 9.0, tmp_path / "nine")]
    plan_samples.encode_samples(planes, fps, tasks=tasks, name="v")
    assert sorted(p.name for p in (tmp_path / "one" / "v").iterdir()) == ["0.mp4", "1.mp4", "2.mp4"]
    assert make_videos.frame_numbers(tmp_path / "one" / "v" / "2.mp4") == list(range(60, 90))
    assert [p.name for p in (tmp_path / "nine" / "v").iterdir()] == ["0.mp4"]


def test_what_is_no_video_is_named(tmp_path):
    path = tmp_path / "notes.mp4"
    path.write_text("no video")
    with pytest.raises(UserError, match=r"--videos: .*notes\.mp4 cannot be used"):
        plan_samples.video_pictures(path, seconds=1.0, short_side=96)


@pytest.mark.parametrize(("fps", "plain"), [(25, 25), (Fraction(30000, 1001), 30)])
def test_pictures_keep_the_nearest_whole_rate(fps, plain, tmp_path):
    video = make_videos.write_video(tmp_path / "v.mp4", frames=20, fps=fps)
    assert plan_samples.video_pictures(video, seconds=1.0, short_side=96)[1] == Fraction(plain)
