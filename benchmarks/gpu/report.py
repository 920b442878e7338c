"""The one-page summary of a stage of `benchmarks.gpu`, and the last lines that it prints."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.parts import PartResult
from benchmarks.report import Row, every_row, markdown, select

REQUIREMENT = {
    "nvdec_percent_flat_out_at_least": 80,
    "gpu_idle_share_of_vit_b16_fed_by_dali_below": 0.05,
    "mfu_of_vit_b16_at_least": 0.5,
    "all_frames_right": True,
}
LINES, WIDTH = 60, 190  # of what is printed at the end
_HIDDEN = re.compile("measured|at_s|spread_ms|top_kernels|frame_size|step_ms|data_wait_s|.*_per_clip")  # there


def summary(results: Sequence[PartResult], facts: dict[str, Any]) -> str:
    """Return the summary: targets, parts, and a table for each kind of row."""
    rows = [row for result in results for row in result.rows]
    ends = [(r.part, r.outcome, r.seconds, _short(r.reason, WIDTH)) for r in results]
    machine = f"{', '.join(facts['gpus']) or 'no GPU'}; {facts['cores']} cores ({facts['cpu']})"
    table = markdown(("part", "outcome", "seconds", "reason"), ends)
    return (
        "\n\n".join([machine, "\n".join(f"- {line}" for line in verdicts(rows)), table, every_row(rows)]) + "\n"
    )


def ending(results: Sequence[PartResult]) -> list[str]:
    """The last lines on the console: how the parts ended, targets, and rows while there is room."""
    rows = [row for result in results for row in result.rows]
    lines = [*map(outcome_line, results), *verdicts(rows)]
    # Failures first: they are what somebody must look at.
    details = [_line(row) for row in sorted(rows, key=lambda row: "failure" not in row)]
    room = LINES - len(lines)
    left = len(details) - room
    return [*lines, *(details if left <= 0 else [*details[: room - 1], f"... and {left + 1} rows more"])]


def outcome_line(result: PartResult) -> str:
    """How a part ended, in one line."""
    why = f": {result.reason}" if result.reason else ""
    return f"{result.part}: {result.outcome} after {result.seconds:.0f} s, {len(result.rows)} rows{why}"[:WIDTH]


def _line(row: Row) -> str:
    shown = {k: v for k, v in row.items() if not _HIDDEN.fullmatch(k) and v not in (None, "", [], False)}
    return _short(f"{row['measured']}: " + " ".join(f"{k}={_short(v, 60)}" for k, v in shown.items()), WIDTH)


def _short(value: object, width: int) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= width else text[: width - 3] + "..."


def verdicts(rows: Sequence[Row]) -> list[str]:
    """The targets that these rows tell about, and whether they are met."""
    found = []
    if checked := [row for row in select(rows, "frames", packets="planned") if "right" in row]:
        wrong = ", ".join(row["chunks"] for row in checked if not row["right"])
        right = sum(row["right"] for row in checked)
        found.append(f"frames right: {right} of {len(checked)} styles" + (f"; WRONG: {wrong}" if wrong else ""))
    if best := _fastest(select(rows, "loader", chunks="balanced", decoder="dali"), "nvdec_percent"):
        busy = best["nvdec_percent"]
        found.append(f"NVDEC >= 80 % flat out: {_met(busy >= 80)}, {busy} % at {_by_graphs(best)}")
    if best := _fastest(
        select(rows, "training", model="vit_b16", encoder="vit", decoder="dali"), "gpu_idle_share"
    ):
        idle = best["gpu_idle_share"]
        found.append(f"GPU idles < 5 % beside dali: {_met(idle < 0.05)}, {idle:.1%} at {_by_graphs(best)}")
    if best := _fastest(select(rows, "train step", encoder="vit", size="vit_b16", frames=4), "mfu"):
        how = [
            best["attention"],
            best["forced"],
            "compiled" if best["compile"] else "",
            best.get("compile_mode", "default").replace("default", ""),
            f"{best['batch']} clips",
        ]
        told = f"{best['mfu']:.1%} at {best['clips_per_s']:.0f} clips/s ({', '.join(filter(None, how))})"
        found.append(f"MFU of ViT-B >= 50 %: {_met(best['mfu'] >= 0.5)}, {told}")
    for row in select(rows, "training"):
        if "hours_for_20m_clips" in row:
            how = f"by {row['decoder']}, from {row['steps']} steps"
            found.append(f"20 million clips on one card: {row['hours_for_20m_clips']} h {how}")
    return found


def _fastest(rows: Sequence[Row], column: str) -> Row | None:
    return max(
        (row for row in rows if row.get(column) is not None), key=lambda r: r["clips_per_s"], default=None
    )


def _by_graphs(row: Row) -> str:
    return f"{row['clips_per_s']:.0f} clips/s with {row['graphs']} graphs of {row['threads']} threads"


def _met(is_met: bool) -> str:
    return "met" if is_met else "MISSED"
