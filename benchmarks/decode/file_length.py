"""Cost of a clip in files of 15 seconds to 10 minutes: processor time and bytes read.

python -m benchmarks.decode.file_length [--folder DIR] [--repeats 1 4 20 40]

AVION (arXiv 2309.16669, section 4.1) cut videos into chunks of 15 seconds because a clip from a long file cost
more. Longer files are a chunk's packets written several times in a row, and every clip is the chunk's own clip
in some repetition, so that only the file's length differs.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from avion_dali.contracts import ChunkRef, ClipPart, ClipRequest
from avion_dali.data.profiles import PROFILES
from benchmarks.corpus import FOUR, draw_clips, indexed_chunk, repeat_chunk, write_chunks
from benchmarks.decode.backends import load_backends, rerun_with_pyav_libraries
from benchmarks.decode.measure import Case, bytes_read, compare, decoded, time_rounds
from benchmarks.media import FPS, add_video_options, measure_videos
from benchmarks.report import Benchmark, Row, markdown, names, parser_of, select

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INDEXED = "cpu-fused"
DECODERS = ("cpu-fused", "paper-fused", "torchcodec")
LENGTH_COST, SHARE_READ = 1.15, 0.12
REQUIREMENT = {
    "cpu_time_of_longest_over_shortest_at_most": LENGTH_COST,
    "share_of_a_balanced_chunk_read_by_a_1_s_clip_at_most": SHARE_READ,
}


@dataclass(frozen=True)
class Bench:
    """Size of the measurement."""

    profiles: tuple[str, ...] = ("balanced", "compat")  # chunk profiles
    # How often a chunk is written in a row, one number a file; the first is 1.
    repeats: tuple[int, ...] = (1, 4, 20, 40)
    clips: int = 8  # per file
    rounds: int = 3  # repetitions of all timings
    frame_size: int = 224  # side of the clips in pixels


class Cell(NamedTuple):
    """Which file, and who decodes clips of it."""

    source: str
    profile: str
    repeats: int
    decoder: str


def long_files(chunk: ChunkRef, folder: Path, repeats: Sequence[int]) -> dict[int, ChunkRef]:
    """Write a chunk several times in a row; existing files are kept."""
    files = {}
    for times in repeats:
        path = folder / str(times) / Path(chunk.path).name
        if not path.exists():
            repeat_chunk(Path(chunk.path), path, times)
        files[times] = indexed_chunk(path)
    return files


def in_repetitions(requests: Sequence[ClipRequest], file: ChunkRef, times: int) -> list[ClipRequest]:
    """Return the same clips, each from another repetition of the chunk, from the first to the last."""
    moved = []
    for number, request in enumerate(requests):
        (part,) = request.parts
        repetition = round(number * (times - 1) / max(len(requests) - 1, 1))
        first = repetition * part.chunk.num_frames
        ids = tuple(first + frame_id for frame_id in part.frame_ids)
        moved.append(replace(request, parts=(ClipPart(file, ids),)))
    return moved


def make_cases(source: str, chunk: ChunkRef, profile: str, *, folder: Path, bench: Bench) -> dict[Cell, Case]:
    """Make the files of one chunk, and check that every decoder gives the same clips from all of them.

    Raises:
        RuntimeError: when this project's decoders do not.
    """
    backends = {backend.name: backend for backend in load_backends(DECODERS)[0]}
    own = draw_clips(chunk, FOUR, clips=bench.clips, frame_size=bench.frame_size)
    expected = decoded(backends[INDEXED], own)
    cases = {}
    for times, file in long_files(chunk, folder, bench.repeats).items():
        clips = in_repetitions(own, file, times)
        for name, backend in backends.items():
            case = Case(backend, clips)
            agreement = compare(backend, case.requests, expected)
            if not agreement.is_identical and name in (INDEXED, "paper-fused"):
                raise RuntimeError(f"{name} gives other frames from {file.path}")
            if agreement.is_right:
                cases[Cell(source, profile, times, name)] = case
    return cases


def file_row(cell: Cell, case: Case, by_round: list[float]) -> Row:
    """One row for every file and decoder."""
    num_bytes = bytes_read(case)
    file = case.requests[0].parts[0].chunk
    chunk_bytes = file.size_bytes / cell.repeats
    return {
        "measured": "file",
        **cell._asdict(),
        "seconds": file.num_frames / FPS,
        "cpu_ms_per_clip": statistics.median(by_round),
        "cpu_ms_by_round": by_round,
        "kb_read_per_clip": None if num_bytes is None else num_bytes / 1000,
        "share_of_chunk_read": None if num_bytes is None else num_bytes / chunk_bytes,
        "chunk_kb": chunk_bytes / 1000,
    }


def summary_rows(rows: list[Row]) -> list[Row]:
    """Growth from the shortest file to the longest, and the share of a chunk that a one-second clip reads."""
    found = select(rows, "file")
    shortest, longest = min(row["repeats"] for row in found), max(row["repeats"] for row in found)
    summary: list[Row] = []
    for profile, decoder in dict.fromkeys((row["profile"], row["decoder"]) for row in found):
        own = select(rows, "file", profile=profile, decoder=decoder)
        cpu_ms = mean_by_length(own, "cpu_ms_per_clip")
        chunks = [row for row in own if row["repeats"] == shortest]
        summary.append(
            {
                "measured": "growth",
                "profile": profile,
                "decoder": decoder,
                "longest_over_shortest": cpu_ms[longest] / cpu_ms[shortest],
                "share_of_chunk_read": {row["source"]: row["share_of_chunk_read"] for row in chunks},
            }
        )
    return summary


def mean_by_length(rows: list[Row], column: str) -> dict[int, float]:
    """Mean over the sources, by repeats."""
    lengths = sorted({row["repeats"] for row in rows})
    return {n: float(np.mean([row[column] for row in rows if row["repeats"] == n])) for n in lengths}


def run(chunks: dict[tuple[str, str], ChunkRef], folder: Path, bench: Bench) -> list[Row]:
    """Write the files, then compare, time and count everything."""
    cases: dict[Cell, Case] = {}
    for (source, profile), chunk in chunks.items():
        cases |= make_cases(source, chunk, profile, folder=folder / f"{profile}_long" / source, bench=bench)
    timings = time_rounds(cases, bench.rounds)
    rows = [file_row(cell, case, timings[cell]) for cell, case in cases.items()]
    missing = load_backends(DECODERS)[1]
    rows += [{"measured": "skipped", "what": name, "reason": cause} for name, cause in missing.items()]
    return [*rows, *summary_rows(rows)]


def tables(rows: list[Row]) -> str:
    """A clip's processor time and bytes by length of the file."""
    found = select(rows, "file")
    lengths = {row["repeats"]: _length_name(row["seconds"]) for row in found}
    columns = [f"{name}: CPU ms, kB read" for name in lengths.values()]
    heads = [f"{FOUR.name} from files of", *columns, "longest / shortest", "share of a chunk read"]
    lines = []
    for growth in select(rows, "growth"):
        own = select(found, "file", profile=growth["profile"], decoder=growth["decoder"])
        cpu_ms = mean_by_length(own, "cpu_ms_per_clip")
        cells = [f"{cpu_ms[n]:.1f}, {_kb(own, n)}" for n in lengths]
        ratio = f"{growth['longest_over_shortest']:.2f}{_verdict(growth)}"
        lines.append([f"{growth['profile']}, `{growth['decoder']}`", *cells, ratio, _shares(growth)])
    return markdown(heads, lines)


def _length_name(seconds: float) -> str:
    return f"{seconds:g} s" if seconds < 120 else f"{seconds / 60:g} min"


def _kb(rows: list[Row], repeats: int) -> str:
    values = [row["kb_read_per_clip"] for row in rows if row["repeats"] == repeats]
    return "-" if None in values else f"{np.mean(values):.0f}"


def _verdict(growth: Row) -> str:
    if growth["decoder"] != INDEXED:
        return ""
    met = growth["longest_over_shortest"] <= LENGTH_COST
    return f" ({'met' if met else 'missed'}: at most {LENGTH_COST})"


def _shares(growth: Row) -> str | None:
    shares = growth["share_of_chunk_read"]
    if None in shares.values():
        return None
    text = ", ".join(f"{source} {share:.1%}" for source, share in shares.items())
    if (growth["profile"], growth["decoder"]) == ("balanced", INDEXED):
        text += f" ({'met' if max(shares.values()) <= SHARE_READ else 'missed'}: at most {SHARE_READ:.0%})"
    return text


def draw(rows: list[Row]) -> Figure:
    """Draw processor time and bytes read over the length of the file."""
    from matplotlib.figure import Figure

    profiles = names(select(rows, "file"), "profile")
    figure = Figure(figsize=(5 * len(profiles), 7), layout="constrained")
    axes = figure.subplots(2, len(profiles), squeeze=False)
    for column, profile in enumerate(profiles):
        _draw_lines(axes[0][column], rows, profile, "cpu_ms_per_clip")
        _draw_lines(axes[1][column], rows, profile, "kb_read_per_clip")
        axes[0][column].set(title=f"{profile}, {FOUR.name}", ylabel="processor ms per clip", ylim=(0, None))
        axes[1][column].set(xlabel="length of the file", ylabel="kB read per clip", yscale="log")
    axes[0][0].legend(fontsize=7)
    return figure


def _draw_lines(axis: Axes, rows: list[Row], profile: str, column: str) -> None:
    found = select(rows, "file", profile=profile)
    seconds = {row["repeats"]: row["seconds"] for row in found}
    for decoder in names(found, "decoder"):
        own = [row for row in found if row["decoder"] == decoder and row[column] is not None]
        means = mean_by_length(own, column)
        axis.plot([seconds[n] for n in means], list(means.values()), "o-", label=decoder)
    axis.set_xscale("log")
    axis.set_xticks(list(seconds.values()), [_length_name(s) for s in seconds.values()])
    axis.minorticks_off()


BENCHMARK = Benchmark("file_length", tables, draw, REQUIREMENT)


def main() -> None:
    parser = parser_of(__doc__)
    add_video_options(parser)
    parser.add_argument("--profiles", nargs="+", choices=list(PROFILES), default=Bench.profiles)
    parser.add_argument(
        "--repeats", type=int, nargs="+", default=Bench.repeats, help="of a chunk, for each file"
    )
    parser.add_argument("--clips", type=int, default=Bench.clips, help="per file")
    parser.add_argument("--rounds", type=int, default=Bench.rounds)
    options = parser.parse_args()
    status = None if options.report else rerun_with_pyav_libraries("benchmarks.decode.file_length")
    if status is not None:
        sys.exit(status)
    repeats = tuple(sorted({1, *options.repeats}))
    bench = Bench(tuple(options.profiles), repeats, clips=options.clips, rounds=options.rounds)
    measure_videos(
        BENCHMARK,
        options,
        lambda videos, folder: run(write_chunks(videos, folder, bench.profiles), folder, bench),
    )


if __name__ == "__main__":
    main()
