"""Decoders side by side on the same clips: processor time, what they decode, and what they read.

python -m benchmarks.decode [--videos FILE ...] [--extra-videos FOLDER] [--profiles ...] [--decoders ...]

Nothing is timed before the clips were compared: `cpu-fused` with `paper-fused` byte by byte, all others with
`reference` by PSNR; a decoder that gives another picture gets no time. The times of all decoders are taken in
turns on one core. Other libraries take part where they can be imported (`pip install torchcodec spdl decord`);
they need no FFmpeg besides PyAV's. The table has a line per video and decoder, then the means over the videos.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import av

from avion_dali.contracts import ChunkRef, ClipRequest
from avion_dali.data.profiles import PROFILES
from benchmarks.corpus import FOUR, SIXTEEN, STRIDED, ClipKind, draw_clips, write_chunks
from benchmarks.decode import report
from benchmarks.decode.backends import MAKERS, Backend, load_backends, rerun_with_pyav_libraries
from benchmarks.decode.measure import (
    Agreement,
    Case,
    bytes_read,
    compare,
    decoded,
    frames_per_wanted,
    require_equal,
    time_rounds,
)
from benchmarks.media import FPS, add_video_options, measure_videos
from benchmarks.report import Benchmark, Row, parser_of

NEEDED = ("cpu-fused", "paper-fused", "reference")
WANTED_PROFILES = ("compat", "balanced", "fast", "intra")
# Clips of 16 frames are timed where the requirements look.
LONG_KINDS, LONG_PROFILES = (SIXTEEN, STRIDED), ("compat", "balanced")
LONG_DECODERS = ("cpu-fused", "paper-fused", "torchcodec")


@dataclass(frozen=True)
class Bench:
    """Size of the measurement."""

    profiles: tuple[str, ...] = WANTED_PROFILES  # chunk profiles
    decoders: tuple[str, ...] = tuple(MAKERS)  # names of `MAKERS`
    clips: int = 10  # per source and profile; half as many of 16 frames
    checked: int = 2  # of those, how many are compared with `reference`
    rounds: int = 3  # repetitions of all timings
    frame_size: int = 224  # side of the clips in pixels


class Cell(NamedTuple):
    """Which clips, and who decodes them."""

    source: str
    profile: str
    kind: str
    decoder: str


Chunks = dict[tuple[str, str], ChunkRef]  # by (source, profile)
Requests = dict[tuple[str, str, str], list[ClipRequest]]  # by (source, profile, kind)


def draw_all(chunks: Chunks, bench: Bench) -> Requests:
    """Draw the clips: the same frames and windows of a source in all profiles."""
    return {
        (source, profile, kind.name): draw_clips(
            chunk, kind, clips=_clips(kind, bench), frame_size=bench.frame_size
        )
        for (source, profile), chunk in chunks.items()
        for kind in (FOUR, *(LONG_KINDS if profile in LONG_PROFILES else ()))
    }


def _clips(kind: ClipKind, bench: Bench) -> int:
    return bench.clips if kind == FOUR else max(bench.clips // 2, bench.checked)


def spread(clips: Sequence[ClipRequest], count: int) -> list[ClipRequest]:
    """Select a few clips spread over a chunk."""
    return [clips[(2 * number + 1) * len(clips) // (2 * count)] for number in range(count)]


def check_all(requests: Requests, backends: dict[str, Backend], bench: Bench) -> dict[Cell, Agreement]:
    """Compare all decoders.

    Raises:
        RuntimeError: when `cpu-fused` and `paper-fused` differ in a byte.
    """
    agreements = {}
    for key, clips in requests.items():
        require_equal(backends["cpu-fused"], backends["paper-fused"], clips)
        checked = spread(clips, bench.checked)
        expected = decoded(backends["reference"], checked)
        for name, backend in backends.items():
            if key[2] == FOUR.name or name in LONG_DECODERS:
                agreements[Cell(*key, name)] = compare(backend, checked, expected)
    return agreements


def time_all(
    requests: Requests, backends: dict[str, Backend], agreements: dict[Cell, Agreement], bench: Bench
) -> dict[Cell, list[float]]:
    """Time every decoder whose frames are right; `reference` once, on few clips, since it is slow."""
    cases = {
        cell: Case(backends[cell.decoder], requests[cell[:3]])
        for cell, agreement in agreements.items()
        if agreement.is_right
    }
    slow = {
        cell: Case(case.backend, spread(case.requests, bench.checked))
        for cell, case in cases.items()
        if cell.decoder == "reference"
    }
    timings = time_rounds({cell: case for cell, case in cases.items() if cell not in slow}, bench.rounds)
    return {**timings, **time_rounds(slow, 1)}


def clip_row(cell: Cell, case: Case, agreement: Agreement, by_round: list[float] | None) -> Row:
    """One row for every source, profile, clip and decoder; without times where the frames are wrong."""
    row: Row = {"measured": "clip", **cell._asdict(), "failure": agreement.failure}
    row |= {"min_psnr_db": agreement.psnr_db, "max_bias_levels": agreement.bias_levels}
    if by_round is None:
        return row
    num_bytes = bytes_read(case)
    return row | {
        "cpu_ms_per_clip": statistics.median(by_round),
        "cpu_ms_by_round": by_round,
        "frames_decoded_per_frame": frames_per_wanted(case),
        "kb_read_per_clip": None if num_bytes is None else num_bytes / 1000,
        "file_kb": case.requests[0].parts[0].chunk.size_bytes / 1000,
    }


def setup_row(chunks: Chunks, bench: Bench) -> Row:
    """Describe the decoded files and the FFmpeg builds."""
    rates: dict[str, dict[str, float]] = {}
    for (source, profile), chunk in chunks.items():
        rates.setdefault(source, {})[profile] = chunk.size_bytes * 8 / (chunk.num_frames / FPS) / 1e6
    sizes = {source: f"{chunk.width}x{chunk.height}" for (source, _), chunk in chunks.items()}
    row = {"measured": "setup", "ffmpeg_of_pyav": av.ffmpeg_version_info, "sizes": sizes}
    return {**row, "chunk_mbit_per_s": rates, "clips": bench.clips, "rounds": bench.rounds}


def run(chunks: Chunks, bench: Bench) -> list[Row]:
    """Compare, time and count everything."""
    found, missing = load_backends(bench.decoders)
    backends = {backend.name: backend for backend in found}
    requests = draw_all(chunks, bench)
    agreements = check_all(requests, backends, bench)
    timings = time_all(requests, backends, agreements, bench)
    rows = [setup_row(chunks, bench)]
    for cell, agreement in agreements.items():
        case = Case(backends[cell.decoder], requests[cell[:3]])
        rows.append(clip_row(cell, case, agreement, timings.get(cell)))
    rows += [{"measured": "decoder", "decoder": b.name, "conversion": b.conversion} for b in found]
    rows += [{"measured": "skipped", "what": name, "reason": cause} for name, cause in missing.items()]
    rows += report.pooled(rows)
    return [*rows, *report.ratios(rows)]


BENCHMARK = Benchmark("decode", report.tables, report.draw, report.REQUIREMENT)


def main() -> None:
    parser = parser_of(__doc__)
    add_video_options(parser)
    parser.add_argument("--profiles", nargs="+", choices=list(PROFILES), default=WANTED_PROFILES)
    parser.add_argument("--decoders", nargs="+", choices=list(MAKERS), default=list(MAKERS))
    parser.add_argument("--clips", type=int, default=Bench.clips, help="per source and profile")
    parser.add_argument("--rounds", type=int, default=Bench.rounds)
    options = parser.parse_args()
    status = None if options.report else rerun_with_pyav_libraries("benchmarks.decode")
    if status is not None:
        sys.exit(status)
    decoders = tuple(name for name in MAKERS if name in (*options.decoders, *NEEDED))
    bench = Bench(tuple(options.profiles), decoders, clips=options.clips, rounds=options.rounds)
    measure_videos(
        BENCHMARK, options, lambda videos, folder: run(write_chunks(videos, folder, bench.profiles), bench)
    )
