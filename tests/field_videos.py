"""Videos of the kinds that users bring, what a player shows of them, and what the library shows.

Every picture carries its number (`make_videos.draw_frame`), so alignment is compared exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import make_videos as mv
import numpy as np

from avion_dali.contracts import ChunkRef, ClipPart, ClipRequest, CropWindow
from avion_dali.data.manifest import Chunk
from avion_dali.data.planner import locate_frames
from avion_dali.data.probe import ChunkFacts, probe_chunk
from avion_dali.decode import cpu_fused, paper_fused, reference

DECODERS: dict[str, Callable[[ClipRequest, np.ndarray], None]] = {
    "cpu-fused": cpu_fused.decode_clip,
    "paper-fused": paper_fused.decode_clip,
    "reference": reference.decode_clip,
}
SIZE = (128, 96)
_SIDE = 96


@dataclass(frozen=True)
class Style:
    """How a video is encoded and muxed."""

    codec: str = "libx264"
    pix_fmt: str = "yuv420p"
    options: dict[str, str] | None = None
    container: str | None = None
    gop: int = 10
    size: tuple[int, int] = SIZE
    muxing: dict[str, str] = field(default_factory=dict)


def write(
    path: Path,
    style: Style = Style(),
    *,
    rate: Fraction | float = Fraction(30),
    count: int = 45,
    first: int = 0,
    ticks: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    delay: int = 0,
    sound_seconds: float = 0.0,
    aspect: Fraction | None = None,
    last_duration: int = 0,
) -> Path:
    """Write pictures numbered from `first`; `ticks` are their times, and `delay` shifts all of them."""
    rate = Fraction(rate)
    time_base = time_base or 1 / rate
    options = mv.X264_FAST if style.options is None and style.codec == "libx264" else style.options or {}
    with av.open(str(path), "w", format=style.container, options=style.muxing) as container:
        stream = container.add_stream(style.codec, rate=rate, options=dict(options))
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = *style.size, style.pix_fmt, style.gop
        stream.thread_count = 1
        stream.codec_context.time_base = time_base
        if aspect:
            stream.sample_aspect_ratio = stream.codec_context.sample_aspect_ratio = aspect
        sound = container.add_stream("aac", rate=16_000, layout="mono") if sound_seconds else None
        packets = []
        for i in range(count):
            rgb = av.VideoFrame.from_ndarray(mv.draw_frame(first + i, style.size), format="rgb24")
            frame = rgb.reformat(format=style.pix_fmt)
            frame.pts, frame.time_base = (ticks[i] if ticks else i) + delay, time_base
            packets += stream.encode(frame)
        packets += stream.encode(None)
        if last_duration:
            packets[-1].duration = last_duration  # the last one decoded
        if sound is not None:
            container.mux(list(mv.silence(sound, sound_seconds)))
        container.mux(packets)
    return path


def cut_packets(source: Path, path: Path, *, skip: int, container: str | None = None) -> Path:
    """Copy a video without its first `skip` packets, so that it begins inside a group of pictures."""
    with av.open(str(source)) as reader, av.open(str(path), "w", format=container) as writer:
        target = writer.add_stream_from_template(reader.streams.video[0])
        for number, packet in enumerate(p for p in reader.demux(video=0) if p.size):
            if number >= skip:
                packet.stream = target
                writer.mux(packet)
    return path


def timeline(path: Path) -> list[tuple[float, int]]:
    """(seconds on the container's clock, number) of every picture of a video, as a player decodes it."""
    with av.open(str(path)) as container:
        start = Fraction(container.start_time or 0, 1_000_000)
        stream = container.streams.video[0]
        step = 1 / Fraction(stream.average_rate or stream.guessed_rate or 25)
        shown = []
        for number, frame in enumerate(container.decode(stream)):
            is_timed = frame.pts is not None and container.format.name != "avi"  # there they are guesses
            seconds = frame.pts * frame.time_base - start if is_timed else number * step
            shown.append((float(seconds), mv.read_frame_number(frame.to_ndarray(format="rgb24"))))
    return sorted(shown)


def on_show(shown: Sequence[tuple[float, int]], seconds: float, *, slack: float = 1e-3) -> set[int]:
    """Numbers of the pictures on show at a time, give or take some slack; the first one before it begins."""
    begun = [number for time, number in shown if time <= seconds - slack] or [shown[0][1]]
    return {begun[-1], *(number for time, number in shown if abs(time - seconds) <= slack)}


def chunk_pictures(folder: Path) -> dict[int, tuple[float, list[int]]]:
    """Rate and numbers of the pictures of each chunk, by start second."""
    found = {}
    for path in folder.glob("*.mp4"):
        with av.open(str(path)) as container:
            rate = float(container.streams.video[0].average_rate)
        found[int(path.stem)] = (rate, mv.frame_numbers(path))
    return dict(sorted(found.items()))


def misplaced(video: Path, folder: Path) -> list[tuple[float, int, set[int]]]:
    """(second, found, expected) of chunk pictures that are not on show within half a frame of their time."""
    shown = timeline(video)
    wrong = []
    for start, (rate, numbers) in chunk_pictures(folder).items():
        for place, number in enumerate(numbers):
            expected = on_show(shown, start + place / rate, slack=0.5 / rate + 2e-3)
            if number not in expected:
                wrong.append((start + place / rate, number, expected))
    return wrong


def chunk_of(facts: ChunkFacts, *, start_s: float = 0.0) -> Chunk:
    """The chunk row of a file that is used as it is."""
    ref = ChunkRef(facts.path, facts.size_bytes, facts.num_frames, facts.width, facts.height)
    return Chunk(ref, "v", start_s, facts.fps, facts.codec, facts.clock_times(), last_s=facts.last_s)


def clip_numbers(chunk: Chunk, seconds: Iterable[float], decoder: str) -> list[int]:
    """Numbers that one-frame clips at these times show."""
    numbers = []
    for second in seconds:
        parts, gather = locate_frames(second, second, chunks=[chunk], choose=lambda _: np.zeros(1, np.int64))
        numbers += _rendered(parts, gather, decoder)
    return numbers


def frame_numbers(ref: ChunkRef, frame_ids: Sequence[int], decoder: str) -> list[int]:
    """Numbers that a clip of these frames shows."""
    ids = tuple(sorted(set(frame_ids)))
    return _rendered((ClipPart(ref, ids),), tuple(ids.index(i) for i in frame_ids), decoder)


def _rendered(parts: tuple[ClipPart, ...], gather: tuple[int, ...], decoder: str) -> list[int]:
    width, height = (side // 2 * 2 for side in (parts[0].chunk.width, parts[0].chunk.height))
    request = ClipRequest(0, 0, parts, gather, (CropWindow(0, 0, width, height),), (False,), _SIDE)
    frames = np.zeros(request.frames_shape, np.uint8)
    DECODERS[decoder](request, frames)
    return [mv.read_frame_number(picture) for picture in frames[0]]


def disagreements(path: Path) -> list[str]:
    """What the decoders say otherwise than `reference`, over frames in no particular order."""
    facts = probe_chunk(path, index=True)
    ref = chunk_of(facts).ref
    ids = sorted({0, facts.num_frames // 3, facts.num_frames // 2, facts.num_frames - 1})
    orders = [ids, ids[-1:], ids[1:2], ids[:1]]
    wrong = []
    for order in orders:
        expected = frame_numbers(ref, order, "reference")
        for decoder in ("cpu-fused", "paper-fused"):
            found = frame_numbers(ref, order, decoder)
            if found != expected:
                wrong.append(f"{decoder} {order}: {found}, not {expected}")
    if len(mv.frame_numbers(path)) != facts.num_frames:
        wrong.append(f"{facts.num_frames} frames counted, {len(mv.frame_numbers(path))} delivered")
    return wrong
