"""Frames of any file: the same pixels as the loader's, upright, by number or by time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import make_videos
import numpy as np
import pytest

import avion_dali
from avion_dali.contracts import ChunkRef, ClipPart, ClipRequest, CropWindow, DecodeError, UserError
from avion_dali.decode import cpu_fused
from avion_dali.decode.video_clip import decode_clip


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_videos.write_video(tmp_path_factory.mktemp("v") / "a.mp4", frames=60, size=(96, 64))


def numbers(frames: np.ndarray) -> list[int]:
    return [make_videos.read_frame_number(frame) for frame in frames]


def test_pixels_are_those_of_the_decoder(video: Path) -> None:
    window = CropWindow(8, 4, 40, 36)
    found = decode_clip(video, frame_ids=[50, 3, 3, 20], window=window, frame_size=32)
    part = ClipPart(ChunkRef(str(video), video.stat().st_size, 60, 96, 64), (3, 20, 50))
    request = ClipRequest(0, 0, (part,), (2, 0, 0, 1), (window,), (False,), 32)
    expected = np.empty(request.frames_shape, np.uint8)
    cpu_fused.decode_clip(request, expected)
    assert found.dtype == np.uint8 and found.flags.c_contiguous
    np.testing.assert_array_equal(found, expected[0])
    as_numbers = decode_clip(video, frame_ids=[50, 3, 3, 20], window=(8, 4, 40, 36), frame_size=32)
    np.testing.assert_array_equal(as_numbers, found)


def test_whole_pictures_and_centre_squares(video: Path) -> None:
    whole = decode_clip(video, frame_ids=range(5))
    assert whole.shape == (5, 64, 96, 3)
    assert numbers(whole) == [0, 1, 2, 3, 4]
    assert decode_clip(video, frame_ids=[1], frame_size=48).shape == (1, 48, 48, 3)
    assert decode_clip(video, frame_ids=[1], window=(0, 0, 20, 30)).shape == (1, 30, 20, 3)


def test_times_give_the_frame_on_show(video: Path) -> None:
    fps = 30
    times = [0.0, 1 / fps, 1.5 / fps, Fraction(10, fps), 99.0, -1.0]
    assert numbers(decode_clip(video, seconds=times)) == [0, 1, 1, 10, 59, 0]


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_turned_videos_come_out_upright(tmp_path: Path, rotation: int) -> None:
    path = make_videos.write_video(tmp_path / "r.mp4", frames=3, size=(96, 64), rotation=rotation)
    upright = decode_clip(path, frame_ids=[2])
    flat = make_videos.write_video(tmp_path / "f.mp4", frames=3, size=(96, 64))
    expected = np.rot90(decode_clip(flat, frame_ids=[2])[0], rotation // 90)
    np.testing.assert_array_equal(upright[0], expected)
    x, y, width, height = 6, 10, 32, 28
    cut = decode_clip(path, frame_ids=[2], window=(x, y, width, height))[0]
    np.testing.assert_allclose(
        cut.astype(int), expected[y : y + height, x : x + width].astype(int), atol=40
    )  # chroma is sampled anew at the border
    assert np.abs(cut.astype(int) - expected[y : y + height, x : x + width]).mean() < 1.0


def test_what_does_not_fit_is_refused_by_name(video: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ({}, "either `frame_ids` or `seconds`"),
        ({"frame_ids": [0], "seconds": [0.0]}, "either `frame_ids` or `seconds`"),
        ({"frame_ids": []}, "0 to 59"),
        ({"frame_ids": [60]}, "0 to 59"),
        ({"frame_ids": [-1]}, "0 to 59"),
        ({"seconds": []}, "`seconds` = .*finite"),
        ({"seconds": [float("nan")]}, "`seconds` = .*finite"),
        ({"frame_ids": [0], "frame_size": 0}, "`frame_size` = 0"),
        ({"frame_ids": [0], "frame_size": -5}, "`frame_size` = -5"),
        ({"frame_ids": 3}, "`frame_ids` = 3 must be a sequence"),
        ({"frame_ids": [1.7]}, r"`frame_ids` = \[1.7\]"),
        ({"seconds": "12"}, "`seconds` = .*finite"),
        ({"seconds": [None]}, "`seconds` = .*finite"),
        ({"frame_ids": [0], "frame_size": 32.0}, "`frame_size` = 32.0"),
        ({"frame_ids": [0], "frame_size": 10**12}, "`frame_size` = 1000000000000 .* < 8193"),
        ({"frame_ids": [0], "window": (0.0, 0, 20, 20)}, "`window` = .* four whole numbers"),
        ({"frame_ids": [0], "window": 3}, "`window` = 3: it must be four whole numbers"),
        ({"frame_ids": [0], "window": (0, 0, 200, 20)}, "exceeds the 96x64 pictures"),
        ({"frame_ids": [0], "window": (1, 0, 20, 20)}, "`window` = .*even"),
    ):
        with pytest.raises(UserError, match=message):
            decode_clip(video, **arguments)
    for path in (None, 3, b"a.mp4", "", "a\0b"):
        with pytest.raises(UserError, match="`path` = "):
            decode_clip(path, frame_ids=[0])  # type: ignore[arg-type]
    with pytest.raises(DecodeError, match="missing"):
        decode_clip(tmp_path / "none.mp4", frame_ids=[0])


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    path = make_videos.write_video(tmp_path / "a.mp4", frames=10, size=(96, 64))
    assert numbers(decode_clip(path, frame_ids=[9])) == [9]
    make_videos.write_video(path, frames=20, size=(96, 64), first_number=100)
    assert numbers(decode_clip(path, frame_ids=[19])) == [119]


def test_it_is_offered_at_the_front_door() -> None:
    assert avion_dali.decode_clip is decode_clip


def test_numbers_may_come_from_arrays(video: Path) -> None:
    assert numbers(decode_clip(video, frame_ids=np.array([0, 5]))) == [0, 5]


def test_threads_may_share_it(video: Path, tmp_path: Path) -> None:
    other = make_videos.write_video(tmp_path / "b.mp4", frames=60, size=(96, 64), first_number=300)
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda i: numbers(decode_clip((video, other)[i % 2], frame_ids=[i])), range(60))
    assert [n for (n,) in found] == [i + 300 * (i % 2) for i in range(60)]
