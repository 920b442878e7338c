"""The one-page summary of `benchmarks.gpu`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.gpu.parts import PartResult
from benchmarks.machine import versions
from benchmarks.report import Row, markdown, select

REQUIREMENT = {
    "nvdec_percent_on_balanced_512x288_at_least": 80,
    "data_wait_share_of_vit_b16_below": 0.05,
    "all_frames_right": True,
}

# Columns that the summary shows of each kind of row.
_COLUMNS = {
    "media": "style, size, mbit_per_s, seconds_since_start",
    "correctness": "style, size, packets, packets_per_clip, min_psnr_db, max_bias_levels, right, "
    "left_to_cpu_fused, clips_with_wrong_numbers",
    "throughput": "style, size, threads, clips_per_s, frames_decoded_per_s, nvdec_percent, "
    "kernels_percent, gpu_memory_mb",
    "training": "style, decoder, micro_batch, clips_per_s, step_s, data_wait_share, kernels_percent, "
    "nvdec_percent, trainer_memory_mb",
    "loader": "style, decoder, workers, clips_per_s, worker_cpu_ms_per_clip, trainer_cpu_ms_per_clip, "
    "cores_busy, nvdec_percent",
    "train step": "encoder, size, frames, batch, attention, checkpoint_every, compile, step_ms, clips_per_s, "
    "model_tflop_per_s, mfu, hfu, memory_gib",
    "model memory": "encoder, frames, method, counted MiB a clip, allocated MiB a clip",
    "largest batch": "encoder, frames, method, trained with, clips_per_s",
}


def summary(results: Sequence[PartResult], facts: dict[str, Any]) -> str:
    """Return the summary."""
    rows = [row for result in results for row in result.rows]
    found = versions()
    shown = ("python", "torch", "nvidia-dali-cuda130", "av")
    lines = [
        "# GPU suite",
        "",
        f"{', '.join(facts['gpus']) or 'no GPU'}; {facts['cores']} cores ({facts['cpu']}); "
        + ", ".join(f"{name} {found[name]}" for name in shown if name in found),
        *(_facts(row) for row in rows if row["measured"] in ("machine", "codecs")),
        "",
        *(f"- {line}" for line in verdicts(rows)),
        "",
        table([vars(r) for r in results], ["part", "outcome", "seconds", "reason"]),
    ]
    for kind, columns in _COLUMNS.items():
        own = select(rows, kind)
        if own:
            lines += ["", f"## {kind}", "", table(own, columns.split(", "))]
    return "\n".join(lines) + "\n"


def ending(results: Sequence[PartResult]) -> list[str]:
    """The end of what is printed: how the parts ended, and which targets are met."""
    return [*map(outcome_line, results), *verdicts([row for result in results for row in result.rows])]


def outcome_line(result: PartResult) -> str:
    """How a part ended, in one line."""
    why = f": {result.reason}" if result.reason else ""
    return f"{result.part}: {result.outcome} after {result.seconds:.0f} s, {len(result.rows)} rows{why}"


def verdicts(rows: Sequence[Row]) -> list[str]:
    """The targets, and whether they are met; those that were not measured are not."""
    return [_frames_verdict(rows), _nvdec_verdict(rows), _waiting_verdict(rows), _step_verdict(rows)]


def _frames_verdict(rows: Sequence[Row]) -> str:
    checked = [row for row in select(rows, "correctness") if "right" in row]
    wrong = [f"{row['style']} {row['size']} ({row['packets']})" for row in checked if not row["right"]]
    if not checked:
        return "frames right: not measured"
    return f"frames right: {len(checked) - len(wrong)} of {len(checked)}" + (
        f"; WRONG: {', '.join(wrong)}" if wrong else ""
    )


def _nvdec_verdict(rows: Sequence[Row]) -> str:
    title = "NVDEC >= 80 % flat out on balanced 512x288"
    found = select(rows, "throughput", style="balanced", size="512x288")
    busy = [row for row in found if "nvdec_percent" in row]
    if not busy:
        return f"{title}: not measured"
    best = max(busy, key=lambda row: row["nvdec_percent"])
    how = f"{best['nvdec_percent']} % with {best['threads']} threads"
    fastest = max(busy, key=lambda row: row["clips_per_s"])
    met = "met" if best["nvdec_percent"] >= 80 else "MISSED"
    return f"{title}: {met}, {how}; fastest {fastest['clips_per_s']} clips/s with {fastest['threads']} threads"


def _waiting_verdict(rows: Sequence[Row]) -> str:
    title = "ViT-B waits < 5 % for data"
    trained = select(rows, "training", model="vit_b16", decoder="dali", style="balanced")
    found = [row for row in trained if "data_wait_share" in row]
    if not found:
        return f"{title}: not measured"
    share = found[0]["data_wait_share"]
    return f"{title}: {'met' if share < 0.05 else 'MISSED'}, {share:.1%} at {found[0]['clips_per_s']} clips/s"


def _step_verdict(rows: Sequence[Row]) -> str:
    title = "fastest step of ViT-B, 4 frames"
    steps = select(rows, "train step", encoder="vit", size="vit_b16", frames=4)
    found = [row for row in steps if "clips_per_s" in row]
    if not found:
        return f"{title}: not measured"
    best = max(found, key=lambda row: row["clips_per_s"])
    how = f"{best['attention']}{', compiled' if best['compile'] else ''}, {best['batch']} clips"
    share = "not known" if best["mfu"] is None else f"{best['mfu']:.1%}"
    return f"{title}: {best['clips_per_s']} clips/s ({how}), MFU {share}"


def table(rows: Iterable[Row], columns: list[str]) -> str:
    """Return a Markdown table; the last cell of a row that was not measured is the reason."""
    lines = []
    for row in rows:
        cells = [_cell(row.get(name, "")) for name in columns]
        cells[-1] = cells[-1] or _cell(row.get("not_run") or row.get("failure") or "")
        lines.append(cells)
    return markdown(columns, lines)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        value = "; ".join(map(str, value))
    text = str(value).replace("|", "/").replace("\n", " ")
    return text if len(text) <= 160 else text[:157] + "..."


def _facts(row: Row) -> str:
    return "; ".join(f"{name} {value}" for name, value in row.items() if name != "measured")
