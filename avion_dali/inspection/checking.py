"""Checks all chunks of a folder or a manifest in parallel, and resumes after an interruption.

A file that crashes or blocks the process that checks it becomes a finding; the check continues.
"""

from __future__ import annotations

import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np

from avion_dali import __version__
from avion_dali.contracts import UserError
from avion_dali.cores import available_cores
from avion_dali.data.manifest import CHUNKS_FILE, INDEX_FILE, Chunk, Manifest
from avion_dali.data.scanning import ChunkNames, find_chunk_files
from avion_dali.files import partial_path, put_in_place
from avion_dali.inspection.chunk_file import file_stamp, inspect_file
from avion_dali.inspection.findings import KINDS, FileReport, Finding, Target
from avion_dali.loading.pool import WorkerDiedError, WorkerPool
from avion_dali.locks import folder_lock

FINDINGS_FILE, PROGRESS_FILE = "findings.jsonl", "progress.jsonl"
MAX_SIZES = 8
QUICK_TIMEOUT_S, DEEP_TIMEOUT_S = 120.0, 600.0

_AHEAD = 16  # files queued per process, so that no process is idle while the oldest file takes long
_RETRIED = frozenset({"missing", "crashed", "timeout"})  # the cause may not be the file

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class CheckSettings:
    """Settings of a check.

    Args:
        deep: decode every frame.
        jobs: number of processes; 0 uses all cores.
        timeout_s: time limit per file in seconds; 0 uses a default.

    Raises:
        UserError: when a number is negative.
    """

    deep: bool = False
    jobs: int = 0
    timeout_s: float = 0.0

    def __post_init__(self) -> None:
        if self.jobs < 0 or self.timeout_s < 0:
            raise UserError(f"jobs ({self.jobs}) and timeout ({self.timeout_s:g} s) must not be negative")


@dataclass(slots=True)
class Tally:
    """Findings of one kind.

    Args:
        count: number of findings.
        example: path of the first one.
        detail: detail of the first one.
    """

    count: int
    example: str
    detail: str


@dataclass(slots=True)
class CheckReport:
    """Result of a check.

    Args:
        num_files: number of checked files, including those of `num_kept`.
        num_kept: number of files whose result of an earlier check is still valid, because they did not change.
        tallies: counts by kind of finding, in the order of `KINDS`.
        bad_chunks: kinds of errors by path.
    """

    num_files: int = 0
    num_kept: int = 0
    tallies: dict[str, Tally] = field(default_factory=dict)
    bad_chunks: dict[str, list[str]] = field(default_factory=dict)


def check_chunks(
    source: str | Path,
    output: str | Path,
    *,
    settings: CheckSettings,
    on_progress: Callable[[int, int], object] | None = None,
) -> CheckReport:
    """Check a chunk folder or the chunks of a manifest.

    `<output>/findings.jsonl` contains a line per finding, and `<output>/progress.jsonl` a line per file. With
    the latter, an interrupted check continues where it stopped, and a repeated check reads only files that
    have changed.

    Args:
        source: folder of chunks, or of a manifest.
        output: folder to write to.
        settings: settings of the check.
        on_progress: called with the number of checked files and the number of all files.

    Raises:
        UserError: when there is nothing to check, or `output` contains the check of another source.
    """
    source, output = Path(source), Path(output)
    targets, total = list_targets(source, deep=settings.deep)
    report = CheckReport()
    with (
        _clear_errors(output),
        folder_lock(output, "checking"),
        _Progress(output, _identity(source)) as progress,
        _Findings(output, report) as findings,
    ):

        def take(done: FileReport) -> None:
            findings.add_file(done)
            if on_progress is not None:
                on_progress(report.num_files, total)

        def not_yet_checked() -> Iterator[Target]:
            for target in targets:
                earlier = progress.earlier(target)
                if earlier is None:
                    yield target
                else:
                    report.num_kept += 1
                    take(earlier)

        timeout_s = settings.timeout_s or (DEEP_TIMEOUT_S if settings.deep else QUICK_TIMEOUT_S)
        jobs = settings.jobs or available_cores()
        for target, result in supervise(inspect_file, not_yet_checked(), jobs=jobs, timeout_s=timeout_s):
            if isinstance(result, Finding):
                result = FileReport(target.path, file_stamp(target.path), target.deep, findings=(result,))
            progress.keep(result)
            take(result)
        findings.finish(source)
    return report


def list_targets(source: Path, *, deep: bool) -> tuple[Iterator[Target], int]:
    """List the files to check, and count them.

    Args:
        source: folder of chunks, or of a manifest.
        deep: decode every frame.

    Raises:
        UserError: when it is neither, or the manifest's chunk folder does not exist.
    """
    if not is_manifest(source):
        files = find_chunk_files(source)
        return (Target(str(path), deep, video=video, start_s=start) for video, start, path in files), len(files)
    manifest = Manifest(source)
    if not os.path.isdir(manifest.chunk_root):
        raise UserError(
            f"{manifest.chunk_root}, the chunk folder of {source}, does not exist; mount it, or change "
            f"chunk_root in {source / 'manifest.json'} if it was moved"
        )
    chunks = (manifest.chunk(row) for row in range(manifest.num_chunks))
    return (_target(chunk, deep) for chunk in chunks), manifest.num_chunks


def _target(chunk: Chunk, deep: bool) -> Target:
    times = chunk.frame_times
    # Frame times are also stored at a constant rate if the first picture is late or is shown for longer.
    is_cfr = times is None or bool(
        np.allclose(times, times[0] + np.arange(len(times)) / float(chunk.fps), atol=1e-3)
    )
    return Target(
        path=chunk.ref.path,
        deep=deep,
        ref=chunk.ref,
        fps=chunk.fps,
        is_cfr=is_cfr,
        video=chunk.video,
        start_s=chunk.start_s,
        late_s=0.0 if times is None else float(times[0]),
    )


def is_manifest(folder: Path) -> bool:
    """Return whether a folder is a manifest; otherwise it is a chunk folder.

    Args:
        folder: the folder.
    """
    return (folder / "manifest.json").exists()


def supervise(
    task: Callable[[Item], Result], items: Iterable[Item], *, jobs: int, timeout_s: float
) -> Iterator[tuple[Item, Result | Finding]]:
    """Run a task for each item in processes that may crash or hang.

    Args:
        task: a function that can be imported by name.
        items: its arguments, consumed as needed.
        jobs: number of processes.
        timeout_s: seconds after which a task's process is killed and replaced.

    Yields:
        The items in order, each with its result, or with a finding if its process crashed or timed out.

    Raises:
        UserError: when processes repeatedly die.
    """
    remaining = iter(items)
    with WorkerPool(workers=jobs, timeout_s=timeout_s) as pool:
        waiting = deque((item, pool.schedule(task, item)) for item in islice(remaining, _AHEAD * jobs))
        while waiting:
            item, future = waiting.popleft()
            result: Result | Finding
            try:
                result = future.result()
            except futures.TimeoutError:
                result = Finding("timeout", f"no answer within {timeout_s:g} s")
            except WorkerDiedError as error:
                result = Finding("crashed", f"its process ended with code {error.exitcode}")
            yield item, result
            waiting.extend((item, pool.schedule(task, item)) for item in islice(remaining, 1))


@contextmanager
def _clear_errors(output: Path) -> Iterator[None]:
    """Report a full disk or missing permission in one line; the progress that was written counts."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{output} cannot be written to ({error.strerror or error}); free space or name another --output, "
            "and start again: files that were checked are not checked again"
        ) from error


def _identity(source: Path) -> dict[str, object]:
    """Return what identifies a source and its state; an earlier check is valid if these values agree."""
    identity: dict[str, object] = {"source": str(source.resolve()), "version": __version__}
    if is_manifest(source):
        # Not its sample table: whether a chunk is sound does not depend on its clips.
        manifest = Manifest(source)
        identity["chunk_root"] = manifest.chunk_root
        tables = (manifest.files.path(name) for name in (CHUNKS_FILE, INDEX_FILE))
        identity["tables"] = [list(file_stamp(str(path))) for path in tables]
    return identity


class _Progress:
    """The checked files with their findings.

    Args:
        output: folder of the check.
        identity: identifies what is checked.

    Raises:
        UserError: when the folder contains the check of another source.
    """

    def __init__(self, output: Path, identity: dict[str, object]) -> None:
        path = output / PROGRESS_FILE
        lines = _complete_lines(path)
        before = next((line for line in lines if isinstance(line, dict)), {})
        if before.get("source", identity["source"]) != identity["source"]:
            raise UserError(f"{output} contains the check of {before['source']}; choose another --output")
        is_same = before == identity
        self._earlier = {row["path"]: _as_report(row) for row in lines if _is_report(row)} if is_same else {}
        self._file = path.open("a" if is_same else "w")
        # An interruption may have left the last line unfinished.
        self._file.write("\n" if is_same else json.dumps(identity) + "\n")

    def earlier(self, target: Target) -> FileReport | None:
        """Return the result of an earlier check of a file, if it is still valid."""
        report = self._earlier.get(target.path)
        if report is None or (target.deep and not report.deep):
            return None
        if report.stamp != file_stamp(target.path) or any(f.kind in _RETRIED for f in report.findings):
            return None
        return report

    def keep(self, report: FileReport) -> None:
        """Append a checked file."""
        self._file.write(json.dumps(asdict(report)) + "\n")
        self._file.flush()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _complete_lines(path: Path) -> Iterator[Any]:
    """Yield the rows of a JSONL file, if there is one, but for a line that an interruption left unfinished."""
    if not path.exists():
        return
    with path.open(errors="replace") as file:
        for line in file:
            with suppress(ValueError):
                yield json.loads(line)


def _is_report(row: object) -> bool:
    """Tell rows of `_Progress.keep` from what damage left of one."""
    return isinstance(row, dict) and {field.name for field in fields(FileReport)} == row.keys()


def _as_report(row: dict[str, Any]) -> FileReport:
    findings = tuple(Finding(**finding) for finding in row["findings"])
    facts = (row["path"], tuple(row["stamp"]), row["deep"], tuple(row["frame_size"]), findings)
    span = row.get("span")
    return FileReport(*facts, row.get("video", ""), (span[0], span[1]) if span else None)


class _Findings:
    """Writes findings and counts them.

    Args:
        output: folder of the check.
        report: receives the counts.
    """

    def __init__(self, output: Path, report: CheckReport) -> None:
        self._path, self._report = output / FINDINGS_FILE, report
        self._partial = partial_path(self._path)
        # Names of files need not be UTF-8.
        self._file: TextIO = self._partial.open("w", encoding="utf-8", errors="backslashreplace")
        self._sizes: Counter[tuple[int, int]] = Counter()
        self._spans: dict[str, list[tuple[float, float | None]]] = {}

    def add_file(self, done: FileReport) -> None:
        """Add the findings of one file."""
        self._report.num_files += 1
        if done.frame_size != (0, 0):
            self._sizes[done.frame_size] += 1
        if done.span is not None:
            self._spans.setdefault(done.video, []).append(done.span)
        for finding in done.findings:
            self._add(done.path, finding)
        errors = [finding.kind for finding in done.findings if finding.is_error]
        if errors:
            self._report.bad_chunks[done.path] = errors

    def finish(self, source: Path) -> None:
        """Add the findings that concern several files, and put the file in place."""
        if len(self._sizes) > MAX_SIZES:
            common = ", ".join(f"{w}x{h} ({count})" for (w, h), count in self._sizes.most_common(3))
            self._add(str(source), Finding("many-sizes", f"{len(self._sizes)} frame sizes: {common}, ..."))
        for video, spans in self._spans.items():
            problem = ChunkNames().problem(sorted(spans))
            if problem:
                self._add(video, Finding("chunk-names", problem))
        tallies = self._report.tallies
        self._report.tallies = {kind: tallies[kind] for kind in KINDS if kind in tallies}
        self._file.close()
        put_in_place(self._partial, self._path)

    def _add(self, path: str, finding: Finding) -> None:
        path = path.encode(errors="backslashreplace").decode()  # names may be bytes that are not valid text
        row = {"severity": KINDS[finding.kind].severity, "path": path, **asdict(finding)}
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        tally = self._report.tallies.setdefault(finding.kind, Tally(0, path, finding.detail))
        tally.count += 1

    def __enter__(self) -> _Findings:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)
