"""Chunk profiles side by side: bytes, quality, encoding time, and processor time of the clips read from them.

python -m benchmarks.chunk_profiles [VIDEO ...] [--sweep]

Each source (the given videos, and a procedural noisy one) is scaled to chunk size and encoded by every profile.
Bytes say nothing without quality: a profile is to keep the structural similarity of `compat`, less 0.002.
`--sweep` tries candidate settings instead, each encoded at two quality numbers (CRF), and works out what it
costs at the one number that serves all sources. The picture shows both, so that a bad choice would be seen.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
from av.video.frame import VideoFrame

from avion_dali.contracts import ClipRequest
from avion_dali.data.encoding import write_chunk
from avion_dali.data.profiles import PIX_FMT, PROFILES, EncodeProfile
from avion_dali.decode import cpu_fused, paper_fused
from avion_dali.decode.source import gather_packets
from benchmarks.corpus import CLIP_KINDS, FPS
from benchmarks.machine import RESULTS, ROOT, Row, machine_facts, write_result
from benchmarks.sources import NOISE, REAL_VIDEOS, draw_clips, forth_and_back, indexed_chunk, noise_like

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SECONDS, SHORT_SIDE, NOISE_SIZE = 15, 288, (512, 288)
NAME, SWEEP_NAME = "chunk_profiles", "chunk_profiles_sweep"
PICTURE = ROOT / "docs" / "chunk_profiles.png"
SSIM_SLACK = 0.002
# Shares no factor with usual distances of keyframes and reference frames, so that frames of all kinds are seen.
SSIM_STEP = 13
BYTES_LIMITS = {"balanced": 1.25, "fast": 1.45, "intra": 3.0}
KINDS = tuple(kind.name for kind in CLIP_KINDS)
PROFILE_FAMILY = "profiles"


@dataclass(frozen=True)
class Source:
    """Raw pictures.

    Args:
        name: as rows show it.
        pictures_FHW: uint8 (F, H * 3 / 2, W), planar 4:2:0: luma on top, then both chroma planes.
    """

    name: str
    pictures_FHW: np.ndarray


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
    frames = SECONDS * FPS
    for video in videos:
        pictures = forth_and_back(video, frames=frames, short_side=SHORT_SIDE)
        yield Source(video.stem, np.stack([picture.to_ndarray() for picture in pictures]))
    yield Source(NOISE, np.stack([picture.to_ndarray() for picture in noise_like(frames, NOISE_SIZE)]))


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


def frames_decoded(clips: Sequence[ClipRequest]) -> float:
    """Pictures decoded for a clip, on average: what a hardware decoder's time goes by."""
    runs = [gather_packets(part, decoder="cpu-fused").runs for clip in clips for part in clip.parts]
    return sum(len(run.payloads) for part in runs for run in part) / len(clips)


def measure(
    profiles: Mapping[str, EncodeProfile], source: Source, *, clips: int, rounds: int
) -> dict[str, Row]:
    """Encode a source by each profile and read the same clips of all; ratios are to `compat`."""
    with tempfile.TemporaryDirectory() as folder:
        paths = (Path(folder) / f"{number}.mp4" for number in range(len(profiles)))
        chunks = {
            name: encode(source, profile, path, clips=clips)
            for (name, profile), path in zip(profiles.items(), paths, strict=False)
        }
        times = clip_times(list(chunks.values()), rounds=rounds)
        decoded = [{kind: frames_decoded(c) for kind, c in chunk.clips.items()} for chunk in chunks.values()]
    compat, compat_ms = chunks["compat"], times[list(chunks).index("compat")]
    return {
        name: {
            "bytes": chunk.size_bytes,
            "mbit_per_s": round(chunk.size_bytes * 8 / SECONDS / 1e6, 3),
            "bytes_ratio": round(chunk.size_bytes / compat.size_bytes, 3),
            "index_bytes_per_frame": round(chunk.index_bytes / (SECONDS * FPS), 2),
            "ssim": round(chunk.ssim, 5),
            "ssim_above_compat": round(chunk.ssim - compat.ssim, 5),
            "encode_cpu_s": round(chunk.encode_s, 2),
            "encode_ratio": round(chunk.encode_s / compat.encode_s, 2),
            **{f"cpu_ms, {kind}": round(ms[kind], 3) for kind in KINDS},
            **{f"cpu_ratio, {kind}": round(ms[kind] / compat_ms[kind], 3) for kind in KINDS},
            **{f"frames_decoded, {kind}": round(frames[kind], 1) for kind in KINDS},
        }
        for (name, chunk), ms, frames in zip(chunks.items(), times, decoded, strict=True)
    }


@dataclass(frozen=True)
class Candidate:
    """Settings whose quality number is still open.

    Args:
        family: what shares a colour in the picture.
        settings: what sets it apart: for H.264 and HEVC keyframe distance / B-frames in a row.
        profile: the encoder's settings, but for `crf`.
        crfs: the two quality numbers to encode at.
    """

    family: str
    settings: str
    profile: EncodeProfile
    crfs: tuple[float, float]

    def at(self, crf: float) -> EncodeProfile:
        return replace(self.profile, options={**self.profile.options, "crf": f"{crf:g}"})


def candidates() -> Iterator[Candidate]:
    """Yield the sweep's settings: one encoder effort a family, but for the profiles themselves."""
    plain, bare = "cabac=0", "cabac=0:no-deblock=1"
    for family, extra, shapes in (
        ("H.264", "", ("32/3", "32/7", "64/7")),
        ("H.264, CAVLC", plain, ("16/7", "32/3", "32/5", "32/7", "48/7", "64/7", "64/9", "96/7")),
        ("H.264, CAVLC, no deblocking", bare, ("2/0", "32/3", "32/7", "48/7", "64/7", "64/9")),
    ):
        for shape in shapes:
            yield Candidate(family, shape, _x264(shape, extra), (21, 24))
        yield Candidate(family, "intra", _x264("1/0", extra), (18, 21))
    yield Candidate("H.264", "32/7, B referenced", _x264("32/7", "b-pyramid=normal"), (21, 24))
    yield Candidate("H.264, CAVLC", "32/7, B adaptive", _x264("32/7", f"{plain}:b-adapt=1"), (21, 24))
    hevc, vp9 = PROFILES["hevc"], PROFILES["vp9"]
    fewer_b = hevc.options["x265-params"].replace("bframes=7", "bframes=3")
    yield Candidate("HEVC", "3 B", replace(hevc, options={**hevc.options, "x265-params": fewer_b}), (22, 26))
    for gop in (16, 60):
        options = {**vp9.options, "keyint_min": str(gop)}
        yield Candidate("VP9", str(gop), replace(vp9, gop=gop, options=options), (30, 36))
    for name in ("balanced", "fast", "intra", "hevc", "vp9"):
        crf = float(PROFILES[name].options["crf"])
        yield Candidate(PROFILE_FAMILY, name, PROFILES[name], (crf - 1, crf + 2))


def _x264(shape: str, extra: str) -> EncodeProfile:
    gop, bframes = shape.split("/")
    fixed = f"keyint={gop}:min-keyint={gop}:bframes={bframes}:scenecut=0:b-adapt=0:b-pyramid=none:open-gop=0"
    options = {"preset": "medium", "tune": "ssim", "x264-params": f"{fixed}:weightp=0:aq-strength=0.5:{extra}"}
    return EncodeProfile("libx264", int(gop), options)


def sweep(videos: Sequence[Path]) -> list[Row]:
    """Encode all candidates, and work out what each costs at the quality number that serves all sources."""
    tried = list(candidates())
    keys = {(c.family, c.settings, crf): c.at(crf) for c in tried for crf in c.crfs}
    profiles = {"compat": PROFILES["compat"], **{" ".join(map(str, key)): p for key, p in keys.items()}}
    measured = {s.name: measure(profiles, s, clips=8, rounds=2) for s in sources(videos)}
    rows = []
    for c in tried:
        names = [f"{c.family} {c.settings} {crf}" for crf in c.crfs]
        ends = {source: [rows_of[name] for name in names] for source, rows_of in measured.items()}
        needed = {source: _place(*(row["ssim_above_compat"] for row in both)) for source, both in ends.items()}
        rows += [
            {
                "family": c.family,
                "settings": c.settings,
                "source": source,
                "crf_needed": round(_line(*c.crfs, needed[source]), 2),
                "crf": round(_line(*c.crfs, min(needed.values())), 2),
                **_row_between(both[0], both[1], min(needed.values())),
            }
            for source, both in ends.items()
        ]
    return rows


def _place(first: float, second: float) -> float:
    """Where similarity falls to what must be kept: 0 at the first quality number, 1 at the second."""
    return (first + SSIM_SLACK) / max(first - second, 1e-6)


def _line(first: float, second: float, place: float) -> float:
    return (1 - place) * first + place * second


def _row_between(first: Row, second: Row, place: float) -> Row:
    """Interpolate rows; bytes and times fall exponentially with the quality number, similarity linearly."""
    return {
        key: round(_line(value, second[key], place), 5)
        if key.startswith("ssim")
        else round(math.exp(_line(math.log(value), math.log(second[key]), place)), 4)
        for key, value in first.items()
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


def draw(rows: Sequence[Row], tried: Sequence[Row], path: Path) -> None:
    """Draw bytes against the processor time of a clip: one panel for each kind of clip."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(KINDS), figsize=(4.2 * len(KINDS), 4.6), layout="constrained")
    for axis, kind in zip(axes, KINDS, strict=True):
        _draw_kind(axis, f"cpu_ratio, {kind}", rows, tried)
        axis.set_title(kind)
    axes[0].set_ylabel("processor time of a clip / compat's")
    axes[1].set_xlabel("bytes / compat's (geometric means over the sources)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7, fontsize="small", frameon=False)
    figure.savefig(path, dpi=80)
    plt.close(figure)


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


def readme_table(rows: Sequence[Row]) -> str:
    """The README's rows: a profile's ratio of bytes, similarity and time on each source."""
    heads = [
        "profile",
        "source",
        "Mbit/s",
        "bytes / compat",
        "SSIM",
        *(f"ms, {kind}" for kind in KINDS),
        "encoding / compat",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        limit = BYTES_LIMITS.get(row["profile"], math.inf)
        over = f" (over the limit of {limit})" if row["bytes_ratio"] > limit else ""
        under = " (too low)" if row["ssim_above_compat"] < -SSIM_SLACK else ""
        times = [f"{row[f'cpu_ms, {kind}']:.1f}" for kind in KINDS]
        cells = [
            f"`{row['profile']}`",
            row["source"],
            f"{row['mbit_per_s']:.2f}",
            f"{row['bytes_ratio']:.2f}{over}",
        ]
        cells += [
            f"{row['ssim']:.4f} ({row['ssim_above_compat']:+.4f}){under}",
            *times,
            f"{row['encode_ratio']:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="*", type=Path, default=REAL_VIDEOS, help="real videos to encode too")
    parser.add_argument("--sweep", action="store_true", help="measure candidate settings instead of profiles")
    options = parser.parse_args()
    machine, profiles = machine_facts(), {str(name): profile for name, profile in PROFILES.items()}
    if options.sweep:
        rows = sweep(options.videos)
        with tempfile.TemporaryDirectory(dir=RESULTS) as folder:  # results are named after their benchmark
            written = write_result(NAME, rows, machine=machine, folder=Path(folder))
            print(written.replace(RESULTS / f"{SWEEP_NAME}.json"))
        return
    rows = [
        {"profile": name, "source": source.name, **row}
        for source in sources(options.videos)
        for name, row in measure(profiles, source, clips=24, rounds=3).items()
    ]
    rows.sort(key=lambda row: list(PROFILES).index(row["profile"]))
    tried = RESULTS / f"{SWEEP_NAME}.json"
    draw(rows, json.loads(tried.read_text())["rows"] if tried.exists() else [], PICTURE)
    print(readme_table(rows))
    print(write_result(NAME, rows, machine=machine, baseline={"bytes_limits": BYTES_LIMITS}, picture=PICTURE))


if __name__ == "__main__":
    main()
