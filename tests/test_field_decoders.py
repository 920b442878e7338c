"""One picture, one answer: all decoders agree on every kind of file, whatever was read before."""

import io
from fractions import Fraction
from pathlib import Path

import av
import field_videos as fv
import make_videos as mv
import numpy as np
import pytest
from dali_clips import FixedPlanner, clip_request, epoch, loader_of
from field_videos import Style
from PIL import Image

from avion_dali.contracts import CropWindow
from avion_dali.data.bitstream import Entry, picture_traits, shows_picture
from avion_dali.data.chunking import ChunkSettings, chunk_video
from avion_dali.data.crops import narrowed_window
from avion_dali.data.probe import probe_chunk
from avion_dali.inspection.chunk_file import inspect_file
from avion_dali.inspection.findings import Target
from avion_dali.loading.pool import WorkerPool

SETTINGS = ChunkSettings("compat", chunk_seconds=1, short_side=96)
QUALITY = {"qscale": "3"}
B_FRAMES = QUALITY | {"bf": "2"}

STYLES = {
    "raw.avi": Style("rawvideo"),
    "rgb.mov": Style("rawvideo", pix_fmt="rgb24"),
    "yuyv.avi": Style("rawvideo", pix_fmt="yuyv422"),
    "uyvy.mov": Style("rawvideo", pix_fmt="uyvy422"),
    "gray.avi": Style("rawvideo", pix_fmt="gray"),
    "444.nut": Style("rawvideo", pix_fmt="yuv444p"),
    "qtrle.mov": Style("qtrle", pix_fmt="rgb24"),
    "utvideo.avi": Style("utvideo"),
    "utvideo-rgb.avi": Style("utvideo", pix_fmt="gbrp"),
    "v210.mov": Style("v210", pix_fmt="yuv422p10le"),
    "huffyuv.avi": Style("huffyuv", pix_fmt="yuv422p"),
    "ffv1.mkv": Style("ffv1"),
    "prores.mov": Style("prores_ks", pix_fmt="yuv422p10le"),
    "png.avi": Style("png", pix_fmt="rgb24"),
    "jpeg2000.mov": Style("jpeg2000"),
    "mjpeg.mkv": Style("mjpeg", pix_fmt="yuvj420p", options=QUALITY | {"huffman": "optimal"}),
    "gif.gif": Style("gif", pix_fmt="rgb8"),
    "mpeg4.avi": Style("mpeg4", options=B_FRAMES),
    "mpeg4.mp4": Style("mpeg4", options=B_FRAMES),
    "msmpeg4.avi": Style("msmpeg4", options=QUALITY),
    "wmv2.asf": Style("wmv2", options=QUALITY),
    "flv1.flv": Style("flv", options=QUALITY),
    "mpeg2.mkv": Style("mpeg2video", options=B_FRAMES),
    "mpeg2.mxf": Style("mpeg2video", options=QUALITY),
    "mpeg1.mpg": Style("mpeg1video", options=B_FRAMES),
    "h264.avi": Style(),
    "h264.mpg": Style(container="mpeg"),
    "surveillance.mp4": Style(container="mpeg"),
    "h264.h264": Style(container="h264"),
    "hevc.hevc": Style("libx265", options=mv.HEVC_FAST, container="hevc"),
    "fragments.mp4": Style(muxing={"movflags": "frag_keyframe+empty_moov"}),
    "fields.mp4": Style(options=mv.X264_FAST | {"x264-params": "tff=1:interlaced=1"}),
    "444.mp4": Style(pix_fmt="yuv444p"),
    "altref.webm": Style(
        "libvpx", options={"deadline": "good", "cpu-used": "4", "auto-alt-ref": "1", "b": "1M"}
    ),
    "altref-9.webm": Style("libvpx-vp9", options={"deadline": "good", "cpu-used": "5", "auto-alt-ref": "1"}),
}


@pytest.mark.parametrize("name", STYLES)
def test_decoders_agree_and_chunks_hold_every_picture(tmp_path: Path, name: str) -> None:
    video = fv.write(tmp_path / name, STYLES[name], count=35)
    facts = probe_chunk(video)
    assert facts.num_frames == 35
    assert fv.frame_numbers(fv.chunk_of(facts).ref, [0, 11, 34], "reference") == [0, 11, 34]
    assert fv.disagreements(video) == []
    report = chunk_video(video, tmp_path / "chunks", SETTINGS)
    assert report.failed == ""
    numbers = [number for _, shown in fv.chunk_pictures(tmp_path / "chunks").values() for number in shown]
    assert numbers == list(range(35))


@pytest.mark.parametrize("decoder", ["cpu-fused", "paper-fused"])
def test_pictures_without_tables_of_their_own_do_not_take_those_of_another_file(
    tmp_path: Path, decoder: str
) -> None:
    """Motion JPEG may leave its Huffman tables out; a decoder that was used before holds those of others."""
    standard = Style("mjpeg", pix_fmt="yuvj420p", options=QUALITY | {"huffman": "default"})
    plain = fv.write(tmp_path / "plain.avi", standard, count=6)
    other = fv.write(tmp_path / "other.mkv", STYLES["mjpeg.mkv"], count=6, first=50)
    bare = tmp_path / "bare.avi"
    with av.open(str(plain)) as reader, av.open(str(bare), "w") as writer:
        target = writer.add_stream_from_template(reader.streams.video[0])
        for packet in (p for p in reader.demux(video=0) if p.size):
            data = bytes(packet)
            at = data.find(b"\xff\xc4")
            assert at > 0
            left = data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]
            copy = av.Packet(left)
            copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
            copy.is_keyframe, copy.stream = True, target
            writer.mux(copy)
    for path, first in ((other, 50), (bare, 0), (other, 50), (bare, 0)):
        ref = fv.chunk_of(probe_chunk(path)).ref
        assert fv.frame_numbers(ref, [2, 4], decoder) == [first + 2, first + 4]


@pytest.mark.parametrize("ending", ["avi", "mov"])
def test_a_palette_that_only_the_first_packet_brings(tmp_path: Path, ending: str) -> None:
    video = tmp_path / f"v.{ending}"
    palette = np.repeat(np.arange(255, -1, -1, dtype=np.uint8)[:, None], 4, axis=1)  # index 0 is white
    palette[:, 0] = 255  # opaque; PyAV takes ARGB
    with av.open(str(video), "w") as container:
        stream = container.add_stream("rawvideo", rate=30)
        stream.width, stream.height, stream.pix_fmt = *fv.SIZE, "pal8"
        for i in range(20):
            gray = mv.draw_frame(i, fv.SIZE).mean(axis=-1).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray((255 - gray, palette), format="pal8")
            frame.pts, frame.time_base = i, Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    facts = probe_chunk(video)
    ref = fv.chunk_of(facts).ref
    for decoder in fv.DECODERS:
        assert fv.frame_numbers(ref, [3, 11], decoder) == [3, 11]
    assert chunk_video(video, tmp_path / "chunks", SETTINGS).failed == ""
    assert mv.frame_numbers(tmp_path / "chunks" / "0.mp4") == list(range(20))


def test_exif_of_camera_pictures(tmp_path: Path) -> None:
    """PyAV has no name for EXIF among the side data of a frame."""
    video = tmp_path / "v.avi"
    with av.open(str(video), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = *fv.SIZE, "yuvj420p"
        for i in range(30):
            picture, data = Image.fromarray(mv.draw_frame(i, fv.SIZE)), io.BytesIO()
            exif = picture.getexif()
            exif[0x0110] = "Model"
            picture.save(data, "JPEG", quality=90, exif=exif)
            packet = av.Packet(data.getvalue())
            packet.pts = packet.dts = i
            packet.time_base, packet.stream, packet.is_keyframe = Fraction(1, 25), stream, True
            container.mux(packet)
    assert chunk_video(video, tmp_path / "chunks", SETTINGS).failed == ""
    assert fv.misplaced(video, tmp_path / "chunks") == []
    assert fv.disagreements(video) == []


@pytest.mark.parametrize("ending", ["mp4", "mkv", "avi", "ts"])
def test_tags_that_are_no_utf_8(tmp_path: Path, ending: str) -> None:
    """Old programs wrote titles in the encoding of their machine."""
    title = "über XYZ"
    video = tmp_path / f"v.{ending}"
    plain = fv.write(tmp_path / f"plain.{ending}", count=20)
    with av.open(str(plain)) as reader, av.open(str(video), "w") as writer:
        target = writer.add_stream_from_template(reader.streams.video[0])
        writer.metadata.update({"title": title, "service_name": title})
        for packet in (p for p in reader.demux(video=0) if p.size):
            packet.stream = target
            writer.mux(packet)
    data = video.read_bytes()
    assert title.encode() in data
    video.write_bytes(data.replace(title.encode(), b"\xfcber\xff XYZ"))
    assert chunk_video(video, tmp_path / "chunks", SETTINGS).failed == ""
    assert mv.frame_numbers(tmp_path / "chunks" / "0.mp4") == list(range(20))
    assert fv.disagreements(plain) == fv.disagreements(video) == []


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_exif_orientation_turns_pictures(tmp_path: Path, orientation: int) -> None:
    turns = {1: 0, 3: 2, 6: 1}[orientation]
    stored = np.ascontiguousarray(np.rot90(mv.draw_frame(77, (128, 96)), turns))
    data = io.BytesIO()
    picture = Image.fromarray(stored)
    exif = picture.getexif()
    exif[0x0112] = orientation
    picture.save(data, "JPEG", quality=95, exif=exif)
    video = tmp_path / "v.avi"
    with av.open(str(video), "w") as container:
        stream = container.add_stream("mjpeg", rate=5)
        stream.height, stream.width, stream.pix_fmt = *stored.shape[:2], "yuvj420p"
        for i in range(5):
            packet = av.Packet(data.getvalue())
            packet.pts = packet.dts = i
            packet.time_base, packet.stream, packet.is_keyframe = Fraction(1, 5), stream, True
            container.mux(packet)
    assert chunk_video(video, tmp_path / "chunks", SETTINGS).failed == ""
    assert set(mv.frame_numbers(tmp_path / "chunks" / "0.mp4")) == {77}


@pytest.mark.parametrize("emptied", [36, 20, 8])
def test_a_display_matrix_left_empty_means_upright(tmp_path: Path, emptied: int) -> None:
    video = fv.write(tmp_path / "v.mp4", count=20)
    data = bytearray(video.read_bytes())
    matrix = data.find(b"tkhd") + 4 + 4 + 20 + 8 + 8
    data[matrix : matrix + emptied] = bytes(emptied)
    video.write_bytes(data)
    assert chunk_video(video, tmp_path / "chunks", SETTINGS).failed == ""
    assert mv.frame_numbers(tmp_path / "chunks" / "0.mp4") == list(range(20))
    assert fv.disagreements(video) == []
    assert probe_chunk(video).rotation == 0


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (33, 1)])
def test_pictures_of_a_pixel_or_a_line(tmp_path: Path, size: tuple[int, int]) -> None:
    video = tmp_path / "v.avi"
    with av.open(str(video), "w") as container:
        stream = container.add_stream("rawvideo", rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "rgb24"
        for i in range(5):
            picture = np.full((size[1], size[0], 3), 50 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode(None))
    assert chunk_video(video, tmp_path / "chunks", SETTINGS).failed == ""
    levels = [picture.mean() for picture in mv.decode_all(tmp_path / "chunks" / "0.mp4")]
    assert np.abs(np.subtract(levels, np.arange(5) * 50)).max() < 4


def _traits(jpeg: bytes) -> Entry:
    return picture_traits(jpeg, codec="mjpeg", length_size=0, is_keyframe=True).entry


@pytest.mark.parametrize(
    ("bits", "shows"),
    [
        ("10000010", True),  # profile 0, a keyframe that is shown
        ("10000110", True),
        ("10000100", False),  # a picture for others to refer to
        ("10000000", False),
        ("10001000", True),  # shows a picture that is there already
        ("10110001", True),  # profile 3 has one bit more ahead
        ("10110010", False),
        ("10110100", True),
    ],
)
def test_hidden_pictures_of_vp9(bits: str, shows: bool) -> None:
    first = int(bits, 2)
    assert shows_picture(bytes([first, 0, 0, 0]), codec="vp9") is shows
    index = bytes([0b11000001, 2, 2, 0b11000001])  # two pictures of two bytes: one of them is shown
    assert shows_picture(bytes([first, 0, 0, 0]) + index, codec="vp9")


def test_motion_jpeg_needs_tables_of_its_own() -> None:
    def segment(marker: int, size: int) -> bytes:
        return bytes([0xFF, marker]) + (size + 2).to_bytes(2, "big") + bytes(size)

    tables = {"quantization": segment(0xDB, 65), "huffman": segment(0xC4, 30)}
    for left_out in (None, *tables):
        parts = [data for name, data in tables.items() if name != left_out]
        jpeg = b"\xff\xd8" + segment(0xE0, 14) + b"".join(parts) + segment(0xDA, 10) + bytes(50)
        expected = Entry.CLEAN if left_out is None else Entry.NONE
        assert _traits(jpeg) == expected
    for cut in range(120):
        _traits(jpeg[:cut])  # whatever is damaged has an answer


def test_dali_agrees_on_its_codecs(tmp_path: Path) -> None:
    """DALI's CPU decoders read VP9 and Motion JPEG; what they cannot read is delivered all the same."""
    vp9 = Style("libvpx-vp9", options=mv.VP9_FAST | {"g": "10"})
    videos = [
        fv.write(tmp_path / "late.mkv", vp9, delay=7, sound_seconds=1, count=30),
        fv.cut_packets(fv.write(tmp_path / "w.webm", vp9, count=30), tmp_path / "inside.webm", skip=4),
        fv.write(tmp_path / "v.mkv", STYLES["mjpeg.mkv"], count=30),
        fv.write(tmp_path / "mpeg4.avi", STYLES["mpeg4.avi"], count=30),
        fv.write(tmp_path / "raw.avi", STYLES["yuyv.avi"], count=30),
    ]
    requests, expected = [], []
    for number, video in enumerate(videos):
        ref, ids = fv.chunk_of(probe_chunk(video)).ref, [1, 12, 19]
        requests.append(clip_request(number, [(ref, ids)], size=96))
        expected.append(fv.frame_numbers(ref, ids, "reference"))
    batch_of_five = {"global_batch": 5, "micro_batch": 5}
    with (
        WorkerPool(workers=1, timeout_s=60) as pool,
        loader_of(FixedPlanner(requests), pool, **batch_of_five) as loader,
    ):
        (batch,) = epoch(loader)
    assert batch.errors == ()
    assert [[mv.read_frame_number(f) for f in clip] for clip in batch.frames_BTHWC.numpy()] == expected


# --- what check says


def kinds(path: Path) -> set[str]:
    return {finding.kind for finding in inspect_file(Target(str(path), False)).findings}


@pytest.mark.parametrize("aspect", [Fraction(64, 45), Fraction(8, 9)])
def test_pixels_that_are_not_square(tmp_path: Path, aspect: Fraction) -> None:
    video = fv.write(tmp_path / "v.mp4", aspect=aspect, count=10)
    assert "pixel-aspect" in kinds(video)
    assert "pixel-aspect" not in kinds(fv.write(tmp_path / "square.mp4", count=10))


def test_interlacing_hdr_wide_gamut_and_late_pictures(tmp_path: Path) -> None:
    assert "interlaced" in kinds(fv.write(tmp_path / "fields.mp4", STYLES["fields.mp4"], count=10))
    for transfer in ("smpte2084", "arib-std-b67"):
        params = f"log-level=none:colorprim=bt2020:transfer={transfer}:colormatrix=bt2020nc"
        style = Style("libx265", pix_fmt="yuv420p10le", options={"x265-params": params})
        found = kinds(fv.write(tmp_path / f"{transfer}.mp4", style, count=10))
        assert {"hdr", "wide-gamut"} <= found
    assert "late-picture" in kinds(fv.write(tmp_path / "late.mkv", delay=9, sound_seconds=1, count=10))


def test_windows_over_pixels_that_are_not_square() -> None:
    for factor, limit in ((45 / 64, 720), (9 / 8, 720), (0.5, 64)):
        displayed = round(limit / factor / 2) * 2
        rng = np.random.default_rng(3)
        for _ in range(200):
            width = 2 * int(rng.integers(1, displayed // 2 + 1))
            x = 2 * int(rng.integers(0, (displayed - width) // 2 + 1))
            window = narrowed_window(CropWindow(x, 4, width, 20), factor, limit=limit)
            assert window.x + window.width <= limit
            assert (window.y, window.height) == (4, 20)
            assert abs(window.width - width * factor) <= 2
            assert abs(window.x + window.width / 2 - (x + width / 2) * factor) <= 3
