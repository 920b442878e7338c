"""Chunk profiles side by side: bytes, quality, encoding time, and processor time of the clips read from them.

python -m benchmarks.studies.chunk_profiles [--videos FILE ...]

Each video is scaled to chunk size and encoded by every profile.
A profile must keep the structural similarity of `compat`, less 0.002.
The picture also shows the candidates that the settings were chosen from, so that a bad choice would be seen
(`results/chunk_profiles_sweep.json`).
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
from av.video.frame import VideoFrame

from avion_dali.contracts import ClipRequest
from avion_dali.data.encoding import PictureFilter, write_chunk
from avion_dali.data.probe import open_video
from avion_dali.data.profiles import PIX_FMT, PROFILES, EncodeProfile
from avion_dali.decode import cpu_fused, paper_fused
from benchmarks.corpus import CLIP_KINDS, draw_clips, indexed_chunk
from benchmarks.media import FPS, add_video_options, measure_videos
from benchmarks.report import Benchmark, Row, markdown, parser_of, read_rows, select

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SECONDS, SHORT_SIDE = 15, 288
SSIM_SLACK = 0.002
# Shares no factor with usual distances of keyframes and reference frames, so that frames of all kinds are seen.
SSIM_STEP = 13
BYTES_LIMITS = {"balanced": 1.25, "fast": 1.45, "intra": 3.0}
KINDS = tuple(kind.name for kind in CLIP_KINDS)
PROFILE_FAMILY = "profiles"


@dataclass(frozen=True)
class Source:
    """Raw pictures."""

    name: str  # as rows show it
    pictures_FHW: np.ndarray  # uint8 (F, H * 3 / 2, W), planar 4:2:0: luma on top, then both chroma planes


@dataclass(frozen=True)
class Encoded:
    """One source encoded once, and the clips to read from it by kind."""

    size_bytes: int
    index_bytes: int
    encode_s: float
    ssim: float
    clips: dict[str, list[ClipRequest]]


def sources(videos: Sequence[Path]) -> Iterator[Source]:
    """Yield what is encoded, one after the other: each takes about 100 MB."""
    for video in videos:
        with open_video(video) as (container, stream):
            scaled = PictureFilter(stream.sample_aspect_ratio or Fraction(1), short_side=SHORT_SIDE)
            pictures = [scaled(f).to_ndarray() for f in islice(container.decode(stream), SECONDS * FPS)]
        yield Source(video.stem, np.stack(pictures))


def ssim(a_HW: np.ndarray, b_HW: np.ndarray) -> float:
    """Mean structural similarity of two uint8 pictures over 8x8 windows, 4 pixels apart.

    Source: Wang et al., IEEE Transactions on Image Processing 13(4), 2004, equation 13.
    """

    def window_means(values_HW: np.ndarray) -> np.ndarray:
        blocks = values_HW.reshape(values_HW.shape[0] // 4, 4, -1, 4).sum(axis=(1, 3))
        return (blocks[1:, 1:] + blocks[1:, :-1] + blocks[:-1, 1:] + blocks[:-1, :-1]) / 64

    a, b = a_HW.astype(np.float64), b_HW.astype(np.float64)
    mean_a, mean_b = window_means(a), window_means(b)
    spread = window_means(a * a + b * b) - mean_a**2 - mean_b**2
    shared = window_means(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    scores = (2 * mean_a * mean_b + c1) * (2 * shared + c2) / ((mean_a**2 + mean_b**2 + c1) * (spread + c2))
    return float(scores.mean())


def luma_ssim(path: Path, source: Source) -> float:
    """Mean similarity of a chunk's luma to its source, over every `SSIM_STEP`-th frame."""
    height = source.pictures_FHW.shape[1] * 2 // 3
    with av.open(str(path)) as container:
        shown = (f for i, f in enumerate(container.decode(video=0)) if i % SSIM_STEP == 0)
        pairs = zip(shown, source.pictures_FHW[::SSIM_STEP], strict=True)
        return float(np.mean([ssim(f.to_ndarray()[:height], original[:height]) for f, original in pairs]))


def encode(source: Source, profile: EncodeProfile, path: Path, *, clips: int) -> Encoded:
    """Write a chunk as the chunker does, compare it with its source, and draw clips of it."""
    pictures = (VideoFrame.from_ndarray(picture, format=PIX_FMT) for picture in source.pictures_FHW)
    start = time.process_time()
    write_chunk(path, pictures, profile=profile, fps=Fraction(FPS))
    encode_s = time.process_time() - start
    chunk = indexed_chunk(path)
    drawn = {kind.name: draw_clips(chunk, kind, clips=clips) for kind in CLIP_KINDS}
    for request, *_ in drawn.values():
        clip, expected = (np.zeros(request.frames_shape, np.uint8) for _ in range(2))
        cpu_fused.decode_clip(request, clip)
        paper_fused.decode_clip(request, expected)
        if not np.array_equal(clip, expected):
            raise RuntimeError(f"{path}: dropping packets changes frames; its times would mean nothing")
    index_bytes = chunk.index.num_bytes if chunk.index else 0
    return Encoded(chunk.size_bytes, index_bytes, encode_s, luma_ssim(path, source), drawn)


def clip_times(chunks: Sequence[Encoded], *, rounds: int) -> list[dict[str, float]]:
    """Processor milliseconds a clip takes `cpu-fused`, by kind, for each chunk.

    All chunks take turns in every round, and the fastest of a clip's rounds counts: other programs only ever
    slow one down.
    """
    best = [{kind: np.full(len(clips), np.inf) for kind, clips in c.clips.items()} for c in chunks]
    for _ in range(rounds):
        for chunk, fastest in zip(chunks, best, strict=True):
            for kind, clips in chunk.clips.items():
                np.minimum(fastest[kind], _seconds(clips), out=fastest[kind])
    return [{kind: 1000 * float(seconds.mean()) for kind, seconds in fastest.items()} for fastest in best]


def _seconds(clips: Sequence[ClipRequest]) -> np.ndarray:
    """Processor seconds of each clip, float64 (N,)."""
    frames = np.empty(clips[0].frames_shape, np.uint8)
    clock = [time.thread_time()]
    for request in clips:
        cpu_fused.decode_clip(request, frames)
        clock.append(time.thread_time())
    return np.diff(clock)


def measure(source: Source, folder: Path, *, clips: int, rounds: int) -> dict[str, Row]:
    """Encode a source by each profile and read the same clips of all; ratios are to `compat`."""
    chunks = {
        str(name): encode(source, profile, folder / f"{source.name}-{name}.mp4", clips=clips)
        for name, profile in PROFILES.items()
    }
    times = clip_times(list(chunks.values()), rounds=rounds)
    seconds = len(source.pictures_FHW) / FPS
    compat, compat_ms = chunks["compat"], times[list(chunks).index("compat")]
    return {
        name: {
            "bytes": chunk.size_bytes,
            "mbit_per_s": chunk.size_bytes * 8 / seconds / 1e6,
            "bytes_ratio": chunk.size_bytes / compat.size_bytes,
            "index_bytes_per_frame": chunk.index_bytes / (seconds * FPS),
            "ssim": chunk.ssim,
            "ssim_above_compat": chunk.ssim - compat.ssim,
            "encode_cpu_s": chunk.encode_s,
            "encode_ratio": chunk.encode_s / compat.encode_s,
            **{f"cpu_ms, {kind}": round(ms[kind], 3) for kind in KINDS},
            **{f"cpu_ratio, {kind}": round(ms[kind] / compat_ms[kind], 3) for kind in KINDS},
        }
        for (name, chunk), ms in zip(chunks.items(), times, strict=True)
    }


def summary(rows: Sequence[Row], name: Callable[[Row], str]) -> dict[str, dict[str, float]]:
    """Bytes and times relative to `compat`: the geometric mean over sources, for each name."""
    grouped: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        grouped[name(row)].append(row)
    keys = ("bytes_ratio", *(f"cpu_ratio, {kind}" for kind in KINDS))
    return {
        label: {key: math.exp(np.mean([math.log(row[key]) for row in own])) for key in keys}
        for label, own in grouped.items()
    }


def draw(rows: list[Row]) -> Figure:
    """Draw bytes against the processor time of a clip, one panel for each kind; and the sweep's results."""
    from matplotlib.figure import Figure

    tried = read_rows("chunk_profiles_sweep")
    figure = Figure(figsize=(4.2 * len(KINDS), 4.6), layout="constrained")
    axes = figure.subplots(1, len(KINDS))
    for axis, kind in zip(axes, KINDS, strict=True):
        _draw_kind(axis, f"cpu_ratio, {kind}", select(rows, "profile"), tried)
        axis.set_title(kind)
    axes[0].set_ylabel("processor time of a clip / compat's")
    axes[1].set_xlabel("bytes / compat's (geometric means over the sources)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7, fontsize="small", frameon=False)
    return figure


def _draw_kind(axis: Axes, key: str, rows: Sequence[Row], tried: Sequence[Row]) -> None:
    candidates_by_family: dict[str, list[Row]] = defaultdict(list)
    for row in tried:
        candidates_by_family[row["family"]].append(row)
    points = []
    for family, own in candidates_by_family.items():
        if family != PROFILE_FAMILY:
            found = [(p["bytes_ratio"], p[key]) for p in summary(own, lambda row: row["settings"]).values()]
            axis.plot(*zip(*found, strict=True), "o", ms=4, alpha=0.8, label=family)
            points += found
    frontier = [p for p in sorted(points) if p[1] < min((q[1] for q in points if q < p), default=math.inf)]
    if frontier:
        axis.step(*zip(*frontier, strict=True), where="post", color="grey", lw=0.8, label="best candidates")
    for name, point in summary(rows, lambda row: row["profile"]).items():
        axis.plot(point["bytes_ratio"], point[key], "k*", ms=9)
        place = (5, -12) if name in ("hevc", "fast") else (5, 4)  # clear of their neighbours
        axis.annotate(name, (point["bytes_ratio"], point[key]), xytext=place, textcoords="offset points")
    axis.set(xscale="log", yscale="log")
    for side, ticks in ((axis.xaxis, (1, 1.5, 2, 3, 5, 8)), (axis.yaxis, (0.2, 0.3, 0.5, 0.7, 1))):
        side.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        side.set_ticks([], minor=True)


def tables(rows: list[Row]) -> str:
    """A profile's ratio of bytes, similarity and time on each source."""
    lines = []
    for row in select(rows, "profile"):
        limit = BYTES_LIMITS.get(row["profile"], math.inf)
        over = f" (over the limit of {limit})" if row["bytes_ratio"] > limit else ""
        under = " (too low)" if row["ssim_above_compat"] < -SSIM_SLACK else ""
        cells = [f"`{row['profile']}`", row["source"], f"{row['mbit_per_s']:.2f}"]
        cells.append(f"{row['bytes_ratio']:.2f}{over}")
        cells.append(f"{row['ssim']:.4f} ({row['ssim_above_compat']:+.4f}){under}")
        times = [f"{row[f'cpu_ms, {kind}']:.1f}" for kind in KINDS]
        lines.append([*cells, *times, f"{row['encode_ratio']:.1f}"])
    times = [f"ms, {kind}" for kind in KINDS]
    heads = ("profile", "source", "Mbit/s", "bytes / compat", "SSIM", *times, "encoding / compat")
    return markdown(heads, lines)


BENCHMARK = Benchmark("chunk_profiles", tables, draw, {"bytes_limits": BYTES_LIMITS})


def main() -> None:
    parser = parser_of(__doc__)
    add_video_options(parser)
    parser.add_argument("--rounds", type=int, default=3, help="of which the fastest counts")
    options = parser.parse_args()

    def measure_all(videos: list[Path], folder: Path) -> list[Row]:
        rows = [
            {"measured": "profile", "profile": name, "source": source.name, **row}
            for source in sources(videos)
            for name, row in measure(source, folder, clips=24, rounds=options.rounds).items()
        ]
        return sorted(rows, key=lambda row: list(PROFILES).index(row["profile"]))

    measure_videos(BENCHMARK, options, measure_all)


if __name__ == "__main__":
    main()
