"""Writes the report of a run from the files in its folder."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from avion_dali.contracts import UserError
from avion_dali.engine.checkpoint import software_versions
from avion_dali.engine.energy import CARBON_KG_PER_KWH, NOT_READABLE, PUE, carbon_kg
from avion_dali.engine.run_log import LOG_NAME, command_line, read_rows
from avion_dali.report.html_report import ReportData, ReportQuery, write_report

REPORT_NAME = "report.html"
QUARANTINE_NAME = "quarantine.jsonl"
_ROWS_SHOWN = 20
_JOULES_PER_KWH = 3.6e6
_FAILURES = (
    *(UserError, OSError, ImportError, ValueError, TypeError, LookupError, RuntimeError),
    TemplateError,
)

_log = logging.getLogger(__name__)


def write_run_report(
    output_dir: Path,
    *,
    title: str = "",
    metrics: Mapping[str, float] | None = None,
    gallery: Sequence[ReportQuery] = (),
) -> Path:
    """Write `report.html` of a run: curves, metrics, resources, and the clips that could not be read.

    Args:
        output_dir: folder of the run, with its `log.jsonl`.
        title: heading; by default the name of the folder.
        metrics: final numbers; by default those of the last evaluation.
        gallery: texts with the videos found for them.

    Returns:
        Path of the report.

    Raises:
        UserError: the file could not be written.
    """
    rows = read_rows(output_dir / LOG_NAME)
    failures = read_rows(output_dir / QUARANTINE_NAME, {"kind": str})
    path = output_dir / REPORT_NAME
    write_report(
        path,
        ReportData(
            title=title or f"Run {output_dir.resolve().name}",
            rows=rows,
            metrics=last_metrics(rows) if metrics is None else metrics,
            gallery=gallery,
            command=command_line(),
            versions=software_versions(),
            resources=resources(rows),
            unreadable=dict(Counter(str(row["kind"]) for row in failures).most_common()),
            unreadable_rows=[_in_words(row) for row in failures[:_ROWS_SHOWN]],
            damaged_lines=_count_lines(output_dir / LOG_NAME) - len(rows),
        ),
    )
    return path


def report_run(output_dir: Path) -> None:
    """Write the report at the end of a training; a failure is logged and does not fail the training.

    Args:
        output_dir: folder of the run.
    """
    try:
        write_run_report(output_dir)
    except _FAILURES as error:
        _log.warning("the report of %s could not be written: %s", output_dir, error)


def last_metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the numbers of the last evaluation in a log; empty if there is none."""
    for row in reversed(rows):
        if row["kind"] == "evaluation":
            return {
                name: value for name, value in row.items() if name not in ("kind", "step") and value is not None
            }
    return {}


def resources(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | str]:
    """Add up time and energy over all starts of a run, including steps that were repeated.

    Energy is measured by hardware counters; carbon emissions are energy x PUE x carbon intensity (Touvron et
    al. 2023, arXiv 2302.13971, section 6).

    Args:
        rows: rows of `log.jsonl`.
    """
    starts: list[list[Mapping[str, Any]]] = []
    for row in rows:
        if row["kind"] == "header":
            starts.append([])
        if starts:
            starts[-1].append(row)
    hours = device_hours = joules = 0.0
    sources = set()
    for start in starts:
        own_hours = max(_number(row, "elapsed_s") for row in start) / 3600
        hours += own_hours
        device_hours += own_hours * (_number(start[0], "world_size") or 1)
        joules += max(_number(row, "energy_j") for row in start)
        sources.add(str(start[0].get("energy_source", NOT_READABLE)))
    if not starts:
        return {}
    on_gpu = str(starts[-1][0].get("device", "")).startswith("cuda")
    found: dict[str, float | str] = {
        "starts": len(starts),
        "hours": hours,
        "GPU-hours" if on_gpu else "process-hours, no GPU": device_hours,
    }
    if NOT_READABLE in sources:
        return {**found, "energy": NOT_READABLE}
    kwh = joules / _JOULES_PER_KWH
    return {
        **found,
        f"energy, kWh, counted by {', '.join(sorted(sources))}": kwh,
        f"CO2-equivalent, kg, at PUE {PUE} and {CARBON_KG_PER_KWH} kg/kWh": carbon_kg(kwh),
    }


def _number(row: Mapping[str, Any], name: str) -> float:
    """Return a number of a row; 0 when there is none."""
    value = row.get(name)
    return value if isinstance(value, int | float) else 0


def _count_lines(path: Path) -> int:
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return sum(bool(line.strip()) for line in file)


def _in_words(failure: Mapping[str, Any]) -> str:
    path, kind, cause, sample = (failure.get(name) for name in ("path", "kind", "cause", "sample_id"))
    return f"{path}: {kind}: {cause} (sample {sample})"
