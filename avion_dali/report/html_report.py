"""One HTML file that shows how a run went: curves, numbers, and what the model finds for a text.

The file holds everything it shows (inline SVG and JPEG), so it can be mailed, archived and opened offline, in
light and dark. matplotlib and PIL are imported when a report is written, not before.
"""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from avion_dali.files import atomic_write_text

_INK = "#123457"  # stands for the page's text colour while matplotlib draws
_LINES = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#64748b")
_CURVES_PER_CHART = len(_LINES)
_JPEG_QUALITY = 82
_COUNTS = ("clips", "unreadable")  # of an evaluation: their scale would flatten its measures

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --page: #fbfcfd; --card: #ffffff;
  --line: #dde3ea; --good: #0f8a5f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9f0; --soft: #97a3b3; --page: #12161c;
  --card: #1a2028; --line: #2d3642; --good: #3ecf97; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 76rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
p.note, figcaption { color: var(--soft); font-size: .9rem; margin: .25rem 0; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .9rem;
  margin: 0; overflow: hidden; }
.card svg { width: 100%; height: auto; display: block; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .5rem; border-bottom: 1px solid var(--line); }
td:last-child { text-align: right; }
th { color: var(--soft); font-weight: 500; }
tr:last-child > * { border-bottom: 0; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .9rem;
  overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
.query { margin-bottom: 1rem; }
.query h3 { font-size: 1rem; margin: 0 0 .6rem; }
.matches { display: flex; flex-wrap: wrap; gap: .75rem; }
.match { margin: 0; max-width: 100%; border: 2px solid var(--line); border-radius: .4rem; padding: .3rem; }
.match.right { border-color: var(--good); }
.match img { display: block; max-width: 100%; border-radius: .2rem; }
</style>
</head>
<body>
<h1>$title</h1>
<p class="note">$subtitle</p>
<h2>Curves</h2>
<div class="grid">$charts</div>
<h2>Numbers</h2>
<div class="grid">$tables</div>
$gallery
<h2>Clips that could not be read</h2>
$unreadable
<h2>How to repeat this</h2>
<pre>$command</pre>
<div class="grid"><div class="card">$settings</div><div class="card">$versions</div></div>
</body>
</html>
""")


@dataclass(frozen=True)
class ReportMatch:
    """A video found for a text.

    Args:
        frames_THWC: uint8 thumbnails (T, H, W, 3), RGB, shown side by side.
        score: similarity to the text.
        label: what is written below it.
        is_right: whether it belongs to the text.
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
    """What a report shows.

    Args:
        title: heading.
        rows: rows of `log.jsonl`, see `run_log.read_rows`.
        metrics: final numbers.
        gallery: texts with the videos found for them; may be empty.
        command: the command that repeats the run.
        versions: software and device, see `checkpoint.software_versions`.
        resources: what the run has used, name to number or text.
        unreadable: clips that could not be read, kind to count.
        unreadable_rows: some of them in words.
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


@dataclass(frozen=True)
class _Curve:
    name: str
    steps: list[int]
    values: list[float]


def _curve(rows: Sequence[Mapping[str, Any]], kind: str, name: str) -> _Curve:
    """One named number over the steps; rows without it, or with null for it, are left out."""
    points = [(row["step"], row[name]) for row in rows if row["kind"] == kind and _is_number(row.get(name))]
    return _Curve(name, [int(step) for step, _ in points], [float(value) for _, value in points])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _metric_curves(rows: Sequence[Mapping[str, Any]]) -> list[_Curve]:
    """The evaluations' numbers, as many as one chart can tell apart."""
    names = {
        name: None
        for row in rows
        if row["kind"] == "evaluation"
        for name in row
        if name not in ("kind", "step", *_COUNTS) and _is_number(row[name])
    }
    return [_curve(rows, "evaluation", name) for name in list(names)[:_CURVES_PER_CHART]]


def _draw(curves: Sequence[_Curve], title: str, *, from_zero: bool) -> str:
    """Curves over optimizer steps as an SVG element that takes the page's text colour."""
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",  # text stays text: small, searchable, in the page's font
        "svg.hashsalt": title,  # equal runs give equal files, and two charts never share an id
        "font.family": "sans-serif",
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK
        ),
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.2, 2.9), layout="constrained")
        axes = figure.add_subplot()
        for curve, color in zip(curves, _LINES, strict=False):
            marker = "o" if len(curve.steps) <= 30 else None
            axes.plot(curve.steps, curve.values, color=color, marker=marker, markersize=3, label=curve.name)
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("optimizer step", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, color=_INK, linewidth=0.5)
        if len(curves) > 1:
            axes.legend(fontsize=8, frameon=False)
        buffer = io.StringIO()
        blank = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=blank)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(_INK, "currentColor")


def _charts(rows: Sequence[Mapping[str, Any]]) -> str:
    loss = [_curve(rows, "train", "loss")]
    waiting = [_curve(rows, "train", "data_wait_share")]
    speed = [_curve(rows, "train", "clips_per_s")]
    cards = []
    # Shares and rates start at zero, or noise would look like a trend.
    for title, curves, from_zero in (
        ("Loss", loss, False),
        ("Evaluation", _metric_curves(rows), False),
        ("Share of the step spent waiting for data", waiting, True),
        ("Clips per second, all ranks", speed, True),
    ):
        drawn = [curve for curve in curves if curve.steps]
        note = f'<p class="note">{title}: the log has no such row.</p>'
        body = _draw(drawn, title, from_zero=from_zero) if drawn else note
        cards.append(f'<figure class="card">{body}</figure>')
    return "\n".join(cards)


def _run_numbers(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the training rows say in total."""
    numbers: dict[str, float] = {}
    for name, label, pick in (
        ("step", "optimizer steps", max),
        ("loss", "last loss", lambda values: values[-1]),
        ("clips_per_s", "clips per second (median)", statistics.median),
        ("data_wait_share", "data-wait share (median)", statistics.median),
        ("step_s", "seconds per step (median)", statistics.median),
        ("memory_mb", "peak memory, MiB", max),
        ("replaced", "replaced clips", lambda values: values[-1]),
    ):
        values = _curve(rows, "train", name).values
        if values:
            numbers[label] = pick(values)
    return numbers


def _best(rows: Sequence[Mapping[str, Any]]) -> str:
    """Which evaluation the best checkpoint is of, in words; empty without one."""
    name = _last_header(rows).get("best_metric")
    curve = _curve(rows, "evaluation", name) if name else None
    if curve is None or not curve.values:
        return ""
    # As the training decides: a later evaluation must be better, not as good.
    value, step = max(zip(curve.values, curve.steps, strict=True), key=lambda point: (point[0], -point[1]))
    return f", best {name} {_show(value)} after step {step:,}"


def _last_header(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return next((row for row in reversed(rows) if row["kind"] == "header"), {})


def _flat(values: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """Nested settings under dotted names, as one gives them on a command line."""
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


def _table(heading: str, values: Mapping[str, Any]) -> str:
    if not values:
        return f'<p class="note">{escape(heading)}: none recorded.</p>'
    lines = "".join(
        f"<tr><th>{escape(str(name))}</th><td>{escape(_show(value))}</td></tr>"
        for name, value in values.items()
    )
    return f'<p class="note">{escape(heading)}</p><table>{lines}</table>'


def _settings_table(rows: Sequence[Mapping[str, Any]]) -> str:
    settings = _flat(_last_header(rows).get("config", {}))
    # As they are written in a configuration: no thousands separators, nothing rounded.
    return _table("Settings of the last start", {name: str(value) for name, value in settings.items()})


def _image(frames_THWC: np.ndarray, alt: str) -> str:
    """The frames side by side as an inline JPEG."""
    from PIL import Image

    strip_HWC = np.concatenate(list(frames_THWC), axis=1)
    buffer = io.BytesIO()
    Image.fromarray(strip_HWC).save(buffer, format="JPEG", quality=_JPEG_QUALITY)
    data = base64.b64encode(buffer.getvalue()).decode()
    height, width = strip_HWC.shape[:2]
    return f'<img src="data:image/jpeg;base64,{data}" width="{width}" height="{height}" alt="{escape(alt)}">'


def _match(match: ReportMatch) -> str:
    caption = f"{match.score:.3f}" + (" - right" if match.is_right else "")
    if match.label:
        caption += f" - {match.label}"
    kind = "match right" if match.is_right else "match"
    image = _image(match.frames_THWC, match.label or "frames of a video")
    return f'<figure class="{kind}">{image}<figcaption>{escape(caption)}</figcaption></figure>'


def _gallery(queries: Sequence[ReportQuery]) -> str:
    if not queries:
        return ""
    return "<h2>Texts and the videos found for them</h2>\n" + "\n".join(
        f'<div class="card query"><h3>{escape(query.text)}</h3>'
        f'<div class="matches">{"".join(map(_match, query.matches))}</div></div>'
        for query in queries
    )


def _unreadable(data: ReportData) -> str:
    if not data.unreadable:
        return '<p class="note">None.</p>'
    rows = "\n".join(map(escape, data.unreadable_rows))
    return f'<div class="card">{_table("Failures by kind", data.unreadable)}</div><pre>{rows}</pre>'


def write_report(path: Path, data: ReportData) -> None:
    """Write the report as one HTML file, atomically.

    Args:
        path: the file to write.
        data: what it shows.

    Raises:
        UserError: the file could not be written.
    """
    steps = max((int(row["step"]) for row in data.rows), default=0)
    evaluations = sum(row["kind"] == "evaluation" for row in data.rows)
    final = f'<div class="card">{_table("Final evaluation", data.metrics)}</div>'
    run = f'<div class="card">{_table("Training", _run_numbers(data.rows))}</div>'
    used = f'<div class="card">{_table("Resources, all starts together", data.resources)}</div>'
    page = _PAGE.substitute(
        title=escape(data.title),
        subtitle=escape(f"{steps:,} optimizer steps, {evaluations} evaluations{_best(data.rows)}"),
        charts=_charts(data.rows),
        tables=final + run + used,
        gallery=_gallery(data.gallery),
        unreadable=_unreadable(data),
        command=escape(data.command),
        settings=_settings_table(data.rows),
        versions=_table("Software and device", data.versions),
    )
    atomic_write_text(path, page)
