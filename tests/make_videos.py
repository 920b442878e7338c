"""Tiny procedural videos whose pixels carry the frame number, in every style the library must read.

A frame's top third is ten pairs of blocks: the upper block of a pair is white and the lower black for a 1
bit, the other way round for a 0. Only the comparison within a pair is read, so the number survives strong
compression, resizing, colour conversion and odd sizes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import product
from pathlib import Path

import av
import numpy as np
from av.video.stream import VideoStream

BITS = 10
BLANK = np.zeros((48, 64, 3), dtype=np.uint8)  # the second stream of files that have several
X264_FAST = {"preset": "superfast", "crf": "20", "threads": "1"}
BALANCED = "b-pyramid=none:bframes=7:keyint=32:min-keyint=32:scenecut=0:b-adapt=0:open-gop=0"
VP9_FAST = {"deadline": "realtime", "cpu-used": "8", "g": "30", "crf": "20", "b": "0"}
HEVC_FAST = {
    "preset": "ultrafast",
    "x265-params": "log-level=none:pools=none:frame-threads=1:keyint=30",
    "crf": "20",
}


def draw_frame(number: int, size: tuple[int, int] = (128, 96)) -> np.ndarray:
    """Picture (H, W, 3), uint8 RGB, of one frame: its number on top, moving colours below."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    frame = np.stack(
        [(x * 255 // width), (y * 255 // height), np.full_like(x, (number * 5) % 256)], axis=-1
    ).astype(np.uint8)
    side = max(height // 4, 4)
    left, top = (number * 3) % (width - side), height - side - (number * 2) % (height // 3)
    frame[top : top + side, left : left + side] = (230, 40 + (number * 7) % 128, 30)
    edges = np.linspace(0, width, BITS + 1).round().astype(int)
    rows = np.linspace(0, height / 3, 3).round().astype(int)
    for bit in range(BITS):
        value = 235 if number >> bit & 1 else 20
        frame[rows[0] : rows[1], edges[bit] : edges[bit + 1]] = value
        frame[rows[1] : rows[2], edges[bit] : edges[bit + 1]] = 255 - value
    return frame


def read_frame_number(rgb_HWC: np.ndarray) -> int:
    """Number drawn into a whole (uncropped) frame of any size.

    Raises:
        ValueError: when a bit is unclear, that is, the frame shows no number.
    """
    height, width = rgb_HWC.shape[:2]
    gray = rgb_HWC.astype(np.float64).mean(axis=-1)
    edges, rows = np.linspace(0, width, BITS + 1), np.linspace(0, height / 3, 3)
    number = 0
    for bit in range(BITS):
        left = int(np.ceil(edges[bit] * 0.7 + edges[bit + 1] * 0.3))
        right = max(int(edges[bit] * 0.3 + edges[bit + 1] * 0.7), left + 1)
        upper, lower = (
            gray[int(a * 0.7 + b * 0.3) : int(a * 0.3 + b * 0.7) + 1, left:right].mean()
            for a, b in zip(rows[:-1], rows[1:], strict=True)
        )
        if abs(upper - lower) < 60:
            raise ValueError(f"bit {bit} is unclear: {upper:.0f} against {lower:.0f}")
        number |= int(upper > lower) << bit
    return number


def write_video(
    path: Path | str,
    *,
    frames: int = 90,
    fps: Fraction | int = 30,
    size: tuple[int, int] = (128, 96),
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    pix_fmt: str = "yuv420p",
    gop: int | None = None,
    times: Sequence[float] | None = None,
    start: float = 0.0,
    rotation: int = 0,
    audio_seconds: float = 0.0,
    extra_video: bool = False,
    first_number: int = 0,
    container_options: dict[str, str] | None = None,
    colorspace: int | None = None,
    color_range: int | None = None,
    draw: Callable[[int, tuple[int, int]], np.ndarray] = draw_frame,
) -> Path:
    """Encode `frames` pictures numbered from `first_number`; the ending of `path` picks the container.

    Args:
        path: file to write, returned.
        fps: rate; ignored where `times` says when each frame is shown.
        options: encoder options; fast x264 settings by default.
        times: seconds at which each frame is shown (variable rate).
        start: seconds before the first frame.
        rotation: display rotation in degrees, counter-clockwise.
        colorspace: FFmpeg number of the YUV matrix to convert with and tag.
        color_range: FFmpeg number of the range to convert to and tag (1 limited, 2 full).
        draw: picture of a frame number.
    """
    precise = times is not None or start or str(path).endswith((".mkv", ".webm"))
    time_base = Fraction(1, 90_000) if precise else 1 / Fraction(fps)
    seconds = times if times is not None else [i / Fraction(fps) for i in range(frames)]
    ticks = [round((start + second) / time_base) for second in seconds]
    with av.open(str(path), "w", options=container_options or {}) as container:
        video = _add_video(container, codec, fps, size, options)
        video.pix_fmt, video.codec_context.time_base = pix_fmt, time_base
        for name, value in (("gop_size", gop), ("colorspace", colorspace), ("color_range", color_range)):
            if value is not None:
                setattr(video, name, value)
        if rotation:
            video.set_display_rotation(rotation)
        streams = [(video, size, draw)]
        if extra_video:
            streams.append((_add_video(container, codec, fps, (64, 48), options), (64, 48), lambda *_: BLANK))
        sound = container.add_stream("aac", rate=16_000, layout="mono") if audio_seconds else None
        for i, (stream, shape, paint) in product(range(frames), streams):
            rgb = av.VideoFrame.from_ndarray(paint(first_number + i, shape), format="rgb24")
            frame = rgb.reformat(format=stream.pix_fmt, dst_colorspace=colorspace, dst_color_range=color_range)
            frame.pts, frame.time_base = ticks[i], time_base
            container.mux(stream.encode(frame))
        for stream, *_ in streams:
            container.mux(stream.encode(None))
        if sound is not None:
            container.mux(list(silence(sound, audio_seconds)))
    return Path(path)


def _add_video(container, codec, fps, size, options) -> VideoStream:
    stream = container.add_stream(codec, rate=Fraction(fps))
    stream.width, stream.height = size
    stream.pix_fmt = "yuv420p"
    stream.options = dict(X264_FAST if options is None and codec == "libx264" else options or {})
    stream.thread_count = 1
    return stream


def silence(stream, seconds: float) -> Iterator[av.Packet]:
    for start in range(0, round(seconds * 16_000), 1024):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 16_000, start, Fraction(1, 16_000)
        yield from stream.encode(frame)
    yield from stream.encode(None)


def remux(
    source: Path,
    path: Path | str,
    *,
    from_packet: int = 0,
    shift: int = 0,
    options: dict[str, str] | None = None,
) -> Path:
    """Copy packets, in decoding order from `from_packet` on, with timestamps moved by `shift` ticks.

    Timestamps below zero become an mp4 edit list that hides the frames before zero.
    """
    with av.open(str(source)) as reader, av.open(str(path), "w", options=options or {}) as writer:
        video = reader.streams.video[0]
        target = writer.add_stream_from_template(video)
        packets = [packet for packet in reader.demux(video) if packet.size]
        for packet in packets[from_packet:]:
            packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
            packet.stream = target
            writer.mux(packet)
    return Path(path)


def parameter_sets(extradata: bytes) -> list[bytes]:
    """The SPS and the PPS of an avcC record with one of each (ISO/IEC 14496-15, section 5.3.3.1)."""
    (sps_size,) = struct.unpack_from(">H", extradata, 6)
    (pps_size,) = struct.unpack_from(">H", extradata, 9 + sps_size)
    return [extradata[8:][:sps_size], extradata[11 + sps_size :][:pps_size]]


def join_videos(path: Path, first: Path, second: Path, *, repeat: bool) -> Path:
    """Append an H.264 video to another without encoding: its parameter sets go into its packets.

    Args:
        path: file to write, returned.
        repeat: put them into every keyframe, or into the first alone.
    """
    with av.open(str(first)) as a, av.open(str(second)) as b, av.open(str(path), "w") as writer:
        target = writer.add_stream_from_template(a.streams.video[0])
        sets = parameter_sets(b.streams.video[0].codec_context.extradata or b"")
        prefix, shift = b"".join(struct.pack(">I", len(s)) + s for s in sets), 0
        for packet in [p for p in a.demux(video=0) if p.size]:
            shift = max(shift, packet.pts + packet.duration)
            packet.stream = target
            writer.mux(packet)
        for packet in [p for p in b.demux(video=0) if p.size]:
            joined = av.Packet((prefix if packet.is_keyframe else b"") + bytes(packet))
            joined.pts, joined.dts = packet.pts + shift, packet.dts + shift
            joined.duration, joined.time_base = packet.duration, packet.time_base
            joined.is_keyframe, joined.stream = packet.is_keyframe, target
            writer.mux(joined)
            prefix = prefix if repeat else b""
    return path


def edit_list_video(path: Path | str, *, frames: int = 90, hidden: int = 10) -> Path:
    """An mp4 of `frames` frames (GOP 30) whose edit list hides the first `hidden` of them."""
    whole = write_video(Path(path).with_suffix(".whole.mp4"), frames=frames, gop=30)
    with av.open(str(whole)) as reader:
        stream = reader.streams.video[0]
        ticks = round(hidden / 30 / stream.time_base)
    options = {"use_editlist": "1", "avoid_negative_ts": "disabled"}
    remux(whole, path, shift=-ticks, options=options)
    whole.unlink()
    return Path(path)


def decode_all(path: Path | str) -> list[np.ndarray]:
    """Every frame of a file by plain sequential decoding, (H, W, 3) uint8 RGB, in presentation order."""
    with av.open(str(path), metadata_errors="replace") as container:
        stream = container.streams.best("video")
        stream.thread_count = 1
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]


def frame_numbers(path: Path | str) -> list[int]:
    """Numbers of all frames of a file, in presentation order."""
    return [read_frame_number(frame) for frame in decode_all(path)]


def is_reference(packet: av.Packet) -> bool:
    """nal_ref_idc of the slice in a length-prefixed H.264 packet (ITU-T H.264, 7.3.1)."""
    data, at = bytes(packet), 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if data[at + 4] & 31 in (1, 5):
            return data[at + 4] >> 5 & 3 > 0
        at += 4 + size
    raise AssertionError("no slice")


def gop_style_videos(folder: Path, *, frames: int = 90) -> dict[str, Path]:
    """One video for every GOP style and codec that clips are cut from, numbered from 0 at 30 fps.

    Keys: x264-default (B-pyramid, keyint 250), x264-gop30, balanced (GOP 32, 7 non-reference B-frames),
    no-b, intra, open-gop, vp9, vp9-mp4, mjpeg, hevc, mkv, mov, avi.
    """
    styles: dict[str, tuple[str, str, dict[str, str]]] = {
        "x264-default": ("mp4", "libx264", {"preset": "medium", "threads": "1"}),
        "x264-gop30": ("mp4", "libx264", {"preset": "medium", "threads": "1", "g": "30"}),
        "balanced": ("mp4", "libx264", {"preset": "veryfast", "threads": "1", "x264-params": BALANCED}),
        "no-b": ("mp4", "libx264", X264_FAST | {"bf": "0", "g": "30"}),
        "intra": ("mp4", "libx264", X264_FAST | {"g": "1", "bf": "0"}),
        "open-gop": (
            "mp4",
            "libx264",
            X264_FAST | {"g": "15", "x264-params": "open-gop=1:bframes=3:scenecut=0"},
        ),
        "vp9": ("webm", "libvpx-vp9", VP9_FAST),
        "vp9-mp4": ("mp4", "libvpx-vp9", VP9_FAST),
        "mjpeg": ("mov", "mjpeg", {"q": "3"}),
        "hevc": ("mp4", "libx265", HEVC_FAST),
        "mkv": ("mkv", "libx264", X264_FAST | {"g": "30"}),
        "mov": ("mov", "libx264", X264_FAST | {"g": "30"}),
        "avi": ("avi", "libx264", X264_FAST | {"g": "30", "bf": "0"}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    return {
        name: write_video(
            folder / f"{name}.{ending}",
            frames=frames,
            codec=codec,
            options=options,
            pix_fmt="yuvj420p" if codec == "mjpeg" else "yuv420p",
        )
        for name, (ending, codec, options) in styles.items()
    }
