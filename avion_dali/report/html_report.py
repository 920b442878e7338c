"""Writes the report of a run as one HTML file: curves, numbers, and the clips that the model finds for a text.

The file is self-contained (inline SVG and JPEG), so it can be mailed, archived and opened offline. It follows
the light or dark mode of the browser. matplotlib and PIL are imported only when a report is written.
"""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from avion_dali.files import atomic_write_text
from avion_dali.report.charts import curve_of, draw_charts
from avion_dali.wording import printable

_JPEG_QUALITY = 82
_TEMPLATE = "run_report.html.j2"


@dataclass(frozen=True)
class ReportMatch:
    """A video found for a text.

    Args:
        frames_THWC: uint8 thumbnails (T, H, W, 3), RGB, shown side by side.
        score: similarity to the text.
        label: caption of the picture.
        is_right: whether the video matches the text.
    """

    frames_THWC: np.ndarray
    score: float
    label: str = ""
    is_right: bool = False

    def __post_init__(self) -> None:
        frames = self.frames_THWC
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
            raise ValueError(f"thumbnails must be uint8 (T, H, W, 3), got {frames.dtype} {frames.shape}")


@dataclass(frozen=True)
class ReportQuery:
    """A text and the videos found for it, best first.

    Args:
        text: the text.
        matches: the videos.
    """

    text: str
    matches: tuple[ReportMatch, ...]


@dataclass(frozen=True)
class ReportData:
    """The content of a report.

    Args:
        title: heading.
        rows: rows of `log.jsonl`, see `run_log.read_rows`.
        metrics: final numbers.
        gallery: texts with the videos found for them; may be empty.
        command: the command that reproduces the run.
        versions: software and device, see `checkpoint.software_versions`.
        resources: resources that the run has used, name to number or string.
        unreadable: number of clips that could not be read, by kind of failure.
        unreadable_rows: descriptions of some of these clips, one line each.
        damaged_lines: number of lines of the log that are not rows and were left out.
    """

    title: str
    rows: Sequence[Mapping[str, Any]]
    metrics: Mapping[str, float]
    gallery: Sequence[ReportQuery] = ()
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    resources: Mapping[str, float | str] = field(default_factory=dict)
    unreadable: Mapping[str, int] = field(default_factory=dict)
    unreadable_rows: Sequence[str] = ()
    damaged_lines: int = 0


def _run_numbers(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Summarize the training rows."""
    numbers: dict[str, float] = {}
    for name, label, pick in (
        ("step", "optimizer steps", max),
        ("loss", "last loss", lambda values: values[-1]),
        ("clips_per_s", "clips per second (median)", statistics.median),
        ("data_wait_share", "data-wait share (median)", statistics.median),
        ("gpu_idle_share", "GPU idle share (median)", statistics.median),
        ("step_s", "seconds per step (median)", statistics.median),
        ("memory_mb", "peak memory, MiB", max),
        ("replaced", "replaced clips", lambda values: values[-1]),
    ):
        values = curve_of(rows, "train", name=name).values
        if values:
            numbers[label] = pick(values)
    return numbers


def _best(rows: Sequence[Mapping[str, Any]]) -> str:
    """Describe the evaluation of the best checkpoint; empty if there is none."""
    name = _last_header(rows).get("best_metric")
    curve = curve_of(rows, "evaluation", name=name) if name and isinstance(name, str) else None
    if curve is None or not curve.values:
        return ""
    # As in the training, a later evaluation replaces an earlier one only if its value is higher.
    value, step = max(zip(curve.values, curve.steps, strict=True), key=lambda point: (point[0], -point[1]))
    return f", best {name} {_show(value)} after step {step:,}"


def _last_header(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return next((row for row in reversed(rows) if row["kind"] == "header"), {})


def _flat(values: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """Put nested settings under dotted names, as on a command line."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inner = isinstance(value, Mapping)
        flat |= _flat(value, f"{section}{name}.") if inner else {section + name: value}
    return flat


def _show(value: float | str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) >= 10 else f"{value:.4g}"
    return str(value)


def _shown(values: Mapping[str, float | str]) -> dict[str, str]:
    return {str(name): _show(value) for name, value in values.items()}


def _settings(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the settings as written in a configuration, without thousands separators or rounding."""
    config = _last_header(rows).get("config", {})
    return {name: str(value) for name, value in _flat(config if isinstance(config, dict) else {}).items()}


def _picture(match: ReportMatch) -> dict[str, Any]:
    """Return the template values of a match; its frames are joined side by side in one JPEG."""
    from PIL import Image

    strip_HWC = np.concatenate(list(match.frames_THWC), axis=1)
    buffer = io.BytesIO()
    Image.fromarray(strip_HWC).save(buffer, format="JPEG", quality=_JPEG_QUALITY)
    image = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    height, width = strip_HWC.shape[:2]
    shown = {"score": match.score, "label": match.label, "is_right": match.is_right}
    return {**shown, "image": image, "width": width, "height": height}


def _page(data: ReportData) -> str:
    """Fill in the template, which escapes all texts except the drawn curves."""
    steps = max((int(row["step"]) for row in data.rows), default=0)
    evaluations = sum(row["kind"] == "evaluation" for row in data.rows)
    damaged = f"; {data.damaged_lines} damaged lines of the log are left out" if data.damaged_lines else ""
    environment = Environment(
        loader=PackageLoader("avion_dali.report", ""), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template(_TEMPLATE).render(
        title=data.title,
        subtitle=f"{steps:,} optimizer steps, {evaluations} evaluations{_best(data.rows)}{damaged}",
        charts=draw_charts(data.rows),
        numbers={
            "Final evaluation": _shown(data.metrics),
            "Training": _shown(_run_numbers(data.rows)),
            "Resources, all starts together": _shown(data.resources),
        },
        gallery=[{"text": q.text, "matches": [_picture(match) for match in q.matches]} for q in data.gallery],
        unreadable=_shown(data.unreadable),
        unreadable_rows=data.unreadable_rows,
        command=data.command,
        origin={
            "Settings of the last start": _settings(data.rows),
            "Software and device": _shown(data.versions),
        },
    )


def write_report(path: Path, data: ReportData) -> None:
    """Write the report as one HTML file, atomically; what cannot be printed is escaped.

    Args:
        path: the file to write.
        data: content of the report.

    Raises:
        UserError: the file could not be written.
    """
    atomic_write_text(path, printable(_page(data)))
