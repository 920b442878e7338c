"""Decoders side by side on the same clips: processor time, what they decode and read, and 1 to N processes.

python -m benchmarks.decode [VIDEO ...] [--folder DIR] [--profiles ...] [--decoders ...]

Nothing is timed before the clips were compared: `cpu-fused` with `paper-fused` byte by byte, all others with
`reference` by PSNR; who gives another picture gets no time. The times of all decoders are taken in turns, on
one core. Rates of several processes are like figure 5 of AVION (arXiv 2309.16669). Other libraries take part
where they can be imported (`pip install torchcodec spdl decord`); they need no FFmpeg besides PyAV's.

Spawned processes import this module.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from avion_dali.contracts import ClipRequest
from avion_dali.cores import available_cores
from avion_dali.data.profiles import PROFILES
from benchmarks import decode_report
from benchmarks.corpus import FOUR, FPS, SIXTEEN, STRIDED, ClipKind
from benchmarks.decode_backends import MAKERS, Backend, load_backends, rerun_with_pyav_libraries
from benchmarks.decode_measure import (
    Agreement,
    Case,
    Team,
    Timing,
    bytes_read,
    compare,
    decoded,
    frames_per_wanted,
    require_equal,
    time_rounds,
)
from benchmarks.machine import Row, machine_facts, write_result
from benchmarks.sources import REAL_VIDEOS, Chunks, ChunkSettings, draw_clips, write_chunks

DECODERS = tuple(name for name in MAKERS if name != "torchcodec-exact")
WANTED_PROFILES = ("compat", "balanced", "fast", "intra")
LONG_KINDS = (SIXTEEN, STRIDED)
# Clips of 16 frames are timed where the requirements look, and rates where the paper's figure does.
LONG_DECODERS = ("cpu-fused", "paper-fused", "torchcodec")
TWO_PROFILES = ("compat", "balanced")


@dataclass(frozen=True)
class Bench:
    """How much is measured.

    Args:
        profiles: chunk profiles.
        decoders: names of `MAKERS`.
        clips: per source and profile; half as many of 16 frames.
        checked: of those, how many are compared with `reference`.
        rounds: repetitions of all timings.
        processes: largest number of processes.
        seconds: length of one rate measurement; 0 leaves them out.
        frame_size: side of the clips in pixels.
    """

    profiles: tuple[str, ...]
    decoders: tuple[str, ...] = DECODERS
    clips: int = 10
    checked: int = 2
    rounds: int = 3
    processes: int = 1
    seconds: float = 0.8
    frame_size: int = 224


class Cell(NamedTuple):
    """Which clips, and who decodes them."""

    source: str
    profile: str
    kind: str
    decoder: str


Requests = dict[tuple[str, str, str], list[ClipRequest]]  # by (source, profile, kind)


def draw_all(chunks: Chunks, bench: Bench) -> Requests:
    """Draw the clips: the same frames and windows of a source in all profiles."""
    return {
        (source, profile, kind.name): draw_clips(
            chunk, kind, clips=_clips(kind, bench), frame_size=bench.frame_size
        )
        for (source, profile), chunk in chunks.items()
        for kind in (FOUR, *(LONG_KINDS if profile in TWO_PROFILES else ()))
    }


def _clips(kind: ClipKind, bench: Bench) -> int:
    return bench.clips if kind == FOUR else max(bench.clips // 2, bench.checked)


def spread(clips: Sequence[ClipRequest], count: int) -> list[ClipRequest]:
    """Take a few clips from all over a chunk."""
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
) -> dict[Cell, Timing]:
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


def clip_rows(
    requests: Requests,
    backends: dict[str, Backend],
    agreements: dict[Cell, Agreement],
    timings: dict[Cell, Timing],
) -> list[Row]:
    """One row for every source, profile, clip and decoder."""
    rows = []
    for cell, agreement in agreements.items():
        row: Row = {"measured": "clip", **cell._asdict(), "failure": agreement.failure}
        row |= {"min_psnr_db": agreement.psnr_db, "max_bias_levels": agreement.bias_levels}
        if cell in timings:
            case = Case(backends[cell.decoder], requests[cell[:3]])
            row |= timing_columns(timings[cell])
            row["frames_decoded_per_frame"] = frames_per_wanted(case)
            num_bytes = bytes_read(case)
            row["kb_read_per_clip"] = None if num_bytes is None else num_bytes / 1000
            row["file_kb"] = case.requests[0].parts[0].chunk.size_bytes / 1000
        rows.append(row)
    return rows


def timing_columns(timing: Timing) -> Row:
    """The times of a row."""
    return {
        "cpu_ms_per_clip": timing.cpu_ms,
        "cpu_ms_by_round": timing.cpu_ms_by_round,
        **wall_columns(timing.wall_ms),
    }


def wall_columns(wall_ms: list[float]) -> Row:
    """Median and slow tail of the milliseconds of clips."""
    median, tail = np.percentile(wall_ms, [50, 90])
    return {"ms_p50": float(median), "ms_p90": float(tail)}


def measure_rates(requests: Requests, right: dict[str, Backend], bench: Bench) -> Iterator[Row]:
    """Rates of 1 to N processes, by profile and decoder; all sources mixed, `reference` left out."""
    names = [name for name in right if name != "reference"]
    counts = sorted({*(2**k for k in range(bench.processes.bit_length())), bench.processes})  # 1, 2, 4 .. N
    with Team(bench.processes, names) as team:
        profiles = [name for name in TWO_PROFILES if name in bench.profiles]
        for profile, count, name in product(profiles, counts, names):
            by_source = [clips for key, clips in requests.items() if key[1:] == (profile, FOUR.name)]
            mixed = [clip for clips in zip(*by_source, strict=True) for clip in clips]
            rate = team.rate(name, mixed, processes=count, seconds=bench.seconds)
            row = {"measured": "processes", "profile": profile, "decoder": name, "processes": count}
            row |= {"clips_per_s": rate.clips_per_s, "cpu_ms_per_clip": rate.cpu_ms}
            yield {**row, **wall_columns(rate.wall_ms)}


def setup_row(chunks: Chunks, bench: Bench) -> Row:
    """What was decoded, and by which FFmpeg."""
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
    rows = [setup_row(chunks, bench), *clip_rows(requests, backends, agreements, timings)]
    wrong = {cell.decoder for cell, agreement in agreements.items() if not agreement.is_right}
    right = {name: backend for name, backend in backends.items() if name not in wrong}
    rows += [_decoder_row(backend, agreements) for backend in found]
    rows += [{"measured": "decoder", "decoder": name, "missing": cause} for name, cause in missing.items()]
    rows += decode_report.pooled(rows)
    rows += decode_report.ratios(rows)
    if bench.seconds:
        rows += measure_rates(requests, right, bench)
    return decode_report.rounded(rows)


def _decoder_row(backend: Backend, agreements: dict[Cell, Agreement]) -> Row:
    own = [agreement for cell, agreement in agreements.items() if cell.decoder == backend.name]
    return {
        "measured": "decoder",
        "decoder": backend.name,
        "conversion": backend.conversion,
        "min_psnr_db": min(agreement.psnr_db for agreement in own),
        "max_bias_levels": max(agreement.bias_levels for agreement in own),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("videos", type=Path, nargs="*", help="sources besides the noise-like one")
    parser.add_argument("--folder", type=Path, help="keep chunks here; by default they are thrown away")
    parser.add_argument("--profiles", nargs="+", choices=list(PROFILES), help="default: those of the table")
    parser.add_argument("--decoders", nargs="+", choices=DECODERS, default=DECODERS)
    parser.add_argument("--clips", type=int, default=Bench.clips, help="per source and profile")
    parser.add_argument("--rounds", type=int, default=Bench.rounds)
    parser.add_argument("--processes", type=int, default=available_cores(), help="rates of 1 to so many")
    parser.add_argument("--seconds", type=float, default=Bench.seconds, help="of one rate; 0: no rates")
    options = parser.parse_args()
    status = rerun_with_pyav_libraries("benchmarks.decode")
    if status is not None:
        sys.exit(status)
    measure_and_report(options)


def measure_and_report(options: argparse.Namespace) -> None:
    """Run everything and write the JSON and the picture."""
    machine = machine_facts()
    profiles = tuple(options.profiles or [name for name in WANTED_PROFILES if name in PROFILES])
    needed = ("cpu-fused", "paper-fused", "reference")
    bench = Bench(
        profiles=profiles,
        decoders=tuple(name for name in MAKERS if name in (*options.decoders, *needed)),
        clips=options.clips,
        rounds=options.rounds,
        processes=options.processes,
        seconds=options.seconds,
    )
    with tempfile.TemporaryDirectory() as scratch:
        videos = options.videos or REAL_VIDEOS
        chunks = write_chunks(videos, options.folder or Path(scratch), profiles, ChunkSettings())
        rows = run(chunks, bench)
    picture = decode_report.draw(rows)
    print(decode_report.readme_tables(rows))
    print(write_result("decode", rows, machine=machine, baseline=decode_report.REQUIREMENT, picture=picture))
    print(picture)


if __name__ == "__main__":
    main()
