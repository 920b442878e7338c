"""Removes the clips of bad chunks from a manifest.

The chunk table does not change, so chunks keep their row numbers; rows are removed from the sample table and
from stored relevancies. The original files are kept in the same folder, and later repairs start from them, so
the clips of restored chunks return.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from avion_dali.contracts import UserError
from avion_dali.data.classes import RELEVANCY_FILE, sha256_of, write_relevancy
from avion_dali.data.manifest import ROWS_PER_BATCH, SAMPLE_SCHEMA, Manifest, tables_fingerprint
from avion_dali.files import partial_path, put_in_place, whole_or_absent

BAD_CHUNKS_FILE = "bad_chunks.jsonl"
_CHUNKS, _SAMPLES, _INFO = "chunks.arrow", "samples.arrow", "manifest.json"
_SAMPLES_BEFORE, _INFO_BEFORE = "samples.before-repair.arrow", "manifest.before-repair.json"
_RELEVANCY_BEFORE = "relevancy.before-repair.npy"
# Files that a repair changes, with the names for the originals; manifest.json is moved first.
_KEPT = {_INFO: _INFO_BEFORE, _SAMPLES: _SAMPLES_BEFORE, RELEVANCY_FILE: _RELEVANCY_BEFORE}
_REMOVED = "removed_samples"  # the key in manifest.json that marks a repaired manifest


@dataclass(frozen=True, slots=True)
class RepairReport:
    """Result of a repair.

    Args:
        num_samples: clips in the repaired manifest.
        removed: clips removed from it.
        undo: shell command that restores the original manifest; empty if no clip is removed.
    """

    num_samples: int
    removed: int
    undo: str


def repair_manifest(folder: str | Path, bad_chunks: Mapping[str, Sequence[str]]) -> RepairReport:
    """Rewrite a manifest without the clips that touch bad chunks.

    The fingerprint depends on the rows, so a run that started with other rows is not resumed by mistake. Runs
    that have the manifest open continue with the rows that they opened. The old files are replaced at the very
    end; an interruption at that point leaves no `manifest.json` rather than one that does not match the rows.

    Args:
        folder: the manifest.
        bad_chunks: kinds of errors by path of the chunk, as `Manifest.chunk` returns the path.

    Raises:
        UserError: when the folder is not a manifest, a path is not one of its chunks, or no clip would be left.
    """
    folder = Path(folder)
    manifest = Manifest(folder)
    bad_rows = _rows_of(manifest, bad_chunks)
    bad_before_N = _count_before(bad_rows, manifest.num_chunks)
    kept_files = {name: old for name, old in _KEPT.items() if name != RELEVANCY_FILE or _is_graded(manifest)}
    is_repaired = _REMOVED in manifest.info and all((folder / old).exists() for old in kept_files.values())
    source = folder / (_SAMPLES_BEFORE if is_repaired else _SAMPLES)
    is_good_N = np.concatenate(
        [np.zeros(0, bool), *(is_good_R for _, is_good_R in _sorted_out(source, bad_before_N))]
    )
    kept, touched = int(is_good_N.sum()), int((~is_good_N).sum())
    if touched and not kept:
        raise UserError(
            f"{folder}: no clip is left without the {len(bad_rows)} bad chunks, so nothing was changed; check "
            f"that the chunks are in {manifest.chunk_root}"
        )
    removed = manifest.num_samples + manifest.info.get(_REMOVED, 0) - kept
    if touched:
        _write_bad_chunks(folder / BAD_CHUNKS_FILE, bad_rows, bad_chunks=bad_chunks)
        partial = partial_path(folder / _SAMPLES)
        _write_samples(partial, _sorted_out(source, bad_before_N))
        fingerprint = tables_fingerprint(folder / _CHUNKS, partial)
        info = {**manifest.info, "num_samples": kept, "fingerprint": fingerprint, _REMOVED: removed}
        partials = {_SAMPLES: partial}
        if _is_graded(manifest):
            partials[RELEVANCY_FILE] = folder / "relevancy.good.npy"
            _write_grades(partials[RELEVANCY_FILE], folder, is_good_N=is_good_N, is_repaired=is_repaired)
            info["relevancy_sha256"] = sha256_of(partials[RELEVANCY_FILE])
        _swap(folder, partials, info=info, keep=() if is_repaired else kept_files)
    elif is_repaired:
        _restore(folder, kept_files, info=manifest.info)
    return RepairReport(kept, removed, _undo_command(folder, kept_files) if touched else "")


def _is_graded(manifest: Manifest) -> bool:
    return bool(manifest.info.get("num_captions"))


def _write_grades(path: Path, folder: Path, *, is_good_N: np.ndarray, is_repaired: bool) -> None:
    """Write the relevancies of the good rows."""
    source = folder / (_RELEVANCY_BEFORE if is_repaired else RELEVANCY_FILE)
    write_relevancy(path, np.load(source, mmap_mode="r"), np.flatnonzero(is_good_N))


def _rows_of(manifest: Manifest, bad_chunks: Mapping[str, Sequence[str]]) -> dict[int, str]:
    """Return the bad chunks' paths by row."""
    rows: dict[int, str] = {}
    paths = (path for batch in _batches(manifest.folder / _CHUNKS) for path in batch["path"].to_pylist())
    for row, path in enumerate(paths):
        full = os.path.join(manifest.chunk_root, path)
        if full in bad_chunks:
            rows[row] = full
    unknown = sorted(set(bad_chunks) - set(rows.values()))
    if unknown:
        raise UserError(f"{unknown[0]} is not a chunk of {manifest.folder}")
    return rows


def _count_before(bad_rows: Iterable[int], num_chunks: int) -> np.ndarray:
    """Return how many bad chunks come before each row, int64 (num_chunks + 1,)."""
    is_bad_N = np.zeros(num_chunks + 1, dtype=np.int64)
    is_bad_N[np.array(list(bad_rows), dtype=np.int64) + 1] = 1
    return np.cumsum(is_bad_N)


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(path)) as file, pa.ipc.open_file(file) as reader:
        yield from (reader.get_batch(number) for number in range(reader.num_record_batches))


def _sorted_out(path: Path, bad_before_N: np.ndarray) -> Iterator[tuple[pa.RecordBatch, np.ndarray]]:
    """Yield the batches of a sample table, each with a bool array that marks rows without bad chunks."""
    for batch in _batches(path):
        first_R = batch["first_chunk"].to_numpy()
        end_R = first_R + batch["num_chunks"].to_numpy()
        yield batch, bad_before_N[end_R] == bad_before_N[first_R]


def _write_samples(path: Path, batches: Iterable[tuple[pa.RecordBatch, np.ndarray]]) -> None:
    """Write the good rows in batches of exactly `ROWS_PER_BATCH`, since rows are found by division."""
    waiting = SAMPLE_SCHEMA.empty_table()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SAMPLE_SCHEMA) as writer:
        for batch, is_good_R in batches:
            good = pa.Table.from_batches([batch.filter(pa.array(is_good_R))])
            waiting = pa.concat_tables([waiting, good])
            if len(waiting) >= ROWS_PER_BATCH:
                writer.write_table(waiting.slice(0, ROWS_PER_BATCH).combine_chunks())
                waiting = waiting.slice(ROWS_PER_BATCH)
        if len(waiting):
            writer.write_table(waiting.combine_chunks())


def _swap(folder: Path, partials: Mapping[str, Path], *, info: dict[str, Any], keep: Iterable[str]) -> None:
    """Put new files in place; `manifest.json` is removed first and written last."""
    for name in keep:
        put_in_place(folder / name, folder / _KEPT[name])
    (folder / _INFO).unlink(missing_ok=True)
    for name, partial in partials.items():
        put_in_place(partial, folder / name)
    _write_info(folder, info)


def _restore(folder: Path, kept: Mapping[str, str], *, info: dict[str, Any]) -> None:
    """Restore the original files."""
    before = json.loads((folder / _INFO_BEFORE).read_text())
    (folder / _INFO).unlink()
    for name in kept:
        if name != _INFO:
            put_in_place(folder / _KEPT[name], folder / name)
    _write_info(folder, {**before, "chunk_root": info["chunk_root"]})  # the chunks may have been moved since
    for name in (_INFO_BEFORE, BAD_CHUNKS_FILE):
        (folder / name).unlink(missing_ok=True)


def _write_info(folder: Path, info: dict[str, Any]) -> None:
    with whole_or_absent(folder / _INFO) as partial:
        partial.write_text(json.dumps(info, indent=2) + "\n")


def _write_bad_chunks(path: Path, rows: Mapping[int, str], *, bad_chunks: Mapping[str, Sequence[str]]) -> None:
    lines = [{"row": row, "path": chunk, "kinds": list(bad_chunks[chunk])} for row, chunk in rows.items()]
    with whole_or_absent(path) as partial:
        partial.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _undo_command(folder: Path, kept: Mapping[str, str]) -> str:
    def quoted(name: str) -> str:
        return shlex.quote(str(folder / name))

    names = [*(name for name in kept if name != _INFO), _INFO]
    moves = [f"mv {quoted(_KEPT[name])} {quoted(name)}" for name in names]
    return " && ".join([*moves, f"rm {quoted(BAD_CHUNKS_FILE)}"])
