"""Tables and the picture of `benchmarks.loader`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.machine import ROOT, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KEYS = ("measured", "profile", "clip", "decoder", "workers")
HIGHER_IS_BETTER = "clips_per_s"
PICTURE = ROOT / "docs" / "loader.png"
COLOURS = {"cpu-fused": "#1f77b4", "paper-fused": "#d62728"}


def best_of_rounds(rows: Iterable[Row]) -> list[Row]:
    """Merge the rounds of each measurement: other programs only ever slow one down, so the fastest counts."""
    best: dict[tuple[object, ...], Row] = {}
    for row in rows:
        key = tuple(row[name] for name in KEYS)
        if key not in best:
            best[key] = {**row, "rounds": 1}
            continue
        fastest = max(best[key], row, key=lambda r: r[HIGHER_IS_BETTER])
        cheapest = {n: min(best[key][n], row[n]) for n in row if n.endswith("cpu_ms_per_clip")}
        best[key] = {**fastest, **cheapest, "rounds": best[key]["rounds"] + 1}
    return list(best.values())


def speed_ups(rows: list[Row]) -> list[Row]:
    """Clips per second of every worker count over that of one worker."""
    single = {_case(row): row for row in rows if row["workers"] == 1}
    return [
        {
            "measured": "speed-up",
            **dict(zip(KEYS[1:4], _case(row), strict=True)),
            "workers": row["workers"],
            "speed_up": round(row["clips_per_s"] / single[_case(row)]["clips_per_s"], 3),
        }
        for row in rows
        if row["workers"] > 1 and _case(row) in single
    ]


def _case(row: Row) -> tuple[str, str, str]:
    return row["profile"], row["clip"], row["decoder"]


def _of(rows: list[Row], measured: str, **wanted: object) -> list[Row]:
    return [
        row
        for row in rows
        if row["measured"] == measured and all(row[name] == value for name, value in wanted.items())
    ]


def readme_table(rows: list[Row]) -> str:
    """The README's rows: rates by profile and decoder, what the trainer's process costs, simulated machines."""
    most = max(row["workers"] for row in _of(rows, "loading"))
    lines = [
        f"| clip | profile | decoder | clips/s, 1 worker | {most} workers | CPU ms a clip, worker + trainer |",
        "|---|---|---|---|---|---|",
    ]
    for row in _of(rows, "loading", workers=1):
        profile, clip, decoder = _case(row)
        many = _of(rows, "loading", profile=profile, clip=clip, decoder=decoder, workers=most)[0]
        lines.append(
            f"| {clip} | {profile} | `{decoder}` | {row['clips_per_s']:.0f} | {many['clips_per_s']:.0f} "
            f"({many['clips_per_s'] / row['clips_per_s']:.2f}x) "
            f"| {row['worker_cpu_ms_per_clip']:.2f} + {row['trainer_cpu_ms_per_clip']:.2f} |"
        )
    ratios = [row["speed_up"] for row in _of(rows, "speed-up", workers=most)]
    if ratios:
        lines += ["", f"{most} workers deliver {min(ratios):.2f} to {max(ratios):.2f} times the clips of one."]
    return "\n".join([*lines, "", *_transport_lines(rows), "", *_simulated_lines(rows)])


def _transport_lines(rows: list[Row]) -> list[str]:
    lines = [
        "| clip | plan | pool, trainer | pool, worker | copy out | trainer in all | clips/s at most | GPU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in _of(rows, "transport"):
        parts = ("plan", "pool_trainer", "pool_worker", "copy")
        costs = " | ".join(f"{row[f'{name}_ms_per_clip']:.3f} ms" for name in parts)
        lines.append(
            f"| {row['clip']} | {costs} | {row['trainer_cpu_ms_per_clip']:.3f} ms "
            f"| {row['trainer_ceiling_clips_per_s']:,} | {row['trainer_ceiling_clips_per_s_in_place']:,} |"
        )
    return lines


def _simulated_lines(rows: list[Row]) -> list[str]:
    lines = [
        "| clip | profile | workers, simulated | clips/s they can | delivered | cores busy |",
        "|---|---|---|---|---|---|",
    ]
    for row in _of(rows, "simulated"):
        lines.append(
            f"| {row['clip']} | {row['profile']} | {row['workers']} | {row['clips_per_s_wanted']:,.0f} "
            f"| {row['clips_per_s']:,.0f} ({row['clips_per_s'] / row['clips_per_s_wanted']:.0%}) "
            f"| {row['cores_busy']:.1f} |"
        )
    return lines


def draw(rows: list[Row], path: Path = PICTURE) -> Path:
    """Draw processor time a clip, rates by workers, and memory over many clips.

    Returns:
        The picture's path.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    clips, simulated = (
        list(dict.fromkeys(row["clip"] for row in _of(rows, what))) for what in ("loading", "simulated")
    )
    columns = max(len(clips), len(simulated) + 1)
    figure, axes = plt.subplots(2, columns, figsize=(4 * columns, 7), layout="constrained")
    for axis in axes.flat:
        axis.set_visible(False)
    for axis, clip in zip(axes[0], clips, strict=False):
        _draw_costs(axis, _of(rows, "loading", workers=1, clip=clip))
        axis.set(title=clip, visible=True)
    for axis, clip in zip(axes[1], simulated, strict=False):
        _draw_rates(axis, rows, clip)
        axis.set_visible(True)
    _draw_memory(axes[1][-1], _of(rows, "memory")[0])
    axes[1][-1].set_visible(True)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return path


def _draw_costs(axis: Axes, rows: list[Row]) -> None:
    profiles = list(dict.fromkeys(row["profile"] for row in rows))
    for place, (decoder, colour) in enumerate(COLOURS.items()):
        own = [row for row in rows if row["decoder"] == decoder]
        at = [profiles.index(row["profile"]) + 0.4 * (place - 0.5) for row in own]
        costs = [row["worker_cpu_ms_per_clip"] for row in own]
        trainer = [row["trainer_cpu_ms_per_clip"] for row in own]
        axis.bar(at, costs, 0.38, color=colour, label=decoder)
        label = None if place else "trainer's process"
        tops = axis.bar(at, trainer, 0.38, bottom=costs, color="black", label=label)
        axis.bar_label(tops, [f"{a + b:.1f}" for a, b in zip(costs, trainer, strict=True)], fontsize=7)
    axis.set_xticks(range(len(profiles)), profiles)
    axis.set_ylabel("processor ms a clip")
    axis.legend(fontsize=7)


def _draw_rates(axis: Axes, rows: list[Row], clip: str) -> None:
    """Rates against workers; dashed where workers slept instead of decoding, dotted what they asked for."""
    from matplotlib.ticker import NullFormatter

    profiles = list(dict.fromkeys(row["profile"] for row in _of(rows, "loading")))
    for number, profile in enumerate(profiles):
        for decoder, mark in (("cpu-fused", "o-"), ("paper-fused", "x:")):
            own = _of(rows, "loading", profile=profile, clip=clip, decoder=decoder)
            label = profile if decoder == "cpu-fused" else None
            axis.plot(*_points(own), mark, color=f"C{number}", label=label, markersize=4)
        axis.plot(
            *_points(_of(rows, "simulated", profile=profile, clip=clip)),
            "s--",
            color=f"C{number}",
            markersize=4,
        )
    ceilings = [row["trainer_ceiling_clips_per_s_in_place"] for row in _of(rows, "transport", clip=clip)]
    for ceiling in ceilings:
        axis.axhline(ceiling, color="black", linewidth=0.8)
        axis.text(1, ceiling, "one trainer process at most", fontsize=7, va="bottom")
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="workers (dashed: simulated; x: paper-fused)",
        ylabel="clips/s",
        title=clip,
    )
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_formatter("{x:,.0f}")
        scale.set_minor_formatter(NullFormatter())
    axis.legend(fontsize=7)


def _points(rows: list[Row]) -> tuple[list[int], list[float]]:
    return [row["workers"] for row in rows], [row["clips_per_s"] for row in rows]


def _draw_memory(axis: Axes, row: Row) -> None:
    axis.plot(row["clips"], row["trainer_private_mb"], color="black", label="trainer's process")
    axis.plot(row["clips"], row["worker_private_mb"], color="C0", label="largest worker")
    axis.set(
        xlabel="clips", ylabel="private memory, MB", ylim=(0, None), title=f"{row['files']} files, balanced"
    )
    axis.legend(fontsize=7)
