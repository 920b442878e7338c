"""Tables of `benchmarks.loader`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.report import Row, markdown, select

KEYS = ("measured", "profile", "clip", "decoder", "workers")
HIGHER_IS_BETTER = "clips_per_s"
CEILING = "trainer_ceiling_clips_per_s"


def best_of_rounds(rows: Iterable[Row], keys: Sequence[str] = KEYS) -> list[Row]:
    """Merge the rounds of each measurement: other programs only slow one down, so the fastest counts."""
    best: dict[tuple[object, ...], Row] = {}
    for row in rows:
        key = tuple(row[name] for name in keys)
        if key not in best:
            best[key] = {**row, "rounds": 1}
            continue
        fastest = max(best[key], row, key=lambda r: r.get(HIGHER_IS_BETTER, 0.0))
        cheapest = {n: min(best[key][n], row[n]) for n in row if n.endswith("cpu_ms_per_clip")}
        best[key] = {**fastest, **cheapest, "rounds": best[key]["rounds"] + 1}
    return list(best.values())


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
