"""Damaged files read by the worker pool: detected and undetected damage, and memory of workers.

python -m benchmarks.studies.faults [--files 10080] [--clips 20000]

10,000 damaged copies of small H.264, HEVC, VP9 and AV1 videos, each read with its packet index and without;
damaged copies of the indices; after each a clip of a sound file. Every clip is compared with the undamaged
decode. Then the damaged copies are indexed as they are, and 20,000 clips go through one worker.
Linux only: memory is read from /proc.
"""

from __future__ import annotations

import multiprocessing
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from avion_dali.contracts import ClipRequest, DecodeError
from avion_dali.inspection.checking import supervise
from avion_dali.loading.pool import WorkerPool
from avion_dali.loading.ring import SharedRing
from benchmarks.machine import process_memory_mb
from benchmarks.media import SCENES, write_video
from benchmarks.report import Benchmark, Row, every_row, markdown, parser_of, select, working_folder
from benchmarks.studies import mutations

SIZE, FRAMES = (96, 64), 60
WORKERS, CLIP_TIMEOUT_S = 2, 3.0
X264 = {"preset": "superfast", "crf": "20"}
BALANCED = "b-pyramid=none:bframes=7:keyint=32:min-keyint=32:scenecut=0:b-adapt=0:open-gop=0"
X265 = "log-level=none:pools=none:frame-threads=1:keyint=24:bframes=3:rc-lookahead=5"
VP9 = {"deadline": "realtime", "cpu-used": "8", "g": "30", "crf": "20", "b": "0"}
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}
# FFmpeg's names of container and encoder, options of the encoder and of the muxer.
KINDS: dict[str, tuple[str, str, dict[str, str], dict[str, str]]] = {
    "h264": ("mp4", "libx264", X264 | {"x264-params": BALANCED}, {}),
    "h264 compat": ("mp4", "libx264", {"preset": "medium", "crf": "23"}, {}),
    "h264 open GOP": ("mp4", "libx264", X264 | {"x264-params": "open-gop=1:bframes=3:keyint=15"}, {}),
    "h264 fragments": ("mp4", "libx264", X264 | {"g": "20"}, FRAGMENTS),
    "h264 MPEG-TS": ("mpegts", "libx264", X264 | {"g": "20"}, {}),
    "hevc": ("mp4", "libx265", {"preset": "ultrafast", "crf": "20", "x265-params": X265}, {}),
    "vp9": ("webm", "libvpx-vp9", VP9, {}),
    "av1": ("mp4", "libsvtav1", {"preset": "12", "crf": "40", "g": "24"}, {}),
}
OUTCOMES = ("right", "wrong", "corrupt", "changed", "missing", "timeout", "worker-died")
INDEXED_AS = ("refused", "error", "agree", "disagree", "crashed", "timeout")
REQUIREMENT = {"wrong_with_index": 0, "sound_clips_not_right": 0, "memory_growth_mb_below": 5.0}
WARM_CLIPS, MEMORY_STEPS, PLACES = 1_000, 10, 16


def write_sources(folder: Path) -> list[mutations.Source]:
    """Write one small video per codec, and its index."""
    sources = []
    for codec, (ending, encoder, options, muxing) in KINDS.items():
        path = folder / f"{codec.replace(' ', '-')}.{ending}"
        encoding = {"codec": encoder, "options": options, "muxing": muxing}
        write_video(path, SCENES["hand_held"], frames=FRAMES, size=SIZE, **encoding)
        sources.append(mutations.open_source(codec, path))
    return sources


def damaged_clips(sources: list[mutations.Source], folder: Path, files: range) -> Iterator[mutations.Trial]:
    """Clips of damaged files in turn over kinds and codecs, and of files with damaged indices."""
    kinds = list(mutations.KINDS)
    for number in files:
        source, kind = sources[number % len(sources)], kinds[number // len(sources) % len(kinds)]
        copies = folder / source.name
        copies.mkdir(exist_ok=True)
        yield from mutations.trials(source, copies, kind, seed=number)
        if kind in mutations.INDEX_KINDS and source.ref.index:
            yield from mutations.index_trials(source, folder, kind, seed=number)


def damage_rows(sources: list[mutations.Source], folder: Path, files: range) -> list[Row]:
    """Read all damaged clips; one row for each codec, kind of damage, and way of finding packets."""
    counts: dict[tuple[str, ...], Counter[str]] = {}
    trials = tqdm(damaged_clips(sources, folder, files), desc="clips", unit="")
    for trial, outcome, _ in mutations.outcomes(trials, workers=WORKERS, clip_timeout_s=CLIP_TIMEOUT_S):
        counts.setdefault(trial.labels, Counter())[outcome] += 1
    return [
        {"measured": "damage", "codec": codec, "kind": kind, "packets_from": way, "clips": found.total()}
        | {outcome: found[outcome] for outcome in OUTCOMES}
        for (codec, kind, way), found in sorted(counts.items())
    ]


def indexing_rows(sources: list[mutations.Source], folder: Path) -> list[Row]:
    """Index the damaged copies of each video as if they were sound, and compare the readers."""
    rows = []
    for source in sources:
        copies = sorted((folder / source.name).glob(f"*{Path(source.ref.path).suffix}"))
        read = supervise(mutations.indexed_as, copies, jobs=WORKERS, timeout_s=60)
        found = Counter(outcome if isinstance(outcome, str) else outcome.kind for _, outcome in read)
        facts: Row = {"measured": "indexed over damage", "codec": source.name, "files": found.total()}
        rows.append(facts | {outcome: found[outcome] for outcome in INDEXED_AS})
    return rows


def summary(rows: list[Row], files: int, seconds: float) -> list[Row]:
    """For each codec and way: what became of all damaged clips, and what share of hit ones passes as good."""
    found = []
    for codec in KINDS:
        for way in ("index", "damaged index", "no index"):
            mine = [
                row
                for row in rows
                if (row["codec"], row["packets_from"]) == (codec, way) and row["kind"] in mutations.KINDS
            ]
            total: Row = {name: sum(row[name] for row in mine) for name in ("clips", *OUTCOMES)}
            hit = total["clips"] - total["right"]
            share = round(total["wrong"] / hit, 4) if hit else 0.0
            found.append(
                {"measured": "summary", "codec": codec, "packets_from": way}
                | total
                | {"unnoticed_share_of_clips_hit": share}
            )
    sound = [row for row in rows if row["kind"] == "sound"]
    overall = {
        "measured": "all",
        "damaged_files": files,
        "clips": sum(row["clips"] for row in rows),
        "seconds": round(seconds, 1),
        "wrong_with_index": sum(r["wrong"] for r in rows if r["packets_from"] != "no index"),
        "timeouts": sum(row["timeout"] for row in rows),
        "workers_died": sum(row["worker-died"] for row in rows),
        "sound_clips": sum(row["clips"] for row in sound),
        "sound_clips_not_right": sum(row["clips"] - row["right"] for row in sound),
    }
    return [*found, overall]


def mixed_requests(sources: list[mutations.Source]) -> list[ClipRequest]:
    """Clips through the index, some through the container, and a few that fail."""
    rng = np.random.default_rng(0)
    requests = []
    for source in sources:
        bad = replace(source.ref, size_bytes=1)
        refs = [source.ref] * 14 + [replace(source.ref, index=None)] * 4 + [bad]
        requests += [source.request(source.random_ids(rng), ref) for ref in refs]
    return requests


def read_clips(pool: WorkerPool, ring: SharedRing, requests: Iterable[ClipRequest]) -> int:
    """Read clips with all places of the ring in use; returns the number of unreadable clips."""
    failed, pending = 0, deque[Future[float]]()
    waiting = iter(requests)
    while True:
        for place, request in enumerate(islice(waiting, PLACES)):
            pending.append(mutations.schedule(pool, ring, request, place))
        if not pending:
            return failed
        while pending:
            try:
                pending.popleft().result()
            except DecodeError:
                failed += 1


def memory_row(sources: list[mutations.Source], clips: int) -> Row:
    """Private memory of one worker over many clips."""
    requests = mixed_requests(sources)
    shape = (PLACES, 1, mutations.FRAMES_PER_CLIP, mutations.FRAME_SIZE, mutations.FRAME_SIZE, 3)
    rng = np.random.default_rng(1)
    private_mb, failed = [], 0
    with WorkerPool(workers=1, timeout_s=CLIP_TIMEOUT_S) as pool, closing(SharedRing(1, shape)) as ring:
        counts = [WARM_CLIPS, *([(clips - WARM_CLIPS) // MEMORY_STEPS] * MEMORY_STEPS)]
        for count in tqdm(counts, desc="memory", unit="step"):
            order = rng.integers(0, len(requests), count).tolist()
            failed += read_clips(pool, ring, (requests[i] for i in order))
            (worker,) = multiprocessing.active_children()
            private_mb.append(process_memory_mb(worker.pid or "self")["RssAnon"])
    return {
        "measured": "memory of one worker",
        "clips": sum(counts),
        "of_these_failed": failed,
        "private_mb_after_clips": dict(zip(np.cumsum(counts).tolist(), private_mb, strict=True)),
        "growth_after_warm_up_mb": round(private_mb[-1] - private_mb[0], 1),
    }


def tables(rows: list[Row]) -> str:
    """The summary, then the other facts."""
    lines = []
    for row in select(rows, "summary"):
        errors = row["clips"] - row["right"] - row["wrong"]
        shown = [row["codec"], row["packets_from"], row["clips"], row["right"], row["wrong"], errors]
        lines.append([*shown, f"{row['unnoticed_share_of_clips_hit']:.1%}"])
    heads = ("codec", "packets from", "clips", "right", "wrong", "errors", "share of damage taken for good")
    others = [row for row in rows if row["measured"] not in ("summary", "damage")]
    return markdown(heads, lines) + "\n\n" + every_row(others)


BENCHMARK = Benchmark("faults", tables, requirement=REQUIREMENT)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--files", type=int, default=10_080, help="damaged files (default: %(default)s)")
    parser.add_argument("--clips", type=int, default=20_000, help="clips of the memory test (%(default)s)")
    options = parser.parse_args()

    def measure() -> list[Row]:
        with working_folder(None) as folder:
            sources = write_sources(folder)
            start = time.perf_counter()
            rows = damage_rows(sources, folder, range(options.files))
            rows += summary(rows, options.files, time.perf_counter() - start)
            rows += indexing_rows(sources, folder)
            return [*rows, memory_row(sources, options.clips)]

    BENCHMARK.run(options, measure)


if __name__ == "__main__":
    main()
