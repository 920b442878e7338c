"""Draws curves of a run over its optimizer steps as SVG for the report.

matplotlib is imported only when a chart is drawn.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from avion_dali.wording import printable

_INK = "#123457"  # placeholder for the text color of the page, replaced after drawing
_LINES = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#64748b")
_CURVES_PER_CHART = len(_LINES)
_COUNTS = ("clips", "unreadable")  # counts of an evaluation, excluded because their scale would flatten metrics


@dataclass(frozen=True)
class Curve:
    """One number over the steps.

    Args:
        name: name of the number in the log.
        steps: optimizer steps, in order.
        values: the number after each of these steps.
    """

    name: str
    steps: list[int]
    values: list[float]


def curve_of(rows: Sequence[Mapping[str, Any]], kind: str, *, name: str) -> Curve:
    """Collect a number over the steps; rows without it, or with null for it, are left out.

    Args:
        rows: rows of `log.jsonl`.
        kind: kind of the rows: `train` or `evaluation`.
        name: name of the number.
    """
    points = [(row["step"], row[name]) for row in rows if row["kind"] == kind and _is_number(row.get(name))]
    return Curve(name, [int(step) for step, _ in points], [float(value) for _, value in points])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _metric_curves(rows: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """Return the curves of the evaluation metrics, at most as many as one chart can show."""
    names = {
        name: None
        for row in rows
        if row["kind"] == "evaluation"
        for name in row
        if name not in ("kind", "step", *_COUNTS) and _is_number(row[name])
    }
    return [curve_of(rows, "evaluation", name=name) for name in list(names)[:_CURVES_PER_CHART]]


def _draw(curves: Sequence[Curve], title: str, *, from_zero: bool) -> str:
    """Draw curves over optimizer steps as an SVG element that takes the text color of the page."""
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",  # keep text as text, which is small, searchable and in the page's font
        "svg.hashsalt": title,  # make files reproducible, with different element ids per chart
        "font.family": "sans-serif",
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK
        ),
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not what a `matplotlibrc` in the working directory says
        matplotlib.rcParams.update(style)
        figure = Figure(figsize=(5.2, 2.9), layout="constrained")
        axes = figure.add_subplot()
        for curve, color in zip(curves, _LINES, strict=False):
            marker = "o" if len(curve.steps) <= 30 else None
            name = printable(curve.name).replace("$", r"\$")  # no formula
            axes.plot(curve.steps, curve.values, color=color, marker=marker, markersize=3, label=name)
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


def draw_charts(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Draw the charts of a run.

    Args:
        rows: rows of `log.jsonl`.

    Returns:
        Title to SVG element; an empty string if the log lacks the number.
    """
    speed = [curve_of(rows, "train", name="clips_per_s")]
    waiting = [curve_of(rows, "train", name=name) for name in ("data_wait_share", "gpu_idle_share")]
    charts = {}
    # Axes of fractions and rates start at zero, because noise would look like a trend otherwise.
    for title, curves, from_zero in (
        ("Loss", [curve_of(rows, "train", name="loss")], False),
        ("Evaluation", _metric_curves(rows), False),
        ("Share of the step spent waiting for data", waiting, True),
        ("Clips per second, all ranks", speed, True),
    ):
        drawn = [curve for curve in curves if curve.steps]
        charts[title] = _draw(drawn, title, from_zero=from_zero) if drawn else ""
    return charts
