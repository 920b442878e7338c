"""A manifest of 35,000,000 clips: time and memory to open, order and plan it.

python -m benchmarks.studies.manifest [--samples 35000000] [--chunks 880000] [--folder DIR]

The default corpus takes about 6 GB of disk while it runs. Linux only: memory is read from /proc.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from avion_dali.data.manifest import FORMAT_VERSION, INDEX_FILE, Manifest
from avion_dali.data.order import epoch_order
from avion_dali.data.planner import ClipRules, Planner
from avion_dali.data.rows import CHUNK_SCHEMA, SAMPLE_SCHEMA
from avion_dali.data.tables import ROWS_PER_BATCH
from benchmarks.machine import in_fresh_process, process_memory_mb
from benchmarks.report import Benchmark, Row, every_row, parser_of

CHUNK_SECONDS, FPS = 15.0, 30
CHUNKS_PER_VIDEO = 100
PLANS, BATCH = 100_000, 256
INDEX_BYTES_PER_CHUNK = 2_700
REQUIREMENT = {"open_s_below": 1.0, "start_s_below": 30.0, "plans_per_s_one_core_above": 20_000}
_TEXTS = pa.array([f"#C C puts down the object {i} beside the other one" for i in range(5_000)])
_VERBS = pa.array([f"verb_{i}" for i in range(100)])
_NOUNS = pa.array([f"noun_{i}" for i in range(500)])


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
    """Open and read a manifest; to be called in a fresh process."""
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
    rates = _plan_rates(planner, order[BATCH : BATCH + PLANS].tolist())
    growth["plan"] = _growth_mb(before)
    return {
        "measured": "manifest",
        "page_cache": cache,
        "samples": manifest.num_samples,
        "chunks": manifest.num_chunks,
        "disk_mb": round(sum(p.stat().st_size for p in Path(folder).iterdir()) / 1e6, 1),
        "open_s": round(opened_s, 4),
        "start_s": round(started_s, 2),
        "private_memory_before_mb": before["RssAnon"],
        **{f"private_memory_growth_{name}_mb": value for name, value in growth.items()},
        "shared_pages_touched_mb": round(process_memory_mb()["RssFile"] - before["RssFile"], 1),
        **rates,
        "epoch_order_s": round(order_s, 3),
        "epoch_order_mb": round(order.nbytes / 1e6, 1),
    }


def _growth_mb(before: dict[str, float]) -> float:
    return round(process_memory_mb()["RssAnon"] - before["RssAnon"], 1)


def _plan_rates(planner: Planner, rows: list[int]) -> Row:
    """Training requests planned by one process in a second."""
    start = time.perf_counter()
    for row in rows:
        planner.plan(row, epoch=0)
    return {"plans": len(rows), "plans_per_s_one_core": round(len(rows) / (time.perf_counter() - start))}


def drop_cached_pages(folder: Path) -> None:
    """Ask the kernel to forget the files' pages, as after a restart. Linux only."""
    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


BENCHMARK = Benchmark("manifest", every_row, requirement=REQUIREMENT)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--samples", type=int, default=35_000_000)
    parser.add_argument("--chunks", type=int, default=880_000)
    parser.add_argument("--folder", type=Path, help="where the temporary manifest is built")
    options = parser.parse_args()

    def measure_all() -> list[Row]:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            write_synthetic_manifest(Path(folder), samples=options.samples, chunks=options.chunks)
            return [in_fresh_process(measure, folder, cache) for cache in ("cold", "warm")]

    BENCHMARK.run(options, measure_all)


if __name__ == "__main__":
    main()
