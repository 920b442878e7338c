"""Ratios, tables and the picture of `benchmarks.decode`."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.corpus import FOUR, SIXTEEN, STRIDED
from benchmarks.machine import ROOT, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE = ROOT / "docs" / "decode.png"
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
_MEANS = ("cpu_ms_per_clip", "ms_p50", "ms_p90", "frames_decoded_per_frame", "kb_read_per_clip", "file_kb")
_COLOURS = {
    "cpu-fused": "#1f77b4",
    "paper-fused": "#d62728",
    "torchcodec": "#ff7f0e",
    "spdl": "#2ca02c",
    "decord": "#9467bd",
    "pyav": "#8c564b",
}


def select(rows: Iterable[Row], measured: str, **wanted: object) -> list[Row]:
    """Rows of one kind."""
    return [
        row
        for row in rows
        if row["measured"] == measured and all(row.get(name) == value for name, value in wanted.items())
    ]


def pooled(rows: list[Row]) -> list[Row]:
    """Means over the sources, for decoders that were right on all of them."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in select(rows, "clip"):
        groups.setdefault((row["profile"], row["kind"], row["decoder"]), []).append(row)
    return [
        {
            "measured": "all sources",
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
    """What is required of `cpu-fused`, and whether the baseline is a fair one."""
    found = [
        _ratio(rows, kind, slow=("compat", "paper-fused"), fast=(profile, "cpu-fused"))
        | {"at_least": least, "aim": aim}
        for profile, kind, least, aim in SPEED_UPS
        if select(rows, "all sources", profile=profile, kind=kind)
        and select(rows, "all sources", profile="compat", kind=kind)
    ]
    for kind in (FOUR.name, SIXTEEN.name, STRIDED.name):
        if select(rows, "all sources", profile="balanced", kind=kind, decoder="torchcodec"):
            wanted = {"at_least": TORCHCODEC_SPEED_UP} if kind == FOUR.name else {}
            slow, fast = ("balanced", "torchcodec"), ("balanced", "cpu-fused")
            found.append(_ratio(rows, kind, slow=slow, fast=fast) | wanted)
        if select(rows, "all sources", profile="compat", kind=kind, decoder="torchcodec"):
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


def rounded(value: Any) -> Any:
    """The same rows with four significant digits."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def is_met(row: Row) -> bool:
    """Whether a ratio keeps within what is required of it."""
    return row.get("at_least", 0.0) <= row["ratio"] <= row.get("at_most", float("inf"))


def readme_tables(rows: list[Row]) -> str:
    """The README's tables: times by decoder and profile, ratios, rates by processes."""
    tables = [_times_table(rows, kind) for kind in (FOUR.name, SIXTEEN.name, STRIDED.name)]
    tables += [_ratio_table(rows), _rates_table(rows)]
    missing = [f"{row['decoder']}: {row['missing']}" for row in select(rows, "decoder") if "missing" in row]
    return "\n\n".join([table for table in tables if table] + missing)


def _times_table(rows: list[Row], kind: str) -> str:
    found = select(rows, "all sources", kind=kind)
    profiles, decoders = _names(found, "profile"), _names(found, "decoder")
    if not found:
        return ""
    middle = "balanced" if "balanced" in profiles else profiles[0]
    columns = [*profiles, "frames decoded for one", "kB read a clip", "worst PSNR, dB"]
    lines = [f"| {kind}, CPU ms a clip | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for decoder in decoders:
        by_profile = {row["profile"]: row for row in found if row["decoder"] == decoder}
        cells = [_cell(by_profile.get(profile, {}), "cpu_ms_per_clip", ".1f") for profile in profiles]
        at_middle = by_profile.get(middle, {})
        cells.append(_cell(at_middle, "frames_decoded_per_frame", ".1f"))
        cells.append(_cell(at_middle, "kb_read_per_clip", ".0f"))
        cells.append(f"{min(row['min_psnr_db'] for row in by_profile.values()):.1f}")
        lines.append(f"| `{decoder}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + f"\n\nFrames decoded and bytes read on `{middle}` chunks."


def _cell(row: Row, name: str, form: str) -> str:
    return format(row[name], form) if row.get(name) is not None else "-"


def _names(rows: list[Row], column: str) -> list[str]:
    return list(dict.fromkeys(row[column] for row in rows))


def _ratio_table(rows: list[Row]) -> str:
    found = select(rows, "ratio")
    if not found:
        return ""
    lines = ["| clip | CPU time of | over that of | ratio | by source | required |", "|---" * 6 + "|"]
    for row in found:
        sources = ", ".join(f"{source} {value:.2f}" for source, value in row["by_source"].items())
        bounds = [f"{word.replace('_', ' ')} {row[word]}" for word in ("at_least", "at_most") if word in row]
        verdict = ("met: " if is_met(row) else "missed: ") + bounds[0] if bounds else "-"
        lines.append(
            f"| {row['kind']} | {row['slow']} | {row['fast']} | {row['ratio']:.2f} | {sources} | {verdict} |"
        )
    unfair = [row for row in found if "at_most" in row and not is_met(row)]
    if unfair:
        lines.append("\nVOID: `paper-fused` is slower than torchcodec, so it is no fair baseline.")
    return "\n".join(lines)


def _rates_table(rows: list[Row]) -> str:
    found = select(rows, "processes")
    if not found:
        return ""
    counts = sorted({row["processes"] for row in found})
    columns = [f"{n} process{'es' * (n > 1)}" for n in counts]
    head = f"| clips/s (ms p50 / p90), {FOUR.name} | "
    lines = [head + " | ".join(columns) + " |", "|---" * (len(counts) + 1) + "|"]
    for profile in _names(found, "profile"):
        for decoder in _names(found, "decoder"):
            own = [row for row in found if (row["profile"], row["decoder"]) == (profile, decoder)]
            cells = [f"{row['clips_per_s']:.0f} ({row['ms_p50']:.1f} / {row['ms_p90']:.1f})" for row in own]
            lines.append(f"| `{decoder}`, {profile} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: list[Row], path: Path = PICTURE) -> Path:
    """Draw processor time by profile, and rate and time of a clip by processes.

    Returns:
        The picture's path.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained", width_ratios=(2, 1, 1))
    _draw_costs(axes[0], select(rows, "all sources", kind=FOUR.name))
    _draw_by_processes(axes[1], rows, "clips_per_s", "clips/s")
    _draw_by_processes(axes[2], rows, "ms_p50", "ms a clip in its process, median")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return path


def _draw_costs(axis: Axes, rows: list[Row]) -> None:
    profiles = _names(rows, "profile")
    decoders = [name for name in _COLOURS if name in _names(rows, "decoder")]
    width = 0.84 / max(len(decoders), 1)
    for place, decoder in enumerate(decoders):
        own = [row for row in rows if row["decoder"] == decoder]
        at = [profiles.index(row["profile"]) + width * (place - (len(decoders) - 1) / 2) for row in own]
        costs = [row["cpu_ms_per_clip"] for row in own]
        bars = axis.bar(at, costs, 0.95 * width, color=_COLOURS[decoder], label=decoder)
        axis.bar_label(bars, fmt="%.1f", fontsize=6)
    axis.set_xticks(range(len(profiles)), profiles)
    axis.set(ylabel="processor ms a clip, one core", title=FOUR.name)
    axis.legend(fontsize=7)


def _draw_by_processes(axis: Axes, rows: list[Row], column: str, label: str) -> None:
    for line, profile in (("-", "balanced"), (":", "compat")):
        for decoder, colour in _COLOURS.items():
            own = select(rows, "processes", profile=profile, decoder=decoder)
            counts = [row["processes"] for row in own]
            name = decoder if profile == "balanced" else None
            axis.plot(counts, [row[column] for row in own], f"o{line}", color=colour, label=name, markersize=4)
    axis.set_xticks(sorted({row["processes"] for row in select(rows, "processes")}))
    axis.set(xlabel="processes", ylabel=label, ylim=(0, None), title="solid: balanced, dotted: compat")
