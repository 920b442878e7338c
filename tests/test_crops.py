"""Windows: on the even grid, inside the frame, and distributed as they claim."""

import math

import numpy as np
import pytest

from avion_dali.contracts import CropWindow
from avion_dali.data.crops import center_square_window, random_resized_window

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
        """Draws the largest area and the widest aspect, which never fit; offsets must not be asked for."""

        def uniform(self, low: float, high: float) -> float:
            return 4.0 if low == 1.0 else high

    window = random_resized_window(*size, scale=(1.0, 1.0), ratio=ratio, rng=Outermost())
    assert window == expected


@pytest.mark.parametrize(("misses", "expected"), [(9, 128), (10, 320)])
def test_ten_draws_are_tried_before_the_fallback(misses: int, expected: int) -> None:
    class FitsAfterMisses:
        """Areas far too large, then a fifth of the frame; the aspect is always 1."""

        def __init__(self) -> None:
            self.areas = [100.0] * misses + [0.2]

        def uniform(self, low: float, high: float) -> float:
            return self.areas.pop(0) if low == 0.1 else 0.0

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
