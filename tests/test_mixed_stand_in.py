"""Every rule of mini clips against a stand-in for DALI's decoder on GPUs, as most machines have none."""

from collections.abc import Sequence
from pathlib import Path

import make_videos
import numpy as np
import pytest
from dali_clips import VP9, clip_request, decoded
from nvdec_stand_in import BUFFERED, numbered, wanted_frames
from test_mini_clip import CLOSED_HEVC, packets_of
from test_reading import chunk_ref, frame_sets, raw_frames

from avion_dali.decode.source import PartPackets
from avion_dali.loading.ring import SharedRing
from pipelines.codecs import require_decodable
from pipelines.mini_clip import MAX_REORDER_FRAMES, UnfitForMiniClipError, build_mini_clip
from pipelines.mini_clip_worker import collect_into

PYRAMID = {
    "preset": "veryfast",
    "threads": "1",
    "x264-params": "b-pyramid=normal:bframes=7:keyint=24:b-adapt=0",
}
STYLES = {
    "x264-default": "h264",
    "balanced": "h264",
    "pyramid": "h264",
    "no-b": "h264",
    "intra": "h264",
    "mkv": "h264",
    "mov": "h264",
    "hevc-closed": "hevc",
    "vp9-mp4": "vp9",
}


@pytest.fixture(scope="module")
def videos(gop_videos: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("mixed")
    return gop_videos | {
        "pyramid": make_videos.write_video(folder / "pyramid.mp4", options=PYRAMID),
        "hevc-closed": make_videos.write_video(folder / "closed.mp4", codec="libx265", options=CLOSED_HEVC),
    }


def assert_exact(parts: Sequence[PartPackets], expected: Sequence[np.ndarray], what: object) -> None:
    """The mini clip of these parts, decoded as on a GPU, has these frames, bit for bit."""
    require_decodable(parts, device="mixed")
    frames = wanted_frames(build_mini_clip(parts))
    for number, (frame, right) in enumerate(zip(frames, expected, strict=True)):
        np.testing.assert_array_equal(frame, right, err_msg=f"{what}, frame {number}")


@pytest.mark.parametrize("style", STYLES)
def test_frames_by_number(videos: dict[str, Path], style: str) -> None:
    """One run or several, with pictures left out where the style has some that no wanted frame needs."""
    frames, path = raw_frames(videos[style]), videos[style]
    runs, packets = set(), []
    for ids in [*frame_sets(len(frames), seed=list(STYLES).index(style))[:8], (3, 40, 70)]:
        part = packets_of(path, ids)
        assert part.stream.codec == STYLES[style]
        assert_exact([part], [frames[i] for i in ids], (style, ids))
        runs.add(len(part.runs))
        packets.append(sum(len(run.payloads) for run in part.runs))
    assert len(runs) > 1 or style == "x264-default"  # whose GOPs are longer than the file
    if style in ("balanced", "hevc-closed", "pyramid"):
        span = packets_of(path, (0, len(frames) - 1))
        assert sum(len(run.payloads) for run in span.runs) < len(frames)
        assert min(packets) < max(packets)


@pytest.mark.parametrize("style", ["pyramid", "hevc-closed"])
def test_pyramids_need_the_buffer(videos: dict[str, Path], style: str) -> None:
    """Their pictures are decoded two places late or more, so these styles do test the order."""
    (run,) = packets_of(videos[style], range(12)).runs
    shown = [sorted(run.pts).index(pts) for pts in run.pts]
    assert max(decoded - place for decoded, place in enumerate(shown)) >= 2
    assert shown != sorted(shown)
    assert numbered(run.pts) == sorted(run.pts)


@pytest.mark.parametrize("style", ["balanced", "pyramid", "hevc-closed", "vp9-mp4"])
def test_clips_across_a_chunk_border(videos: dict[str, Path], style: str, tmp_path: Path) -> None:
    """The last frames of one chunk and the first of the next, with the same settings and other pictures."""
    encoders = {
        "balanced": ("libx264", {"preset": "veryfast", "threads": "1", "x264-params": make_videos.BALANCED}),
        "pyramid": ("libx264", PYRAMID),
        "hevc-closed": ("libx265", CLOSED_HEVC),
        "vp9-mp4": ("libvpx-vp9", make_videos.VP9_FAST),
    }
    codec, options = encoders[style]
    how = {"codec": codec, "options": options, "frames": 40, "first_number": 500}
    after = make_videos.write_video(tmp_path / "after.mp4", **how)
    (first, second), ids = (raw_frames(videos[style]), raw_frames(after)), [(60, 88, 89), (0, 1, 17)]
    parts = [packets_of(videos[style], ids[0]), packets_of(after, ids[1])]
    assert_exact(parts, [*(first[i] for i in ids[0]), *(second[i] for i in ids[1])], style)


@pytest.mark.parametrize("style", ["open-gop", "hevc"])
def test_open_gops(videos: dict[str, Path], style: str) -> None:
    """The first GOP of a file begins with a clean keyframe and fits; clips that start in another one do not."""
    frames = raw_frames(videos[style])
    assert_exact([packets_of(videos[style], (0, 4))], [frames[0], frames[4]], style)
    for ids in [(70,), (0, 40, 70)]:
        with pytest.raises(UnfitForMiniClipError, match="open GOP"):
            build_mini_clip([packets_of(videos[style], ids)])


@pytest.mark.parametrize("late", range(1, BUFFERED + 1))
def test_reordering_up_to_the_limit_of_mini_clips(late: int) -> None:
    """Of a picture decoded `late` places after its turn; one more than the limit, and DALI misnumbers it."""
    times = [0, *range(2, late + 2), 1, *range(late + 2, late + 20)]
    assert (numbered(times) == sorted(times)) == (late <= MAX_REORDER_FRAMES)


@pytest.mark.parametrize(("size", "unfit"), [((97, 81), "odd side (97x81)"), ((96, 80), "")])
def test_odd_sizes_are_decoded_in_the_worker(size: tuple[int, int], unfit: str, tmp_path: Path) -> None:
    """VP8 and VP9 alone have them; H.264 and HEVC with 4:2:0 chroma are cropped to even sizes."""
    path = make_videos.write_video(tmp_path / "a.mp4", frames=20, size=size, **VP9)
    request = clip_request(0, [(chunk_ref(path), (3, 9))], size=32)
    ring = SharedRing(1, (1, *request.frames_shape))
    try:
        clip = collect_into(request, ring.place(0, 0), "mixed")
        assert unfit in clip.unfit
        assert (clip.mini_clip is None) == bool(unfit)
        assert np.array_equal(ring.frames(0)[0], decoded(request)) == bool(unfit)
    finally:
        ring.close()
