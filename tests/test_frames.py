"""Frame ids against vectors recorded from the reference implementations, and the ranges they may take."""

import numpy as np
import pytest

from avion_dali.data.frames import (
    dense_frame_ids,
    frame_range_in_seconds,
    segment_frame_ids,
    segment_of,
    strided_frame_ids,
    view_frame_ids,
    view_start_frames,
)

NTSC = 30_000 / 1001


class LegacyDraws:
    """`np.random.RandomState` behind the one method of a Generator that the samplers call."""

    def __init__(self, seed: int) -> None:
        self._state = np.random.RandomState(seed)

    def integers(self, low: int, high: int, size: int | None = None) -> np.ndarray | int:
        return self._state.randint(low, high, size=size)


@pytest.mark.parametrize(
    ("start", "stop", "num_frames", "expected"),
    [
        (0, 30, 4, [3, 11, 18, 26]),
        (100, 130, 16, [100, 102, 104, 106, 108, 110, 112, 114, 115, 117, 119, 121, 123, 125, 127, 129]),
        (430, 470, 4, [435, 445, 455, 465]),
        (10, 12, 4, [10, 10, 11, 11]),
        (0, 1, 16, [0] * 16),
    ],
)
def test_segment_middles_equal_the_recorded_vectors(
    start: int, stop: int, num_frames: int, expected: list[int]
) -> None:
    ids = segment_frame_ids(start, stop, num_frames)
    assert ids.dtype == np.int64
    assert ids.tolist() == expected


def test_jitter_reaches_exactly_the_recorded_support_of_each_slot() -> None:
    rng = np.random.default_rng(0)
    drawn = np.stack([segment_frame_ids(0, 30, 4, rng) for _ in range(3000)])
    supports = [sorted(set(slot)) for slot in drawn.T.tolist()]
    assert supports == [list(range(a, b + 1)) for a, b in ((0, 7), (7, 14), (15, 22), (22, 29))]


def test_jitter_width_leaves_out_one_frame() -> None:
    # Three frames, one slot: 1.5 plus a jitter of [-1, 1) ends on 0, 1, 2 with chances 1/4, 1/2, 1/4.
    rng = np.random.default_rng(2)
    counts = np.bincount([segment_frame_ids(0, 3, 1, rng)[0] for _ in range(4000)])
    np.testing.assert_allclose(counts / 4000, [0.25, 0.5, 0.25], atol=0.03)


def test_jitter_is_centred_on_the_middle_and_independent_per_slot() -> None:
    rng = np.random.default_rng(1)
    drawn = np.stack([segment_frame_ids(0, 3000, 4, rng) for _ in range(4000)])
    np.testing.assert_allclose(
        drawn.mean(axis=0), [375, 1125, 1875, 2625], atol=3 * 216.5 / np.sqrt(4000) + 0.5
    )
    np.testing.assert_allclose(drawn.std(axis=0), 2999 / 4 / np.sqrt(12), rtol=0.03)
    correlation = np.corrcoef(drawn.T) - np.eye(4)
    assert np.abs(correlation).max() < 0.06


@pytest.mark.parametrize("length", [1, 2, 3, 5, 16, 17, 449, 108_000])
@pytest.mark.parametrize("num_frames", [1, 4, 16])
def test_ids_stay_in_the_range_and_in_order(length: int, num_frames: int) -> None:
    rng = np.random.default_rng(length)
    for start in (0, 7, 5_000_000):
        drawn = [segment_frame_ids(start, start + length, num_frames, rng) for _ in range(40)]
        for ids in (segment_frame_ids(start, start + length, num_frames), *drawn):
            assert ids.shape == (num_frames,)
            assert ids.min() >= start
            assert ids.max() < start + length
            assert (np.diff(ids) >= 0).all()


@pytest.mark.parametrize("rng", [None, np.random.default_rng(0)])
@pytest.mark.parametrize(("start", "stop"), [(450, 450), (10, 9)])
def test_an_empty_range_is_an_error_and_never_the_frame_before(
    start: int, stop: int, rng: np.random.Generator | None
) -> None:
    with pytest.raises(ValueError, match="empty range"):
        segment_frame_ids(start, stop, 4, rng)


def test_strided_ids_equal_the_recorded_vector() -> None:
    ids = strided_frame_ids(300, 16, 4, LegacyDraws(0))
    assert ids.tolist() == [175, 177, 180, 187, 191, 195, 199, 201, 207, 209, 214, 216, 223, 226, 228, 232]


def test_strided_ids_wrap_round_in_a_short_video() -> None:
    assert strided_frame_ids(50, 16, 4).tolist() == [*range(0, 49, 4), 2, 6, 10]
    assert strided_frame_ids(1, 16, 4, np.random.default_rng(0)).tolist() == [0] * 16


def test_strided_start_and_shift_stay_in_their_ranges() -> None:
    rng = np.random.default_rng(0)
    drawn = np.stack([strided_frame_ids(100, 16, 4, rng) for _ in range(3000)])
    assert set(drawn[:, 0].tolist()) == set(range(0, 32 + 3))  # starts 0..31, shifts 0..3
    assert drawn.max() == 31 + 4 * 15 + 3
    steps = np.diff(drawn)
    assert (steps.min(), steps.max()) == (1, 7)
    # 68 frames are not more than the span: no random start.
    assert max(strided_frame_ids(68, 16, 4, rng)[0] for _ in range(50)) == 3


def test_dense_ids_equal_the_recorded_vectors() -> None:
    ids = dense_frame_ids(300, 16, 4, LegacyDraws(0))
    assert ids.tolist() == [172, 176, 180, 184, 189, 193, 197, 201, 206, 210, 214, 218, 223, 227, 231, 235]
    assert dense_frame_ids(40, 16, 4).tolist() == [*range(0, 37, 4), *[39] * 6]
    assert dense_frame_ids(64, 16, 4).tolist() == list(range(0, 61, 4))


def test_dense_window_is_the_middle_one_without_a_generator() -> None:
    ids = dense_frame_ids(300, 16, 4)
    np.testing.assert_array_equal(ids, dense_frame_ids(300, 16, 4))
    assert abs((ids[0] + ids[-1]) / 2 - 149.5) <= 1


@pytest.mark.parametrize("num_source", [1, 3, 63, 64, 65, 66, 67, 200])
def test_dense_ids_stay_in_the_video_and_in_order(num_source: int) -> None:
    rng = np.random.default_rng(num_source)
    for ids in [
        dense_frame_ids(num_source, 16, 4),
        *(dense_frame_ids(num_source, 16, 4, rng) for _ in range(60)),
    ]:
        assert ids.shape == (16,)
        assert 0 <= ids.min() <= ids.max() < num_source
        assert (np.diff(ids) >= 0).all()


def test_view_starts_equal_the_recorded_vectors() -> None:
    assert view_start_frames(300, 16, stride=4, num_views=5) == [0, 59, 118, 177, 236]
    assert view_start_frames(70, 16, stride=4, num_views=5) == [0, 1, 3, 4, 6]
    assert view_start_frames(64, 16, stride=4, num_views=5) == [0] * 5
    assert view_start_frames(10, 16, stride=4, num_views=5) == [0] * 5


def test_views_read_the_plain_stride_and_repeat_the_last_frame() -> None:
    assert view_frame_ids(300, 16, stride=4, start=236).tolist() == list(range(236, 297, 4))
    assert view_frame_ids(70, 16, stride=4, start=6).tolist() == list(range(6, 67, 4))
    assert view_frame_ids(40, 16, stride=4, start=0).tolist() == [*range(0, 37, 4), *[39] * 6]
    assert view_frame_ids(1, 3, stride=4, start=0).tolist() == [0, 0, 0]


@pytest.mark.parametrize("num_source", [1, 2, 3, 5, 10, 301])
@pytest.mark.parametrize("num_parts", [1, 2, 5])
def test_equal_parts_cover_everything_and_are_never_empty(num_source: int, num_parts: int) -> None:
    parts = [segment_of(num_source, k, num_parts=num_parts) for k in range(num_parts)]
    assert all(0 <= first < stop <= num_source for first, stop in parts)
    assert set().union(*(range(*part) for part in parts)) == set(range(num_source))
    if num_source >= num_parts:
        sizes = [stop - first for first, stop in parts]
        assert sum(sizes) == num_source
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("span", "fps", "num_frames", "expected"),
    [
        ((0.0, 1.0), 30, 450, (0, 30)),
        ((1.0, 2.0), 25, 375, (25, 50)),
        ((14.0, 16.0), 30, 450, (420, 450)),  # goes on in the next chunk
        ((-1.0, 1.0), 30, 450, (0, 30)),  # began in the chunk before
        ((14.0, 16.0), 30, 449, (420, 449)),  # a frame is missing at the end
        ((14.0, 15.0), NTSC, 450, (420, 450)),
        ((14.0, 15.0), NTSC, 449, (420, 449)),
        ((0.0, 15.0), 60_000 / 1001, 899, (0, 899)),
        ((0.25, 0.75), 50, 750, (12, 38)),  # 12.5 and 37.5: half to even
        ((3.0, 3.0), 30, 450, (90, 90)),
        ((3.001, 3.002), 30, 450, (90, 90)),
        ((15.0, 16.0), 30, 450, (450, 450)),
        ((-5.0, -4.0), 30, 450, (0, 0)),
        ((5.0, 4.0), 30, 450, (150, 150)),
    ],
)
def test_seconds_to_frames(
    span: tuple[float, float], fps: float, num_frames: int, expected: tuple[int, int]
) -> None:
    assert frame_range_in_seconds(*span, fps=fps, num_frames=num_frames) == expected


def test_seconds_to_frames_by_timestamps() -> None:
    times = np.array([0.0, 0.1, 0.2, 1.0, 1.5, 4.0])

    def ids(start: float, end: float) -> tuple[int, int]:
        return frame_range_in_seconds(start, end, fps=99.0, num_frames=6, frame_times=times)

    assert ids(0.0, 0.2) == (0, 2)
    assert ids(0.05, 1.2) == (1, 4)
    assert ids(-3.0, 9.0) == (0, 6)
    assert ids(1.6, 3.9) == (4, 5), "the picture on show all the while"
    assert ids(1.6, 4.5) == (4, 6)
    assert ids(1.6, 1.65) == (5, 5)
    assert ids(5.0, 6.0) == (6, 6)


@pytest.mark.parametrize("fps", [23.976, 25.0, NTSC, 30.0, 50.0, 2 * NTSC])
def test_constant_rate_agrees_with_its_own_timestamps(fps: float) -> None:
    """Rounding to the nearest frame and searching the list of times differ by one frame at most."""
    rng = np.random.default_rng(int(fps))
    times = np.arange(400) / fps
    for _ in range(200):
        start, end = sorted(rng.uniform(-2, 400 / fps + 2, size=2))
        by_rate = frame_range_in_seconds(start, end, fps=fps, num_frames=400)
        by_times = frame_range_in_seconds(start, end, fps=fps, num_frames=400, frame_times=times)
        assert np.abs(np.subtract(by_rate, by_times)).max() <= 1
