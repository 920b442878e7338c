import os
from fractions import Fraction

import av
import make_videos as mv
import numpy as np
import pytest

from avion_dali.contracts import DecodeError
from avion_dali.data.chunking import ChunkSettings, chunk_video
from avion_dali.data.encoding import ChunkWriter, PictureFilter, target_size, verify_chunk
from avion_dali.data.probe import probe_chunk
from avion_dali.data.profiles import PROFILES

SETTINGS = ChunkSettings(profile="compat", chunk_seconds=1, short_side=96)


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [
        ((1920, 1080), 288, (512, 288)),
        ((1080, 1920), 288, (288, 512)),
        ((1440, 1080), 288, (384, 288)),
        ((1920, 1440), 320, (432, 320)),
        ((456, 256), 288, (448, 256)),
        ((213, 119), 288, (208, 112)),
        ((128, 128), 288, (128, 128)),
        ((20, 10), 16, (16, 16)),
    ],
)
def test_target_size(size, short_side, expected):
    assert target_size(*size, short_side=short_side) == expected


def test_target_size_never_enlarges_and_keeps_the_aspect():
    rng = np.random.default_rng(0)
    for width, height in rng.integers(64, 4000, (500, 2)).tolist():
        if not 0.25 < width / height < 4:
            continue
        new_width, new_height = target_size(width, height, short_side=288)
        assert new_width % 16 == new_height % 16 == 0
        assert new_width <= width
        assert new_height <= height
        long = max(new_width, new_height)
        assert abs(new_width / new_height / (width / height) - 1) < 17 / min(long, min(new_width, new_height))


ORIENTATIONS = [
    (90, False, lambda upright: np.rot90(upright, -1)),
    (-90, False, lambda upright: np.rot90(upright, 1)),
    (180, False, lambda upright: np.rot90(upright, 2)),
    (0, True, np.fliplr),
    (90, True, lambda upright: np.rot90(np.fliplr(upright), -1)),
]


@pytest.mark.parametrize(("degrees", "mirrored", "store"), ORIENTATIONS)
def test_display_rotation_is_applied(tmp_path, degrees, mirrored, store):
    upright = mv.draw_frame(5, (160, 96))
    stored = np.ascontiguousarray(store(upright))
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "10"})
        stream.height, stream.width, stream.pix_fmt = *stored.shape[:2], "yuv420p"
        stream.set_display_rotation(degrees, hflip=mirrored)
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(stored, format="rgb24")))
        container.mux(stream.encode(None))
    assert chunk_video(path, tmp_path / "out", SETTINGS).made == 1
    assert mv.frame_numbers(tmp_path / "out" / "0.mp4") == [5, 5, 5]
    facts = probe_chunk(tmp_path / "out" / "0.mp4")
    assert (facts.width, facts.height, facts.rotation) == (160, 96, 0)
    picture = mv.decode_all(tmp_path / "out" / "0.mp4")[0].astype(float)
    assert np.abs(picture - upright).mean() < 8


def test_tilted_display_is_refused(tmp_path):
    video = mv.write_video(tmp_path / "v.mp4", frames=5, rotation=30)
    assert "quarter turn" in chunk_video(video, tmp_path / "out", SETTINGS).failed


COLOURS = [(200, 30, 30), (30, 180, 60), (40, 60, 210), (220, 200, 40), (128, 128, 128), (245, 245, 245)]


def _bt601_rgb(frame):
    """Limited-range BT.601 to RGB (ITU-R BT.601-7, section 2.5), written out to lean on no library."""
    luma, cb, cr = (
        np.frombuffer(bytes(plane), np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]
        for plane in frame.planes
    )
    y = (luma[::2, ::2].astype(float) - 16) * 255 / 219
    cb, cr = (cb.astype(float) - 128) * 255 / 224, (cr.astype(float) - 128) * 255 / 224
    return np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], axis=-1)


@pytest.mark.parametrize(("colorspace", "color_range"), [(1, 1), (1, 2), (5, 2), (5, 1), (None, None)])
def test_colours_are_converted_to_limited_bt601(tmp_path, colorspace, color_range):
    def draw(_, size):
        return np.repeat(np.repeat(np.uint8(COLOURS).reshape(2, 3, 3), size[1] // 2, 0), size[0] // 3, 1)

    video = mv.write_video(
        tmp_path / "v.mp4",
        frames=3,
        size=(144, 96),
        options={"crf": "4"},
        colorspace=colorspace,
        color_range=color_range,
        draw=draw,
    )
    assert chunk_video(video, tmp_path / "out", SETTINGS).made == 1
    with av.open(str(tmp_path / "out" / "0.mp4")) as container:
        rgb = _bt601_rgb(next(container.decode(video=0)))
    for i, colour in enumerate(COLOURS):
        patch = rgb[24 * (i // 3) + 6 : 24 * (i // 3) + 18, 24 * (i % 3) + 6 : 24 * (i % 3) + 18]
        assert np.abs(patch.mean(axis=(0, 1)) - colour).max() <= 3, colour


def test_square_pixels_and_changing_pictures():
    picture_of = PictureFilter(Fraction(4, 3), short_side=96)
    picture = picture_of(av.VideoFrame(96, 96, "yuv420p"))
    assert (picture.width, picture.height) == (128, 96)
    assert picture_of.changes == 0
    picture = picture_of(av.VideoFrame(96, 64, "yuv420p"))
    assert (picture.width, picture.height, picture_of.changes) == (128, 96, 1), "fitted into the first size"


def test_verification_notices_every_difference(tmp_path):
    chunk_video(mv.write_video(tmp_path / "v.mp4", frames=20), tmp_path / "out", SETTINGS)
    path, good = tmp_path / "out" / "0.mp4", {"frames": 20, "fps": Fraction(30), "size": (128, 96)}
    verify_chunk(path, **good)
    for change in ({"frames": 21}, {"fps": Fraction(29)}, {"size": (96, 96)}):
        with pytest.raises(DecodeError, match=r"has \(frames, fps"):
            verify_chunk(path, **good | change)
    with av.open(str(path)) as container:
        places = [(entry.pos, entry.size) for entry in container.streams.video[0].index_entries]
    data = bytearray(path.read_bytes())
    for position, size in places:
        data[position + 4 : position + size] = bytes(size - 4)
    path.write_bytes(data)
    with pytest.raises(DecodeError):
        verify_chunk(path, **good)


def test_unfinished_chunk_leaves_nothing(tmp_path):
    picture = av.VideoFrame(64, 64, "yuv420p")
    path = tmp_path / "0.mp4"
    with pytest.raises(RuntimeError), ChunkWriter(path, PROFILES["compat"], fps=Fraction(30)) as writer:
        for _ in range(100):  # more than the encoder holds back
            writer.write(picture)
        assert [p.name for p in tmp_path.iterdir()] == [".0.mp4.partial"]
        raise RuntimeError
    with pytest.raises(RuntimeError), ChunkWriter(path, PROFILES["compat"], fps=Fraction(30)):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_full_disk_is_told_from_a_bad_source(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    writer = ChunkWriter(out / "0.mp4", PROFILES["compat"], fps=Fraction(30))
    (out / ".0.mp4.partial").symlink_to("/dev/full")
    noise = np.random.default_rng(0)
    with pytest.raises(OSError, match="cannot write .*No space left"), writer:
        for _ in range(60):
            pixels = noise.integers(0, 255, (144, 96), dtype=np.uint8)
            writer.write(av.VideoFrame.from_ndarray(pixels, format="yuv420p"))
        writer.finish()
    assert not list(out.iterdir())
