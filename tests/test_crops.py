"""Windows: on the even grid, inside the frame, and distributed as they claim."""

import math

import numpy as np
import pytest

from avion_dali.contracts import CropWindow
from avion_dali.data.crops import (
    center_square_window,
    multi_scale_window,
    random_resized_window,
    side_square_windows,
    simple_random_window,
)

SCALE, RATIO = (0.5, 1.0), (3 / 4, 4 / 3)
SIZES = [(16, 16), (320, 256), (127, 95), (341, 256), (17, 33), (2, 2), (3, 2), (1920, 1080)]


def draw(
    width: int,
    height: int,
    *,
    count: int,
    scale: tuple[float, float] = SCALE,
    ratio: tuple[float, float] = RATIO,
    seed: int = 0,
) -> np.ndarray:
    """`count` windows as an int array (count, 4) of x, y, width, height."""
    rng = np.random.default_rng(seed)
    windows = [random_resized_window(width, height, scale=scale, ratio=ratio, rng=rng) for _ in range(count)]
    return np.array([(w.x, w.y, w.width, w.height) for w in windows])


def distance_from_uniform(values: np.ndarray, low: float, high: float) -> float:
    """Kolmogorov-Smirnov distance, in units of its 1 % bound."""
    shares = np.sort((values - low) / (high - low))
    ideal = (np.arange(len(shares)) + 0.5) / len(shares)
    return float(np.abs(shares - ideal).max() / (1.63 / math.sqrt(len(shares))))


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("scale", [SCALE, (0.05, 0.1), (1.0, 1.0)])
def test_windows_are_even_and_inside(width: int, height: int, scale: tuple[float, float]) -> None:
    x, y, w, h = draw(width, height, count=300, scale=scale).T
    assert ((x % 2) | (y % 2) | (w % 2) | (h % 2)).max() == 0
    assert min(x.min(), y.min()) >= 0
    assert min(w.min(), h.min()) >= 2
    assert (x + w).max() <= width
    assert (y + h).max() <= height


@pytest.mark.parametrize(("width", "height", "scale"), [(64, 48, 0.25), (128, 96, 0.09), (65, 49, 0.25)])
def test_offsets_are_uniform_over_all_even_positions(width: int, height: int, scale: float) -> None:
    x, y, w, h = draw(width, height, count=6000, scale=(scale, scale), ratio=(1.0, 1.0)).T
    assert len(set(w.tolist())) == len(set(h.tolist())) == 1
    for offsets, room in ((x, width - w[0]), (y, height - h[0])):
        positions = room // 2 + 1
        counts = np.bincount(offsets // 2, minlength=positions)
        assert len(counts) == positions  # the last position is reached and none beyond it
        expected = len(offsets) / positions
        statistic = ((counts - expected) ** 2 / expected).sum()
        assert statistic < positions - 1 + 4 * math.sqrt(2 * (positions - 1))


def test_offsets_do_not_depend_on_each_other() -> None:
    x, y, _, _ = draw(128, 96, count=4000, scale=(0.25, 0.25), ratio=(1.0, 1.0)).T
    assert abs(np.corrcoef(x, y)[0, 1]) < 0.06


def test_area_is_uniform_and_aspect_log_uniform() -> None:
    # Areas small enough that every draw fits, so that no draw is refused and the marginals show.
    width, height = 3000, 2000
    _, _, w, h = draw(width, height, count=6000, scale=(0.1, 0.4), ratio=(0.75, 4 / 3)).T
    assert distance_from_uniform(w * h / (width * height), 0.1, 0.4) < 1
    assert distance_from_uniform(np.log(w / h), math.log(3 / 4), math.log(4 / 3)) < 1
    assert abs(np.corrcoef(w * h, np.log(w / h))[0, 1]) < 0.05


def test_every_window_keeps_to_the_ranges_up_to_the_grid() -> None:
    width, height = 320, 256
    _, _, w, h = draw(width, height, count=4000).T
    # A side moves by at most one pixel to reach the even grid.
    assert ((w + 1) * (h + 1) >= 0.5 * width * height).all()
    assert ((w - 1) / (h + 1) <= 4 / 3).all()
    assert ((w + 1) / (h - 1) >= 3 / 4).all()


def test_rounding_to_the_grid_does_not_shrink_the_mean_area() -> None:
    _, _, w, h = draw(64, 64, count=8000, scale=(0.1, 0.4)).T
    assert (w * h / 64**2).mean() == pytest.approx(0.25, abs=0.005)


@pytest.mark.parametrize(
    ("size", "ratio", "expected"),
    [
        # Wider than allowed: full height, the widest allowed window, centred.
        ((1000, 100), (3 / 4, 4 / 3), CropWindow(434, 0, 132, 100)),
        # Taller than allowed: full width.
        ((100, 1000), (3 / 4, 4 / 3), CropWindow(0, 434, 100, 132)),
        # An aspect that is allowed: the whole frame.
        ((321, 257), (1.2, 1.3), CropWindow(0, 0, 320, 256)),
        ((16, 16), (2.0, 3.0), CropWindow(0, 4, 16, 8)),
    ],
)
def test_draws_that_never_fit_end_at_the_centred_fallback(
    size: tuple[int, int], ratio: tuple[float, float], expected: CropWindow
) -> None:
    class Outermost:
        """Draws four times the frame and the widest aspect, which never fit; no offset must be asked for."""

        def random(self) -> float:
            return 1.0

    window = random_resized_window(*size, scale=(4.0, 4.0), ratio=ratio, rng=Outermost())
    assert window == expected


@pytest.mark.parametrize(("misses", "expected"), [(9, 128), (10, 320)])
def test_ten_draws_are_tried_before_the_fallback(misses: int, expected: int) -> None:
    class FitsAfterMisses:
        """Areas far too large, then a fifth of the frame; the aspect is the middle of its range, 1."""

        def __init__(self) -> None:
            self.draws = [100.0, 0.5] * misses + [1 / 9, 0.5]

        def random(self) -> float:
            return self.draws.pop(0)

        def integers(self, low: int, high: int) -> int:
            return low

    window = random_resized_window(320, 256, scale=(0.1, 1.0), ratio=RATIO, rng=FitsAfterMisses())
    assert window.width == expected


def test_extreme_sizes_really_fall_back() -> None:
    windows = draw(2000, 20, count=50)
    assert {tuple(w) for w in windows.tolist()} == {(986, 0, 26, 20)}


def test_the_same_generator_gives_the_same_window() -> None:
    assert draw(320, 256, count=20, seed=3).tolist() == draw(320, 256, count=20, seed=3).tolist()
    assert draw(320, 256, count=20, seed=3).tolist() != draw(320, 256, count=20, seed=4).tolist()


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((512, 288), CropWindow(112, 0, 288, 288)),
        ((288, 512), CropWindow(0, 112, 288, 288)),
        ((340, 256), CropWindow(42, 0, 256, 256)),
        ((342, 256), CropWindow(42, 0, 256, 256)),  # 43 lies off the grid
        ((341, 255), CropWindow(42, 0, 254, 254)),
        ((16, 16), CropWindow(0, 0, 16, 16)),
        ((17, 16), CropWindow(0, 0, 16, 16)),
        ((2, 3), CropWindow(0, 0, 2, 2)),
    ],
)
def test_centre_square(size: tuple[int, int], expected: CropWindow) -> None:
    assert center_square_window(*size) == expected


def test_centre_square_is_the_largest_and_centred_up_to_the_grid() -> None:
    for width in range(2, 60):
        for height in range(2, 60, 7):
            window = center_square_window(width, height)
            assert window.width == window.height == min(width, height) // 2 * 2
            assert 0 <= width - window.width - 2 * window.x <= 3
            assert 0 <= height - window.height - 2 * window.y <= 3


def assert_even_and_inside(window: CropWindow, width: int, height: int) -> None:
    assert all(number % 2 == 0 for number in (window.x, window.y, window.width, window.height))
    assert window.x + window.width <= width
    assert window.y + window.height <= height


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_simple_random_windows_are_squares_of_the_short_side(width: int, height: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        window = simple_random_window(width, height, rng=rng)
        assert_even_and_inside(window, width, height)
        assert window.width == window.height == min(width, height) // 2 * 2


def test_simple_random_places_are_uniform_over_the_even_positions() -> None:
    rng = np.random.default_rng(0)
    for size, along in (((40, 20), "x"), ((20, 41), "y")):
        windows = [simple_random_window(*size, rng=rng) for _ in range(4000)]
        counts = np.bincount([getattr(w, along) // 2 for w in windows])
        assert len(counts) == 11
        np.testing.assert_allclose(counts / 4000, 1 / 11, atol=0.02)
        assert {getattr(w, "y" if along == "x" else "x") for w in windows} == {0}


@pytest.mark.parametrize(("width", "height"), [(320, 256), (341, 256), (256, 340), (16, 16), (1920, 1080)])
def test_multi_scale_windows_have_ten_shapes_at_thirteen_places(width: int, height: int) -> None:
    rng = np.random.default_rng(0)
    windows = [multi_scale_window(width, height, frame_size=224, rng=rng) for _ in range(3000)]
    for window in windows:
        assert_even_and_inside(window, width, height)
    base = min(width, height)
    lengths = [int(base * share) for share in (1, 0.875, 0.75, 0.66)]
    lengths = [(224 if abs(n - 224) <= 2 else n) // 2 * 2 for n in lengths]
    near = {(lengths[i], lengths[j]) for i in range(4) for j in range(4) if abs(i - j) <= 1}
    assert {(w.width, w.height) for w in windows} == near
    if min(width, height) > 100:
        by_shape = {shape: set() for shape in near}
        for w in windows:
            by_shape[w.width, w.height].add((w.x, w.y))
        w, h = lengths[2], lengths[2]
        steps = (width - w) // 4, (height - h) // 4
        quarters = {(0, 0), (4, 0), (0, 4), (4, 4), (2, 2), (0, 2), (4, 2), (2, 0), (2, 4)}
        quarters |= {(1, 1), (3, 1), (1, 3), (3, 3)}
        assert by_shape[w, h] == {(x * steps[0] // 2 * 2, y * steps[1] // 2 * 2) for x, y in quarters}


def test_multi_scale_lengths_near_the_output_become_it() -> None:
    """0.875 of 256 is 224 by itself; of 258 it is 225, and of 260 it is 227, which is too far."""
    rng = np.random.default_rng(0)
    shapes = {
        side: {multi_scale_window(400, side, frame_size=224, rng=rng).width for _ in range(300)}
        for side in (256, 258, 260)
    }
    assert [sorted(shapes[side])[2] for side in (256, 258, 260)] == [224, 224, 226]


@pytest.mark.parametrize(
    ("size", "offsets"),
    [
        ((397, 224), (0, 86, 172)),
        ((224, 397), (0, 86, 172)),
        ((512, 288), (0, 112, 224)),
        ((225, 225), (0, 0, 0)),
    ],
)
def test_three_test_crops_lie_along_the_longer_side(size: tuple[int, int], offsets: tuple[int, ...]) -> None:
    """The recorded offsets of width 397 are 0, 87, 173; here they lie on the even grid."""
    windows = side_square_windows(*size)
    assert tuple(max(w.x, w.y) for w in windows) == offsets
    assert windows[1] == center_square_window(*size)
    for window in windows:
        assert_even_and_inside(window, *size)
        assert window.width == window.height == min(size) // 2 * 2
