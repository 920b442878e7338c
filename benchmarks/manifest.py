"""A manifest of 35,000,000 clips: time and memory to open, order, read and plan it; and to build one.

python -m benchmarks.manifest [--samples 35000000] [--chunks 880000] [--build-rows N [N ...]] [--folder DIR]

The default corpus takes about 6 GB of disk while it runs. Linux only: memory is read from /proc.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa

from avion_dali.contracts import ChunkRef
from avion_dali.data.manifest import FORMAT_VERSION, INDEX_FILE, Chunk, IndexWriter, Manifest
from avion_dali.data.order import epoch_order
from avion_dali.data.planner import ClipRules, Planner
from avion_dali.data.rows import CHUNK_SCHEMA, SAMPLE_SCHEMA
from avion_dali.data.tables import ROWS_PER_BATCH
from avion_dali.datasets.building import REJECTED_FILE, BuildSettings, ManifestBuild, Rejections
from avion_dali.datasets.captions import annotation_rows
from benchmarks.machine import Row, machine_facts, print_rows, process_memory_mb, write_result

CHUNK_SECONDS, FPS = 15.0, 30
CHUNKS_PER_VIDEO = 100
READS, PLANS, BATCH = 10_000, 100_000, 256
BUILD_VIDEOS = 200
INDEX_BYTES_PER_CHUNK = 2_700
REQUIREMENT = {"open_s_below": 1.0, "start_s_below": 30.0, "plans_per_s_one_core_above": 20_000}
_TEXTS = pa.array([f"#C C puts down the object {i} beside the other one" for i in range(5_000)])
_VERBS = pa.array([f"verb_{i}" for i in range(100)])
_NOUNS = pa.array([f"noun_{i}" for i in range(500)])
_WORDS = (
    "puts",
    "picks",
    "cuts",
    "washes",
    "opens",
    "the",
    "knife",
    "onion",
    "pan",
    "board",
    "hand",
    "left",
    "door",
)


def write_synthetic_manifest(folder: Path, *, samples: int, chunks: int) -> None:
    """Write a manifest as `write_manifest` would, but column by column: rows as objects would take minutes."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    _write(folder / "chunks.arrow", CHUNK_SCHEMA, (_chunk_columns(a, b) for a, b in _ranges(chunks)))
    first = np.sort(rng.integers(0, chunks, size=samples))
    blocks = (_sample_columns(first[a:b], chunks, rng) for a, b in _ranges(samples))
    _write(folder / "samples.arrow", SAMPLE_SCHEMA, blocks)
    index_bytes = chunks * INDEX_BYTES_PER_CHUNK
    with (folder / INDEX_FILE).open("wb") as file:
        file.truncate(index_bytes)  # of zeros: only decode workers read it
    facts = {"chunk_root": "/data/chunks", "num_chunks": chunks, "num_samples": samples, "fingerprint": 0}
    facts["index_bytes"] = index_bytes
    (folder / "manifest.json").write_text(json.dumps({"format_version": FORMAT_VERSION, **facts}))


def _ranges(rows: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + ROWS_PER_BATCH, rows)) for start in range(0, rows, ROWS_PER_BATCH))


def _write(path: Path, schema: pa.Schema, blocks: Iterator[dict[str, pa.Array]]) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for columns in blocks:
            arrays = [pa.array(columns[field.name], field.type) for field in schema]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))


def _chunk_columns(first: int, stop: int) -> dict[str, object]:
    rows = np.arange(first, stop)
    video, place = rows // CHUNKS_PER_VIDEO, rows % CHUNKS_PER_VIDEO
    pairs = list(zip(video.tolist(), place.tolist(), strict=True))
    count = len(rows)
    return {
        "path": [f"{v:08x}-4a1b-4c7d.mp4/{p * int(CHUNK_SECONDS)}.mp4" for v, p in pairs],
        "video": [f"{v:08x}-4a1b-4c7d.mp4" for v, _ in pairs],
        "start_s": place * CHUNK_SECONDS,
        "fps_num": np.full(count, FPS),
        "fps_den": np.ones(count, np.int32),
        "num_frames": np.full(count, int(CHUNK_SECONDS * FPS)),
        "width": np.full(count, 512),
        "height": np.full(count, 288),
        "size_bytes": 1_500_000 + rows,
        "codec": ["h264"] * count,
        "frame_times": [None] * count,
        "index_offset": rows * INDEX_BYTES_PER_CHUNK,
        "index_bytes": np.full(count, INDEX_BYTES_PER_CHUNK),
        "last_s": np.zeros(count),
        "pixel_aspect": np.ones(count),
    }


def _sample_columns(first_chunk: np.ndarray, chunks: int, rng: np.random.Generator) -> dict[str, object]:
    """One-second spans; one in twenty crosses into the next chunk of its video."""
    count = len(first_chunk)
    place = first_chunk % CHUNKS_PER_VIDEO
    has_next = (place + 1 < CHUNKS_PER_VIDEO) & (first_chunk + 1 < chunks)
    crosses = has_next & (rng.random(count) < 0.05)
    inside = np.where(crosses, CHUNK_SECONDS - 0.5, rng.uniform(0, CHUNK_SECONDS - 1, count))
    start = place * CHUNK_SECONDS + inside
    return {
        "first_chunk": first_chunk,
        "num_chunks": 1 + crosses,
        "start_s": start,
        "end_s": start + 1.0,
        "texts": _lists(_drawn(_TEXTS, count, rng), (1, 1), count, rng),
        "tokens": _lists(_lists(_token_ids(count, rng), (8, 20), count, rng), (1, 1), count, rng),
        "verb": _drawn(_VERBS, count, rng),
        "nouns": _lists(_drawn(_NOUNS, 2 * count, rng), (1, 2), count, rng),
        "label": np.full(count, -1),
    }


def _token_ids(count: int, rng: np.random.Generator) -> pa.Array:
    return pa.array(rng.integers(1, 49_000, 20 * count, dtype=np.uint16))


def _drawn(words: pa.Array, count: int, rng: np.random.Generator) -> pa.Array:
    return words.take(pa.array(rng.integers(0, len(words), count)))


def _lists(values: pa.Array, lengths: tuple[int, int], count: int, rng: np.random.Generator) -> pa.Array:
    """Lists of low..high consecutive values each."""
    low, high = lengths
    offsets = np.concatenate([[0], np.cumsum(rng.integers(low, high + 1, count))]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values[: offsets[-1]])


def measure(folder: str, cache: str) -> Row:
    """Open and read a manifest; to be called in a fresh process.

    Args:
        folder: the manifest.
        cache: whether its pages are in memory (`warm`) or must come from the disk (`cold`).
    """
    if cache == "cold":
        drop_cached_pages(Path(folder))
    before = process_memory_mb()
    start = time.perf_counter()
    manifest = Manifest(folder)
    opened_s = time.perf_counter() - start
    growth = {"open": _growth_mb(before)}
    order = epoch_order(manifest.num_samples, seed=0, epoch=0)
    order_s = time.perf_counter() - start - opened_s
    growth["order"] = _growth_mb(before)
    planner = Planner(manifest, ClipRules(num_frames=4, frame_size=224, training=True), seed=0)
    for row in order[:BATCH].tolist():
        planner.plan(row, epoch=0)
    started_s = time.perf_counter() - start
    reads_per_s = _reads_per_s(manifest)
    growth["read"] = _growth_mb(before)
    rates = _plan_rates(planner, order[BATCH : BATCH + PLANS].tolist())
    growth["plan"] = _growth_mb(before)
    return {
        "page_cache": cache,
        "samples": manifest.num_samples,
        "chunks": manifest.num_chunks,
        "disk_mb": round(sum(p.stat().st_size for p in Path(folder).iterdir()) / 1e6, 1),
        "open_s": round(opened_s, 4),
        "start_s": round(started_s, 2),
        "private_memory_before_mb": before["RssAnon"],
        **{f"private_memory_growth_{name}_mb": value for name, value in growth.items()},
        "shared_pages_touched_mb": round(process_memory_mb()["RssFile"] - before["RssFile"], 1),
        "random_reads": READS,
        "reads_per_s": round(reads_per_s),
        **rates,
        "epoch_order_s": round(order_s, 3),
        "epoch_order_mb": round(order.nbytes / 1e6, 1),
    }


def _growth_mb(before: dict[str, float]) -> float:
    return round(process_memory_mb()["RssAnon"] - before["RssAnon"], 1)


def _reads_per_s(manifest: Manifest) -> float:
    rows = np.random.default_rng(1).integers(0, manifest.num_samples, READS).tolist()
    start = time.perf_counter()
    for row in rows:
        sample = manifest.sample(row)
        for i in range(sample.num_chunks):
            manifest.chunk(sample.first_chunk + i)
    return READS / (time.perf_counter() - start)


def _plan_rates(planner: Planner, rows: list[int]) -> Row:
    """Training requests planned by one process in a second, and in a second of its processor time.

    Args:
        planner: plans the clips.
        rows: the next rows of the epoch's order, so that no row was planned before.
    """
    start, busy = time.perf_counter(), time.process_time()
    for row in rows:
        planner.plan(row, epoch=0)
    wall_s, busy_s = time.perf_counter() - start, time.process_time() - busy
    return {
        "plans": len(rows),
        "plans_per_s_one_core": round(len(rows) / wall_s),
        "plans_per_cpu_s": round(len(rows) / busy_s),
    }


def measure_build(folder: str, num_rows: int) -> Row:
    """Build a manifest from a CSV of so many rows, a tenth of them unusable; call it in a fresh process.

    The chunks are not probed: what is measured grows with rows only.

    Args:
        folder: where to build.
        num_rows: rows of the CSV.
    """
    table = Path(folder) / "rows.csv"
    _write_annotations(table, num_rows)
    chunks = [
        Chunk(ChunkRef(f"/data/{video}/{15 * k}.mp4", 1, 450, 512, 288), video, 15.0 * k, Fraction(30), "h264")
        for video in (f"{v:04d}" for v in range(BUILD_VIDEOS))
        for k in range(CHUNKS_PER_VIDEO)
    ]
    settings = BuildSettings(Path("/data"), Path(folder) / "m", skip_bad_rows=True)
    with IndexWriter(settings.output) as index:
        rejections = Rejections(settings.output / REJECTED_FILE)
        build = ManifestBuild(settings, chunks, [], rejections, index)
        build.tokens("loads the tokenizer")
        before = process_memory_mb()
        start = time.perf_counter()
        report = build.finish(build.place(annotation_rows(table, None)), source="rows.csv")
        rejections.close()
    return {
        "built_rows": num_rows,
        "samples": report.num_samples,
        "rejected": sum(report.rejected.values()),
        "rows_per_s": round(num_rows / (time.perf_counter() - start)),
        "peak_private_memory_growth_mb": round(
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6 - before["VmRSS"], 1
        ),
    }


def _write_annotations(path: Path, num_rows: int) -> None:
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        file.write("video,start,end,text\n")
        for _ in range(num_rows):
            start = rng.uniform(0, CHUNKS_PER_VIDEO * CHUNK_SECONDS * 1.1)  # the last tenth lies past the end
            words = " ".join(_WORDS[i] for i in rng.integers(0, len(_WORDS), 8))
            file.write(f"{rng.integers(BUILD_VIDEOS):04d},{start:.3f},{start + 1:.3f},#C C {words}\n")


def drop_cached_pages(folder: Path) -> None:
    """Ask the kernel to forget the files' pages, as after a restart. Linux only."""
    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def in_fresh_process(function: Callable[..., Row], *arguments: object) -> Row:
    """Run a measurement in a spawned process, as another rank would start."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=35_000_000)
    parser.add_argument("--chunks", type=int, default=880_000)
    parser.add_argument("--build-rows", type=int, nargs="*", default=[400_000, 1_200_000])
    parser.add_argument("--folder", type=Path, help="where the manifest is built (default: a temporary folder)")
    options = parser.parse_args()
    machine = machine_facts()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        write_synthetic_manifest(Path(folder), samples=options.samples, chunks=options.chunks)
        rows = [in_fresh_process(measure, folder, cache) for cache in ("cold", "warm")]
    for num_rows in options.build_rows:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            rows.append(in_fresh_process(measure_build, folder, num_rows))
    print_rows(rows)
    print(write_result("manifest", rows, machine=machine, baseline=REQUIREMENT))


if __name__ == "__main__":
    main()
