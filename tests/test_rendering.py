"""Pictures against exact arithmetic, and that a kept filter graph remembers nothing of the clips before."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch.nn import functional

from avion_dali.contracts import CropWindow
from avion_dali.decode.rendering import ReferenceView, forget_graphs, fresh_fused_view, fused_view

# The share of luma, and the swing of each chroma difference (ITU-R BT.601, limited range).
KR, KB = 0.299, 0.114
WINDOWS = [
    CropWindow(0, 0, 320, 240),
    CropWindow(30, 20, 224, 200),
    CropWindow(200, 100, 120, 140),
    CropWindow(2, 0, 318, 96),
    CropWindow(96, 64, 64, 64),
]


@pytest.fixture(scope="module")
def frames() -> list[av.VideoFrame]:
    """Random colours at three scales with noise of luma, as decoders give them (YUV 4:2:0).

    Colours change softly and stay in the range of RGB, as in videos: at hard edges of colour it matters that
    half-size chroma is scaled directly, outside the range that clipping comes after scaling.
    """
    rng = np.random.default_rng(0)
    pictures = []
    for scale in (16, 24, 60):
        colours = torch.from_numpy(rng.uniform(80, 180, (1, 3, 240 // scale + 1, 320 // scale + 1)))
        soft = functional.interpolate(colours, size=(240, 320), mode="bicubic")[0].permute(1, 2, 0).numpy()
        picture = (soft + rng.integers(-20, 20, (240, 320, 1))).clip(0, 255).astype(np.uint8)
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
        frame.colorspace, frame.color_range = 6, 1
        pictures.append(frame)
    return pictures


def exact_picture(frame: av.VideoFrame, window: CropWindow, size: int) -> np.ndarray:
    """BT.601 with linearly interpolated chroma, then antialiased bilinear scaling, in float64."""
    planes = torch.from_numpy(frame.to_ndarray()).double()
    height, width = frame.height, frame.width
    chroma = planes[height:].reshape(2, 1, height // 2, width // 2)
    u, v = functional.interpolate(chroma, scale_factor=2, mode="bilinear")[:, 0] - 128
    y, u, v = (planes[:height] - 16) * 255 / 219, u * 255 / 224, v * 255 / 224
    red, blue = y + 2 * (1 - KR) * v, y + 2 * (1 - KB) * u
    green = (y - KR * red - KB * blue) / (1 - KR - KB)
    rgb = torch.stack([red, green, blue]).clamp(0, 255)
    w = window
    rgb = rgb[:, w.y : w.y + w.height, w.x : w.x + w.width]
    scaled = functional.interpolate(rgb[None], size=(size, size), mode="bilinear", antialias=True)
    return scaled[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_pictures_are_close_to_exact_arithmetic(frames: list[av.VideoFrame], window: CropWindow) -> None:
    for frame in frames:
        exact = exact_picture(frame, window, 112)
        for make_view in (fused_view, ReferenceView):
            picture = make_view(frame, window, flip=False, frame_size=112).render(frame)
            difference = picture - exact
            assert np.abs(difference.mean((0, 1))).max() <= 0.3
            assert 10 * np.log10(255**2 / np.square(difference).mean()) >= 45


def test_kept_graphs_give_what_fresh_ones_give(frames: list[av.VideoFrame]) -> None:
    rng = np.random.default_rng(1)
    small = frames[0].reformat(width=160, height=96)
    full_range = av.VideoFrame.from_ndarray(frames[1].to_ndarray(), format="yuvj420p")
    forget_graphs()
    for _ in range(60):
        frame = [*frames, small, full_range][rng.integers(5)]
        width = int(rng.integers(8, frame.width // 2 + 1)) * 2
        height = int(rng.integers(8, frame.height // 2 + 1)) * 2
        x, y = (
            int(rng.integers(0, (a - b) // 2 + 1)) * 2
            for a, b in ((frame.width, width), (frame.height, height))
        )
        window, flip, size = CropWindow(x, y, width, height), bool(rng.integers(2)), int(rng.choice([64, 112]))
        kept = fused_view(frame, window, flip=flip, frame_size=size).render(frame)
        fresh = fresh_fused_view(frame, window, flip=flip, frame_size=size).render(frame)
        np.testing.assert_array_equal(kept, fresh)


def test_flipping_mirrors_the_picture(frames: list[av.VideoFrame]) -> None:
    for make_view in (fused_view, ReferenceView):
        plain, flipped = (
            make_view(frames[2], WINDOWS[1], flip=flip, frame_size=96).render(frames[2]).astype(int)
            for flip in (False, True)
        )
        assert np.abs(flipped - plain[:, ::-1]).mean() < 0.6
        assert np.abs(flipped - plain).mean() > 10


def test_full_range_pictures_are_not_stretched() -> None:
    grey = np.full((96 * 3 // 2, 128), 128, dtype=np.uint8)
    grey[:96] = 255
    white = av.VideoFrame.from_ndarray(grey, format="yuvj420p")
    window = CropWindow(0, 0, 96, 96)
    assert fused_view(white, window, flip=False, frame_size=32).render(white).min() >= 254
    dim = av.VideoFrame.from_ndarray(np.where(grey == 255, 235, grey).astype(np.uint8), format="yuv420p")
    dim.colorspace, dim.color_range = 6, 1
    assert fused_view(dim, window, flip=False, frame_size=32).render(dim).min() >= 254


@pytest.mark.parametrize(("color_range", "levels"), [(2, (30, 70, 190)), (0, (16, 62, 202))])
def test_gray_h264_looks_as_in_ffmpegs_command(
    tmp_path: Path, color_range: int, levels: tuple[int, ...]
) -> None:
    """Without a tag, gray H.264 is of limited range there, too: `ffmpeg -i FILE -pix_fmt rgb24` of 9.0."""
    luma = np.repeat(np.array([[30, 70, 190]], np.uint8), 32, axis=1).repeat(96, axis=0)
    with av.open(str(tmp_path / "gray.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 96, 96, "gray"
        stream.codec_context.color_range = color_range
        picture = av.VideoFrame.from_ndarray(luma, format="gray")
        picture.color_range = color_range
        container.mux(stream.encode(picture) + stream.encode())
    with av.open(str(tmp_path / "gray.mp4")) as container:
        frame = next(container.decode(video=0))
    for make_view in (fused_view, fresh_fused_view, ReferenceView):
        rgb = make_view(frame, CropWindow(0, 0, 96, 96), flip=False, frame_size=96).render(frame)
        for column, level in zip((16, 48, 80), levels, strict=True):
            assert np.abs(rgb[48, column].astype(int) - level).max() <= 1


def test_filmed_video_meets_the_stated_accuracy(lifelike_video: Path) -> None:
    """At least 48 dB in the worst frame and a bias of at most 0.3 levels: the promise of the README."""
    with av.open(str(lifelike_video)) as container:
        decoded = list(container.decode(container.streams.best("video")))[::40]
    for number, frame in enumerate(decoded):
        frame.colorspace = 6
        width = frame.width * 3 // 16 * 2 + 10 * number
        height = min(frame.height * 3 // 10 * 2 + 8 * number, frame.height // 2 * 2 - 4 * number)
        window = CropWindow(10 * number, 4 * number, width, height)
        difference = fused_view(frame, window, flip=False, frame_size=224).render(frame) - exact_picture(
            frame, window, 224
        )
        assert 10 * np.log10(255**2 / np.square(difference).mean()) >= 48
        assert np.abs(difference.mean((0, 1))).max() <= 0.3
