"""Tables and the picture of `benchmarks.loader`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from benchmarks.report import Row, markdown, names, select

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KEYS = ("measured", "profile", "clip", "decoder", "workers")
HIGHER_IS_BETTER = "clips_per_s"
CEILING = "trainer_ceiling_clips_per_s"
COLORS = {"cpu-fused": "#1f77b4", "paper-fused": "#d62728"}


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


def tables(rows: list[Row]) -> str:
    """Rates by profile and decoder, what the training process costs, and simulated machines."""
    most = max(row["workers"] for row in select(rows, "loading"))
    lines = []
    for row in select(rows, "loading", workers=1):
        profile, clip, decoder = _case(row)
        many = select(rows, "loading", profile=profile, clip=clip, decoder=decoder, workers=most)[0]
        times = many["clips_per_s"] / row["clips_per_s"]
        rates = [f"{row['clips_per_s']:.0f}", f"{many['clips_per_s']:.0f} ({times:.2f}x)"]
        costs = f"{row['worker_cpu_ms_per_clip']:.2f} + {row['trainer_cpu_ms_per_clip']:.2f}"
        lines.append([clip, profile, f"`{decoder}`", *rates, costs])
    heads = ("clip", "profile", "decoder", "clips/s, 1 worker", f"{most} workers", "CPU ms, worker + trainer")
    return "\n\n".join([markdown(heads, lines), _transport_table(rows), _simulated_table(rows)])


def _transport_table(rows: list[Row]) -> str:
    columns = ("trainer_cpu_ms_per_clip", CEILING, f"{CEILING}_in_place")
    lines = ([row["clip"], *(row[name] for name in columns)] for row in select(rows, "transport"))
    return markdown(("clip", "trainer, CPU ms per clip", "clips/s at most", "the same, not copied"), lines)


def _simulated_table(rows: list[Row]) -> str:
    heads = ("clip", "profile", "workers, simulated", "clips/s they can", "delivered", "cores busy")
    lines = []
    for row in select(rows, "simulated"):
        wanted, got = row["clips_per_s_wanted"], row["clips_per_s"]
        delivered = f"{got:,.0f} ({got / wanted:.0%})"
        lines.append(
            [
                row["clip"],
                row["profile"],
                row["workers"],
                f"{wanted:,.0f}",
                delivered,
                f"{row['cores_busy']:.1f}",
            ]
        )
    return markdown(heads, lines)


def draw(rows: list[Row]) -> Figure:
    """Draw processor time per clip, and rates by workers."""
    from matplotlib.figure import Figure

    clips, simulated = (names(select(rows, what), "clip") for what in ("loading", "simulated"))
    columns = max(len(clips), len(simulated))
    figure = Figure(figsize=(4 * columns, 7), layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False)
    for axis, clip in zip(axes[0], clips, strict=False):
        _draw_costs(axis, select(rows, "loading", workers=1, clip=clip))
        axis.set(title=clip)
    for axis, clip in zip(axes[1], simulated, strict=False):
        _draw_rates(axis, rows, clip)
    for axis in (*axes[0][len(clips) :], *axes[1][len(simulated) :]):
        axis.set_visible(False)
    return figure


def _draw_costs(axis: Axes, rows: list[Row]) -> None:
    profiles = names(rows, "profile")
    for place, (decoder, color) in enumerate(COLORS.items()):
        own = [row for row in rows if row["decoder"] == decoder]
        at = [profiles.index(row["profile"]) + 0.4 * (place - 0.5) for row in own]
        costs = [row["worker_cpu_ms_per_clip"] for row in own]
        trainer = [row["trainer_cpu_ms_per_clip"] for row in own]
        axis.bar(at, costs, 0.38, color=color, label=decoder)
        label = None if place else "trainer's process"
        tops = axis.bar(at, trainer, 0.38, bottom=costs, color="black", label=label)
        axis.bar_label(tops, [f"{a + b:.1f}" for a, b in zip(costs, trainer, strict=True)], fontsize=7)
    axis.set_xticks(range(len(profiles)), profiles)
    axis.set_ylabel("processor ms per clip")
    axis.legend(fontsize=7)


def _draw_rates(axis: Axes, rows: list[Row], clip: str) -> None:
    """Rates against workers; dashed where workers slept instead of decoding, dotted what they asked for."""
    from matplotlib.ticker import NullFormatter

    profiles = names(select(rows, "loading"), "profile")
    for number, profile in enumerate(profiles):
        for decoder, mark in (("cpu-fused", "o-"), ("paper-fused", "x:")):
            own = select(rows, "loading", profile=profile, clip=clip, decoder=decoder)
            label = profile if decoder == "cpu-fused" else None
            axis.plot(*_points(own), mark, color=f"C{number}", label=label, markersize=4)
        axis.plot(
            *_points(select(rows, "simulated", profile=profile, clip=clip)),
            "s--",
            color=f"C{number}",
            markersize=4,
        )
    ceilings = [row[f"{CEILING}_in_place"] for row in select(rows, "transport", clip=clip)]
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
