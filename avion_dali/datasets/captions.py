"""The generic annotation file: CSV or JSON lines with video, start, end, text and optional verb, noun."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from avion_dali.contracts import UserError
from avion_dali.cores import available_cores
from avion_dali.data.manifest import IndexWriter, Sample, write_manifest
from avion_dali.data.scanning import UnusableChunk, scan_chunks
from avion_dali.data.text import clip_tokenizer
from avion_dali.datasets.spans import ChunkLookup, SpanError

REQUIRED_COLUMNS = ("video", "start", "end", "text")
# A record batch of the longest texts must stay below Arrow's 2 GB of strings; a caption has a few dozen.
MAX_TEXT_LENGTH = 8_000
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class RejectedRow:
    """An annotation row that cannot be used.

    Args:
        line: its line in the file, from 1.
        video: the video it names.
        reason: why not.
    """

    line: int
    video: str
    reason: str


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What a manifest was made of.

    Args:
        num_samples: clips in the manifest.
        num_chunks: chunk files in the manifest.
        without_classes: of these clips, those without a verb or a noun; evaluation grades relevancy by classes
            only when every clip has both.
        rejected: annotation rows left out.
        unusable: chunk files left out.
    """

    num_samples: int
    num_chunks: int
    without_classes: int
    rejected: tuple[RejectedRow, ...]
    unusable: tuple[UnusableChunk, ...]


def build_captions_manifest(
    chunk_root: str | Path,
    annotations: str | Path,
    output: str | Path,
    *,
    skip_bad_rows: bool = False,
    jobs: int = 0,
    on_progress: Callable[[int], object] | None = None,
) -> BuildReport:
    """Make a manifest of chunks and captions.

    Rows that cannot be used are listed in `<output>/rejected.jsonl`, so nothing is lost silently.

    Args:
        chunk_root: folder of `<video>/<start second>.mp4` chunks.
        annotations: `.csv` (with a header) or `.jsonl` file; `noun` may hold several, parted by `;`.
        output: manifest folder to write.
        skip_bad_rows: leave unusable rows out instead of refusing the file.
        jobs: probing processes; 0 takes all cores.
        on_progress: called with the number of probed chunk files.

    Returns:
        What went in and what was left out.

    Raises:
        UserError: when a file or column is missing, or rows are unusable and not to be skipped.
    """
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; --output names the manifest's folder")
    rows = list(read_rows(Path(annotations)))
    with _writable(folder), IndexWriter(folder) as index:
        chunks, unusable = scan_chunks(
            chunk_root, jobs=jobs or available_cores(), index=index, on_progress=on_progress
        )
        samples, rejected = _place(rows, ChunkLookup(chunks))
        _write_jsonl(folder / "rejected.jsonl", [asdict(r) for r in rejected])
        _write_jsonl(folder / "unusable_chunks.jsonl", [asdict(u) for u in unusable])
        if rejected and not skip_bad_rows:
            raise UserError(_refusal(annotations, rejected, unusable, folder))
        if not samples:
            where = f"reasons are in {folder / 'rejected.jsonl'}" if rejected else "the file has none"
            raise UserError(f"{annotations}: no row can be used; {where}")
        info = {"annotations": str(annotations), "rejected_rows": len(rejected)}
        index.finish()
        write_manifest(folder, chunk_root=chunk_root, chunks=chunks, samples=samples, info=info)
    without_classes = sum(not (s.verb and s.nouns) for s in samples)
    return BuildReport(len(samples), len(chunks), without_classes, tuple(rejected), tuple(unusable))


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, row) of an annotation file.

    Args:
        path: `.csv` or `.jsonl` file.

    Raises:
        UserError: when the file is missing, of another kind, malformed, or lacks a column.
    """
    readers = {".csv": _csv_rows, ".jsonl": _json_rows}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: annotations must be a .csv or .jsonl file")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            yield from readers[path.suffix.lower()](file, path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _csv_rows(file: TextIO, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    # Strict: a quote that is never closed is an error, not one text that swallows all rows after it.
    reader = csv.DictReader(file, strict=True)
    try:
        absent = [name for name in REQUIRED_COLUMNS if name not in (reader.fieldnames or ())]
        if absent:
            raise UserError(
                f"{path}: column {', '.join(absent)} is missing; the header must name "
                f"{', '.join(REQUIRED_COLUMNS)}, parted by commas, and is {','.join(reader.fieldnames or ())!r}"
            )
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{path}, near line {reader.line_num}: not valid CSV: {error}") from error


def _json_rows(file: TextIO, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in enumerate(file, start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path}, line {line} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {line} is not a JSON object")
        yield line, row


def _place(
    rows: list[tuple[int, dict[str, Any]]], lookup: ChunkLookup
) -> tuple[list[Sample], list[RejectedRow]]:
    tokenize = clip_tokenizer()
    samples, rejected = [], []
    for line, row in rows:
        try:
            samples.append(_sample(row, lookup, tokenize))
        except SpanError as error:
            rejected.append(RejectedRow(line, str(row.get("video") or ""), str(error)))
    return samples, rejected


def _sample(row: dict[str, Any], lookup: ChunkLookup, tokenize: Callable[[str], tuple[int, ...]]) -> Sample:
    missing = [name for name in REQUIRED_COLUMNS if not _words(row.get(name))]
    if missing:
        raise SpanError(f"{', '.join(missing)} is missing")
    if None in row:
        raise SpanError("has more fields than the header; a text with commas needs quotes")
    if len(_words(row["text"])) > MAX_TEXT_LENGTH:
        raise SpanError(f"its text is longer than {MAX_TEXT_LENGTH} characters")
    text, verb, noun = _words(row["text"]), _words(row.get("verb")), row.get("noun")
    first, count, end_s = lookup.locate(_words(row["video"]), _seconds(row["start"]), _seconds(row["end"]))
    nouns = noun if isinstance(noun, list) else _words(noun).split(";")
    return Sample(
        first_chunk=first,
        num_chunks=count,
        start_s=_seconds(row["start"]),
        end_s=end_s,
        text=text,
        tokens=tokenize(text),
        verb=verb,
        nouns=tuple(word for word in map(_words, nouns) if word),
    )


def _words(value: Any) -> str:
    """Return a field as text without surrounding blanks; empty for an absent one, `0` for the class 0."""
    if isinstance(value, dict | list | bool):
        raise SpanError(f"{value!r} should be a text or a number")
    text = "" if value is None else str(value).strip()
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SpanError(f"{text!r} is not valid Unicode: {error.reason}") from None
    return text


def _seconds(value: Any) -> float:
    try:
        return float(_words(value))
    except ValueError:
        raise SpanError(f"{value!r} is not a number of seconds") from None


def _refusal(
    annotations: str | Path, rejected: list[RejectedRow], unusable: list[UnusableChunk], folder: Path
) -> str:
    lines = [f"  line {r.line}, video {r.video!r}: {r.reason}" for r in rejected[:_SHOWN]]
    if len(rejected) > _SHOWN:
        lines.append(f"  and {len(rejected) - _SHOWN} more in {folder / 'rejected.jsonl'}")
    lines += [f"  chunk {u.path}: {u.reason}" for u in unusable[:_SHOWN]]
    return (
        f"{annotations}: {len(rejected)} rows cannot be used:\n"
        + "\n".join(lines)
        + "\nmend them, or leave them out with --skip-bad-rows"
    )


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"the manifest could not be written to {folder}: {error}") from error


def _write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.unlink(missing_ok=True)
    if rows:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
