"""Ratios, tables and the picture of `benchmarks.decode`."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from benchmarks.corpus import FOUR, SIXTEEN, STRIDED
from benchmarks.report import Row, markdown, names, select

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALL = "all sources"  # rows of means
# Processor time of `paper-fused` on x264-default chunks over that of `cpu-fused`, by profile and clip.
SPEED_UPS = (
    ("compat", FOUR.name, 1.45, 1.5),
    ("balanced", FOUR.name, 5.0, 6.0),
    ("fast", FOUR.name, 6.5, 8.0),
    ("intra", FOUR.name, 11.0, 13.0),
    ("balanced", SIXTEEN.name, 2.4, 3.0),
    ("balanced", STRIDED.name, 2.4, 3.0),
)
TORCHCODEC_SPEED_UP = 1.5  # on `balanced` chunks, `cpu-fused` against torchcodec on the same chunks
PAPER_OVER_TORCHCODEC = 1.05
REQUIREMENT = {
    "paper-fused on compat over cpu-fused, at least": {f"{p}, {kind}": r for p, kind, r, _ in SPEED_UPS},
    "torchcodec over cpu-fused on balanced, at least": TORCHCODEC_SPEED_UP,
    "paper-fused over torchcodec on compat, at most": PAPER_OVER_TORCHCODEC,
}
_MEANS = ("cpu_ms_per_clip", "frames_decoded_per_frame", "kb_read_per_clip", "file_kb")
_COLORS = {
    "cpu-fused": "#1f77b4",
    "paper-fused": "#d62728",
    "torchcodec": "#ff7f0e",
    "spdl": "#2ca02c",
    "decord": "#9467bd",
    "pyav": "#8c564b",
}


def pooled(rows: list[Row]) -> list[Row]:
    """Means over the sources, for decoders that were right on all of them."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in select(rows, "clip"):
        groups.setdefault((row["profile"], row["kind"], row["decoder"]), []).append(row)
    return [
        {
            "measured": ALL,
            **dict(zip(("profile", "kind", "decoder"), key, strict=True)),
            **{name: _mean([row[name] for row in group]) for name in _MEANS},
            "min_psnr_db": min(row["min_psnr_db"] for row in group),
        }
        for key, group in groups.items()
        if all("cpu_ms_per_clip" in row for row in group)
    ]


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def ratios(rows: list[Row]) -> list[Row]:
    """Return the requirements on `cpu-fused`, and whether the baseline is fair."""
    found = [
        _ratio(rows, kind, slow=("compat", "paper-fused"), fast=(profile, "cpu-fused"))
        | {"at_least": least, "aim": aim}
        for profile, kind, least, aim in SPEED_UPS
        if select(rows, ALL, profile=profile, kind=kind) and select(rows, ALL, profile="compat", kind=kind)
    ]
    for kind in (FOUR.name, SIXTEEN.name, STRIDED.name):
        if select(rows, ALL, profile="balanced", kind=kind, decoder="torchcodec"):
            wanted = {"at_least": TORCHCODEC_SPEED_UP} if kind == FOUR.name else {}
            slow, fast = ("balanced", "torchcodec"), ("balanced", "cpu-fused")
            found.append(_ratio(rows, kind, slow=slow, fast=fast) | wanted)
        if select(rows, ALL, profile="compat", kind=kind, decoder="torchcodec"):
            slow, fast = ("compat", "paper-fused"), ("compat", "torchcodec")
            found.append(_ratio(rows, kind, slow=slow, fast=fast) | {"at_most": PAPER_OVER_TORCHCODEC})
    return found


def _ratio(rows: list[Row], kind: str, *, slow: tuple[str, str], fast: tuple[str, str]) -> Row:
    def times(case: tuple[str, str]) -> dict[str, list[float]]:
        profile, decoder = case
        found = select(rows, "clip", profile=profile, kind=kind, decoder=decoder)
        return {row["source"]: row["cpu_ms_by_round"] for row in found}

    over, under = times(slow), times(fast)
    by_round = [
        sum(values) / sum(others)
        for values, others in zip(
            zip(*over.values(), strict=True), zip(*under.values(), strict=True), strict=True
        )
    ]
    medians = {source: statistics.median(values) for source, values in over.items()}
    return {
        "measured": "ratio",
        "slow": " on ".join(reversed(slow)),
        "fast": " on ".join(reversed(fast)),
        "kind": kind,
        "ratio": sum(medians.values()) / sum(map(statistics.median, under.values())),
        "by_round": by_round,
        "by_source": {source: ms / statistics.median(under[source]) for source, ms in medians.items()},
    }


def is_met(row: Row) -> bool:
    """Return whether a ratio is within its requirement."""
    return row.get("at_least", 0.0) <= row["ratio"] <= row.get("at_most", float("inf"))


def tables(rows: list[Row]) -> str:
    """Times by video, decoder and profile for each kind of clip, then the ratios."""
    shown = [_times_table(rows, kind) for kind in (FOUR.name, SIXTEEN.name, STRIDED.name)]
    return "\n\n".join(table for table in [*shown, _ratio_table(rows)] if table)


def _times_table(rows: list[Row], kind: str) -> str:
    means = [{**row, "source": ALL} for row in select(rows, ALL, kind=kind)]
    found = [*select(rows, "clip", kind=kind), *means]
    if not means:
        return ""
    profiles = names(means, "profile")
    middle = "balanced" if "balanced" in profiles else profiles[0]
    heads = [
        f"{kind}, CPU ms per clip",
        "decoder",
        *profiles,
        "frames decoded for one",
        "kB read",
        "worst PSNR, dB",
    ]
    lines = []
    for source, decoder in dict.fromkeys((row["source"], row["decoder"]) for row in found):
        own = {r["profile"]: r for r in found if (r["source"], r["decoder"]) == (source, decoder)}
        times = [_shown(own.get(profile, {}), "cpu_ms_per_clip", ".1f") for profile in profiles]
        facts = [
            _shown(own.get(middle, {}), *what)
            for what in (("frames_decoded_per_frame", ".1f"), ("kb_read_per_clip", ".0f"))
        ]
        lines.append(
            [source, f"`{decoder}`", *times, *facts, f"{min(r['min_psnr_db'] for r in own.values()):.1f}"]
        )
    return markdown(heads, lines) + f"\n\nFrames decoded and bytes read on `{middle}` chunks."


def _shown(row: Row, name: str, form: str) -> str | None:
    return format(row[name], form) if row.get(name) is not None else None


def _ratio_table(rows: list[Row]) -> str:
    found = select(rows, "ratio")
    lines = []
    for row in found:
        sources = ", ".join(f"{source} {value:.2f}" for source, value in row["by_source"].items())
        bounds = [f"{word.replace('_', ' ')} {row[word]}" for word in ("at_least", "at_most") if word in row]
        verdict = ("met: " if is_met(row) else "missed: ") + bounds[0] if bounds else None
        lines.append([row["kind"], row["slow"], row["fast"], f"{row['ratio']:.2f}", sources, verdict])
    if not lines:
        return ""
    table = markdown(("clip", "CPU time of", "over that of", "ratio", "by video", "required"), lines)
    if any("at_most" in row and not is_met(row) for row in found):
        table += "\n\nVOID: `paper-fused` is slower than torchcodec, so it is no fair baseline."
    return table


def draw(rows: list[Row]) -> Figure:
    """Draw processor time by profile and decoder, one panel for each kind of clip."""
    from matplotlib.figure import Figure

    kinds = names(select(rows, ALL), "kind")
    figure = Figure(figsize=(5 + 3.5 * len(kinds), 4.2), layout="constrained")
    panels = figure.subplots(1, len(kinds), squeeze=False, width_ratios=[2, *[1] * (len(kinds) - 1)])[0]
    for axis, kind in zip(panels, kinds, strict=True):
        own = select(rows, ALL, kind=kind)
        profiles = names(own, "profile")
        decoders = [name for name in _COLORS if name in names(own, "decoder")]
        width = 0.84 / max(len(decoders), 1)
        for place, decoder in enumerate(decoders):
            mine = [row for row in own if row["decoder"] == decoder]
            at = [profiles.index(row["profile"]) + width * (place - (len(decoders) - 1) / 2) for row in mine]
            costs = [row["cpu_ms_per_clip"] for row in mine]
            bars = axis.bar(at, costs, 0.95 * width, color=_COLORS[decoder], label=decoder)
            axis.bar_label(bars, fmt="%.1f", fontsize=6)
        axis.set_xticks(range(len(profiles)), profiles)
        axis.set(title=kind)
    panels[0].set_ylabel("processor ms per clip, one core")
    panels[0].legend(fontsize=7)
    return figure
