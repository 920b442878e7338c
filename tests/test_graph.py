"""The DALI graph on its CPU backend must deliver the clips of `cpu-fused`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import av
import make_videos
import numpy as np
import pytest
import torch
from dali_clips import clip_request, draw_soft
from test_reading import chunk_ref

from avion_dali.contracts import ClipRequest
from avion_dali.decode import cpu_fused
from avion_dali.decode.source import gather_packets
from pipelines.mini_clip import MiniClip, build_mini_clip

pytest.importorskip("nvidia.dali")

from pipelines.color import correct_colors
from pipelines.graph import (
    GraphInputs,
    GraphSettings,
    build_graph,
    default_graphs,
    default_threads,
    failure_cause,
    graph_inputs,
)

SIZE = (192, 144)
BATCH = 6


@dataclass(frozen=True)
class Tolerance:
    """How far a clip of DALI may be from that of `cpu-fused`.

    Both crop, convert to RGB and scale by the same triangle filter, but in another order: swscale scales the
    chroma planes once, to the output; DALI first to full size, then again as part of the RGB picture. Real
    videos agree within 49 dB and 0.1 levels; only saturated edges, which 4:2:0 video blurs anyhow, come below
    45 dB. Half a chroma sample's offset would show as 38 dB, wrong rounding or matrices as a bias of a level.

    Colours that leave the range are cut off before scaling by DALI (and by `reference`, from which it differs
    by 0.1 levels at most), after scaling by `cpu-fused`. Where a tenth of a picture is as dark and colourful as
    that, and many pixels become one, that is a bias of its own: 0.4 levels in real pictures shrunk seven times.
    """

    worst_psnr_db: float = 45.0
    worst_bias_levels: float = 0.3


TOLERANCE = Tolerance()
Clip = tuple[ClipRequest, MiniClip]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, vp9 = tmp_path_factory.mktemp("dali"), {"codec": "libvpx-vp9", "options": make_videos.VP9_FAST}
    styles = {
        "vp9": ("vp9.webm", vp9),
        "vp9-next": ("next.webm", vp9 | {"first_number": 500}),
        "vp9-full-range": ("full.mp4", vp9 | {"color_range": 2, "colorspace": 6}),
        "vp9-bt709": ("bt709.mp4", vp9 | {"color_range": 1, "colorspace": 1}),
        "vp9-240m": ("240m.mp4", vp9 | {"color_range": 2, "colorspace": 7}),
        "vp9-bt2020": ("bt2020.mp4", vp9 | {"color_range": 1, "colorspace": 9}),
        "vp9-odd": ("odd.mp4", vp9 | {"size": (130, 98)}),
        "vp8": ("vp8.webm", {"codec": "libvpx", "options": make_videos.VP9_FAST | {"b": "1M"}}),
        "mjpeg": ("mjpeg.mov", {"codec": "mjpeg", "options": {"q": "3"}, "pix_fmt": "yuvj420p"}),
        "h264": ("h264.mp4", {}),
    }
    return {
        style: make_videos.write_video(folder / name, **({"frames": 60, "size": SIZE, "draw": draw_soft} | how))
        for style, (name, how) in styles.items()
    }


@dataclass
class Feed:
    """A source that gives the batches it was handed, then ends."""

    batches: list[GraphInputs]

    def __call__(self) -> GraphInputs:
        if not self.batches:
            raise StopIteration
        return self.batches.pop(0)


@dataclass
class Runner:
    """A graph built once, for any clips of its settings."""

    feed: Feed
    run: Callable[[], tuple]
    reset: Callable[[], None]

    def outputs(self, clips: Sequence[Clip], batch: int = BATCH) -> list[np.ndarray | RuntimeError]:
        """Frames (V, T, H, W, C) of each clip, in order, or the error of its batch."""
        chunks = [clips[i : i + batch] for i in range(0, len(clips), batch)]
        self.feed.batches = [graph_inputs(chunk) for chunk in chunks]
        found: list[np.ndarray | RuntimeError] = []
        for chunk in chunks:
            try:
                frames, sample_ids = self.run()
            except RuntimeError as error:
                found += [error] * len(chunk)
                continue
            assert np.array(sample_ids.as_tensor()).tolist() == [request.sample_id for request, _ in chunk]
            found += list(np.array(frames.as_cpu().as_tensor()))
        with pytest.raises(StopIteration):
            self.run()
        self.reset()
        return found


@pytest.fixture(scope="session")
def runner() -> Callable[..., Runner]:
    """Graphs by number of views and output size, each built once."""

    @cache
    def make(views: int = 1, size: int = 112, device: str = "cpu") -> Runner:
        feed = Feed([])
        pipeline = build_graph(feed, GraphSettings(device, 0, BATCH, views, size, num_threads=2))
        return Runner(feed, pipeline.run, pipeline.reset)

    return make


def request_for(
    parts: Sequence[tuple[Path, Sequence[int]]],
    windows: Sequence[tuple[int, int, int, int]] = (),
    *,
    sample_id: int = 0,
    **more: Any,
) -> ClipRequest:
    """A request with `clip_request`'s defaults: whole picture, no flip, each frame once."""
    return clip_request(sample_id, [(chunk_ref(path), ids) for path, ids in parts], windows, **more)


def with_mini_clip(request: ClipRequest) -> Clip:
    return request, build_mini_clip([gather_packets(part, decoder="dali") for part in request.parts])


def assert_parity(runner: Runner, requests: Sequence[ClipRequest], *, right_colours: bool = True) -> None:
    """Every view of every clip, and every channel of it, within the tolerance."""
    clips = [with_mini_clip(request) for request in requests]
    for (request, mini), got in zip(clips, runner.outputs(clips), strict=True):
        assert isinstance(got, np.ndarray), got
        expected = np.empty(request.frames_shape, dtype=np.uint8)
        cpu_fused.decode_clip(request, expected)
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        if right_colours:
            correct_colors(torch.from_numpy(got)[None], [mini.colorspace])
        for v, window in enumerate(request.windows):
            assert_close(got[v], expected[v], window)


def assert_close(got: np.ndarray, expected: np.ndarray, what: object) -> None:
    """One view of a clip, (T, H, W, C), within the tolerance."""
    error = got.astype(np.float64) - expected
    psnr = 10 * np.log10(255**2 / max(np.mean(error**2), 1e-6))
    assert psnr >= TOLERANCE.worst_psnr_db, f"{psnr:.1f} dB: {what}"
    assert np.abs(error.mean(axis=(0, 1, 2))).max() <= TOLERANCE.worst_bias_levels, what


def border_windows(width: int, height: int) -> list[tuple[int, int, int, int]]:
    """The whole picture, half of it in each corner and in the middle, small ones at each edge, thin ones."""
    half_w, half_h = width // 4 * 2, height // 4 * 2
    corners = [(x, y) for x in (0, width - half_w) for y in (0, height - half_h)]
    halves = [(x, y, half_w, half_h) for x, y in [*corners, (half_w // 4 * 2, half_h // 4 * 2)]]
    small = [(0, 60, 40, 30), (width - 40, 60, 40, 30), (60, 0, 40, 30), (60, height - 30, 40, 30)]
    return [(0, 0, width, height), *halves, *small, (20, 10, width - 40, 24), (20, 10, 24, height - 20)]


@pytest.mark.parametrize("style", ["vp9", "vp9-full-range", "mjpeg"])
@pytest.mark.parametrize("flip", [False, True])
def test_windows_at_all_borders(videos: dict[str, Path], runner: Callable, style: str, flip: bool) -> None:
    requests = [
        request_for([(videos[style], (3, 9, 33, 50))], [window], flips=(flip,), sample_id=i)
        for i, window in enumerate(border_windows(*SIZE))
    ]
    assert_parity(runner(), requests)


@pytest.mark.parametrize("size", [32, 224])
def test_shrinking_and_enlarging(videos: dict[str, Path], runner: Callable, size: int) -> None:
    windows = [(0, 0, *SIZE), (50, 40, 100, 80), (100, 20, 60, 120)]
    requests = [request_for([(videos["vp9"], (0, 30, 59))], [window], size=size) for window in windows]
    assert_parity(runner(size=size), requests)


def test_odd_picture_size(videos: dict[str, Path], runner: Callable) -> None:
    windows = [(0, 0, 130, 98), (70, 48, 60, 50)]
    assert_parity(runner(), [request_for([(videos["vp9-odd"], (2, 40))], [window]) for window in windows])


def test_views_flips_and_repeated_frames_of_two_chunks(videos: dict[str, Path], runner: Callable) -> None:
    """Two chunks of 8 frames each as a 16-frame clip, and 4-frame clips; all in batches with three views."""
    long = [(videos["vp9"], range(30, 60, 4)), (videos["vp9-next"], range(0, 40, 5))]
    short = [(videos["vp9"], (41, 58)), (videos["vp9-next"], (1, 7))]
    windows = [(0, 0, 140, 144), (26, 0, 140, 144), (52, 0, 140, 144)]
    flips = [(True, False, True), (False, True, False)]
    for parts, gather in [
        (long, range(16)),
        (short, (0, 1, 2, 3)),
        (short, (3, 0, 0, 1)),
        (short, (1, 1, 1, 3)),
    ]:
        requests = [
            request_for(parts, windows, flips=flip, gather=gather, sample_id=i) for i, flip in enumerate(flips)
        ]
        assert_parity(runner(views=3), requests)


@pytest.mark.parametrize("style", ["vp8", "vp9", "mjpeg"])
def test_frame_numbers_are_those_asked_for(videos: dict[str, Path], runner: Callable, style: str) -> None:
    asked = [(0, 1, 2), (0, 29, 59), (13, 31, 47), (57, 58, 59), (4, 5, 40), (7, 8, 9), (30, 31, 59)]
    requests = [request_for([(videos[style], ids)], sample_id=100 + i) for i, ids in enumerate(asked)]
    outputs = runner().outputs([with_mini_clip(r) for r in requests], batch=3)  # 3, 3 and 1
    shown = [tuple(make_videos.read_frame_number(frame) for frame in clip[0]) for clip in outputs]
    assert shown == asked


def test_sizes_and_codecs_share_a_batch(videos: dict[str, Path], runner: Callable) -> None:
    styles = ["vp9", "mjpeg", "vp9-odd", "vp9-full-range"]
    assert_parity(runner(), [request_for([(videos[s], (5, 25))], sample_id=i) for i, s in enumerate(styles)])


@pytest.mark.parametrize("style", ["vp9-bt709", "vp9-240m", "vp9-bt2020"])
def test_other_matrices_than_bt601(videos: dict[str, Path], runner: Callable, style: str) -> None:
    requests = [request_for([(videos[s], (5, 25))], sample_id=i) for i, s in enumerate([style, "vp9"])]
    assert_parity(runner(), requests)
    assert_parity(runner(), requests[1:], right_colours=False)
    with pytest.raises(AssertionError, match="dB:"):
        assert_parity(runner(), requests[:1], right_colours=False)


def test_only_rows_of_other_matrices_are_changed() -> None:
    """Grey is grey in all of them; BT.709's green is not BT.601's, and what leaves the range is cut off."""
    frames = torch.tensor([[90, 90, 90], [0, 200, 0], [255, 0, 0]], dtype=torch.uint8).expand(3, 3, 3).clone()
    correct_colors(frames, [6, 1, 2])
    assert frames[0].tolist() == frames[2].tolist() == [[90, 90, 90], [0, 200, 0], [255, 0, 0]]
    assert frames[1, 0].tolist() == [90, 90, 90]
    luma, cb, cr = 0.587 * 200, -0.587 * 200 / 1.772, -0.587 * 200 / 1.402  # BT.601
    green = luma - 0.0722 * 1.8556 / 0.7152 * cb - 0.2126 * 1.5748 / 0.7152 * cr  # BT.709
    assert frames[1, 1].tolist() == [0, round(green), 0]


def damaged(clip: Clip, how: str) -> Clip:
    request, mini = clip
    if how == "no video":
        return request, replace(mini, data=bytes(1000))
    if how == "no such frame":
        return request, replace(mini, frame_ids=(0, 999))
    half = len(mini.data) // 2
    return request, replace(mini, data=mini.data[:half] + bytes(b ^ 0x5A for b in mini.data[half:]))


@pytest.mark.parametrize("how", ["no video", "no such frame", "destroyed"])
def test_a_bad_clip_costs_its_batch_and_is_found_alone(
    videos: dict[str, Path], runner: Callable, how: str
) -> None:
    requests = [request_for([(videos["vp9"], (k, k + 1))], sample_id=k) for k in range(8)]
    clips = [with_mini_clip(request) for request in requests]
    sound = runner().outputs(clips, batch=2)
    clips[5] = damaged(clips[5], how)
    outputs = runner().outputs(clips, batch=2)
    assert [isinstance(output, RuntimeError) for output in outputs] == [k in (4, 5) for k in range(8)]
    alone = runner().outputs(clips[4:6], batch=1)
    assert isinstance(alone[1], RuntimeError)
    cause = failure_cause(alone[1])
    assert 10 < len(cause) < 300
    assert "\n" not in cause
    for k, output in [*enumerate(outputs), (4, alone[0])]:
        if not isinstance(output, RuntimeError):
            np.testing.assert_array_equal(output, sound[k])


def test_the_cpu_backend_has_no_h264(videos: dict[str, Path], runner: Callable) -> None:
    (output,) = runner().outputs([with_mini_clip(request_for([(videos["h264"], (0, 3))]))])
    assert isinstance(output, RuntimeError)


def test_default_threads() -> None:
    assert default_threads("mixed") == default_threads("mixed", ranks_on_machine=8) >= 8
    assert default_threads("cpu") >= default_threads("cpu", ranks_on_machine=10_000) == 1
    assert (default_graphs("mixed"), default_threads("mixed", graphs=default_graphs("mixed"))) == (2, 8)
    assert (default_graphs("cpu"), default_threads("cpu", graphs=1000)) == (1, 1)


@pytest.mark.parametrize(
    ("ending", "how"),
    [
        ("mp4", {"codec": "libvpx-vp9", "options": make_videos.VP9_FAST, "color_range": 1}),
        ("mov", {"codec": "mjpeg", "options": {"q": "3"}, "pix_fmt": "yuvj420p", "color_range": 2}),
    ],
    ids=["vp9", "mjpeg"],
)
def test_filmed_videos(lifelike_video: Path, ending: str, how: dict, tmp_path: Path, runner: Callable) -> None:
    with av.open(str(lifelike_video)) as container:
        stream = container.streams.best("video")
        pictures = [f.to_ndarray(format="rgb24") for f in islice(container.decode(stream), 0, 120, 3)]
    height, width = (side // 2 * 2 for side in pictures[0].shape[:2])
    path = make_videos.write_video(
        tmp_path / f"chunk.{ending}",
        frames=len(pictures),
        size=(width, height),
        colorspace=6,
        draw=lambda number, _: np.ascontiguousarray(pictures[number][:height, :width]),
        **how,
    )
    requests = [
        request_for([(path, (2, 11, 19, 38))], [window], flips=(i % 2 == 0,), size=224, sample_id=i)
        for i, window in enumerate(border_windows(width, height))
    ]
    assert_parity(runner(size=224), requests)


@pytest.mark.gpu
def test_nvdec_gives_the_same_clips(videos: dict[str, Path], runner: Callable) -> None:
    requests = [
        request_for([(videos["h264"], (3, 9, 33, 50))], [window], flips=(i % 2 == 0,), sample_id=i)
        for i, window in enumerate(border_windows(*SIZE))
    ]
    assert_parity(runner(device="mixed"), requests)


@pytest.mark.gpu
@pytest.mark.parametrize("style", ["x264-default", "x264-gop30", "balanced", "no-b", "intra", "mkv"])
def test_nvdec_frame_numbers(gop_videos: dict[str, Path], runner: Callable, style: str) -> None:
    asked = [(0, 1, 2), (0, 29, 89), (13, 31, 47), (87, 88, 89), (4, 5, 40), (7, 8, 9), (30, 31, 59)]
    clips = [with_mini_clip(request_for([(gop_videos[style], ids)])) for ids in asked]
    outputs = runner(device="mixed").outputs(clips)
    shown = [tuple(make_videos.read_frame_number(frame) for frame in clip[0]) for clip in outputs]
    assert shown == asked
