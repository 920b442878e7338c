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
from avion_dali.data.classes import RELEVANCY_FILE, write_relevancy
from avion_dali.data.manifest import CHUNKS_FILE, ROWS_PER_BATCH, SAMPLE_SCHEMA, SAMPLES_FILE, Manifest
from avion_dali.data.manifest_files import (
    INFO_BEFORE_REPAIR,
    INFO_FILE,
    ManifestFiles,
    files_of,
    new_build,
    replace_info,
    tables_fingerprint,
    write_info,
)
from avion_dali.data.tables import MappedTable, TableWriter
from avion_dali.files import atomic_write_text

BAD_CHUNKS_FILE = "bad_chunks.jsonl"
_REMOVED = "removed_samples"  # the key in manifest.json that tells a repaired manifest
# Where repairs of manifests of format 3 kept the files of before.
_KEPT_BEFORE = {SAMPLES_FILE: "samples.before-repair.arrow", RELEVANCY_FILE: "relevancy.before-repair.npy"}


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

    The fingerprint follows the rows, so a run that began with other rows is not resumed by mistake. Runs that
    have the manifest open go on with the rows they opened. The new tables lie beside the old ones, which
    `manifest.before-repair.json` names; an interruption leaves the old manifest or the new one.

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
    before = _info_before(folder) if _REMOVED in manifest.info else None
    original = before or manifest.info
    files = ManifestFiles(folder, original)
    source = MappedTable(
        files.path(SAMPLES_FILE), rows_per_batch=ROWS_PER_BATCH, checksums=files.checksums(SAMPLES_FILE)
    )
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
    undo = ""
    if touched:
        with new_build(folder, "repair") as build:
            ends = _write_samples(build / SAMPLES_FILE, _sorted_out(source, bad_before_N))
            if manifest.info.get("num_captions"):
                grades_RC = np.load(files.intact(RELEVANCY_FILE), mmap_mode="r")
                write_relevancy(build / RELEVANCY_FILE, grades_RC, np.flatnonzero(is_good_N))
            fingerprint = tables_fingerprint(files.path(CHUNKS_FILE), build / SAMPLES_FILE)
            info = {**manifest.info, "num_samples": kept, "fingerprint": fingerprint, _REMOVED: removed}
            new_files = files_of(folder, build, ends={SAMPLES_FILE: ends})
            info["files"] = {**original.get("files", {}), **new_files}
            _write_bad_chunks(folder / BAD_CHUNKS_FILE, bad_rows, bad_chunks=bad_chunks)
            write_info(folder / INFO_BEFORE_REPAIR, original)
            replace_info(folder, info)
            undo = _undo_command(folder)
    elif before is not None:
        # The chunks may have moved since.
        with new_build(folder):
            replace_info(folder, {**before, "chunk_root": manifest.info["chunk_root"]})
            for name in (INFO_BEFORE_REPAIR, BAD_CHUNKS_FILE):
                (folder / name).unlink(missing_ok=True)
    return RepairReport(kept, removed, undo)


def _info_before(folder: Path) -> dict[str, Any] | None:
    """Return the content of `manifest.json` before any repair; None when it is not there any more."""
    try:
        info: dict[str, Any] = json.loads((folder / INFO_BEFORE_REPAIR).read_text())
    except (OSError, ValueError):
        return None
    kept = {name: {"path": old} for name, old in _KEPT_BEFORE.items() if (folder / old).exists()}
    files = {**kept, **info.get("files", {})}
    is_whole = ManifestFiles(folder, {"files": files}).path(SAMPLES_FILE).exists()
    return {**info, **({"files": files} if files else {})} if is_whole else None


def _rows_of(manifest: Manifest, bad_chunks: Mapping[str, Sequence[str]]) -> dict[int, str]:
    """Return the bad chunks' paths by row."""
    rows: dict[int, str] = {}
    batches = manifest.table(CHUNKS_FILE).batches()
    paths = (path for batch in batches for path in batch["path"].to_pylist())
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


def _sorted_out(table: MappedTable, bad_before_N: np.ndarray) -> Iterator[tuple[pa.RecordBatch, np.ndarray]]:
    """Yield the batches of a sample table, and which of their rows touch no bad chunk."""
    for batch in table.batches():
        first_R = batch["first_chunk"].to_numpy()
        end_R = first_R + batch["num_chunks"].to_numpy()
        yield batch, bad_before_N[end_R] == bad_before_N[first_R]


def _write_samples(path: Path, batches: Iterable[tuple[pa.RecordBatch, np.ndarray]]) -> list[int]:
    """Write the good rows, in batches of `ROWS_PER_BATCH` again: rows are found by division."""
    waiting = SAMPLE_SCHEMA.empty_table()
    with TableWriter(path, SAMPLE_SCHEMA) as writer:
        for batch, is_good_R in batches:
            good = pa.Table.from_batches([batch.filter(pa.array(is_good_R))])
            waiting = pa.concat_tables([waiting, good])
            if len(waiting) >= ROWS_PER_BATCH:
                _write_batch(writer, waiting.slice(0, ROWS_PER_BATCH))
                waiting = waiting.slice(ROWS_PER_BATCH)
        if len(waiting):
            _write_batch(writer, waiting)
    return writer.ends


def _write_batch(writer: TableWriter, rows: pa.Table) -> None:
    (batch,) = rows.combine_chunks().to_batches()
    writer.write(batch)


def _write_bad_chunks(path: Path, rows: Mapping[int, str], *, bad_chunks: Mapping[str, Sequence[str]]) -> None:
    lines = [{"row": row, "path": chunk, "kinds": list(bad_chunks[chunk])} for row, chunk in rows.items()]
    atomic_write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _undo_command(folder: Path) -> str:
    before, now, bad = (
        shlex.quote(str(folder / name)) for name in (INFO_BEFORE_REPAIR, INFO_FILE, BAD_CHUNKS_FILE)
    )
    return f"mv {before} {now} && rm -r {bad} {shlex.quote(str(folder))}/repair-*"
