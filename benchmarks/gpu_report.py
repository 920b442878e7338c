"""The one-page summary of `benchmarks.gpu_suite`. Light: the suite's own process imports it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.gpu_parts import PartResult
from benchmarks.machine import Row, versions

REQUIREMENT = {
    "nvdec_percent_on_balanced_512x288_at_least": 80,
    "data_wait_share_of_vit_b16_below": 0.05,
    "all_frames_right": True,
}

# For each kind of row: title, columns (key, heading).
_TABLES: dict[str, tuple[str, dict[str, str]]] = {
    "media": (
        "Chunks",
        {"style": "style", "size": "size", "mbit_per_s": "Mbit/s", "seconds_since_start": "ready after, s"},
    ),
    "correctness": (
        "Frames of DALI against cpu-fused",
        {
            **{"style": "style", "size": "size", "packets": "packets", "packets_per_clip": "packets a clip"},
            **{"min_psnr_db": "worst, dB", "max_bias_levels": "bias, levels", "right": "right"},
            **{"left_to_cpu_fused": "left to cpu-fused", "clips_with_wrong_numbers": "wrong numbers"},
        },
    ),
    "throughput": (
        "The graph alone, flat out",
        {
            **{"style": "style", "size": "size", "threads": "threads", "graphs": "graphs"},
            **{"clips_per_s": "clips/s", "frames_decoded_per_s": "frames decoded/s"},
            **{"nvdec_percent": "NVDEC %", "kernels_percent": "kernels %", "gpu_memory_mb": "GPU MB"},
        },
    ),
    "training": (
        "Training",
        {
            **{"style": "style", "decoder": "decoder", "micro_batch": "clips", "clips_per_s": "clips/s"},
            **{"step_s": "step, s", "data_wait_share": "waits", "kernels_percent": "kernels %"},
            **{"nvdec_percent": "NVDEC %", "trainer_memory_mb": "MiB"},
        },
    ),
    "loader": (
        "The loader",
        {
            **{"style": "style", "decoder": "decoder", "workers": "workers", "clips_per_s": "clips/s"},
            **{"worker_cpu_ms_per_clip": "worker ms", "trainer_cpu_ms_per_clip": "trainer ms"},
            **{"cores_busy": "cores", "nvdec_percent": "NVDEC %"},
        },
    ),
    "train step": (
        "A training step, its clips on the GPU",
        {
            **{"encoder": "encoder", "size": "size", "frames": "frames", "batch": "clips"},
            **{"attention": "attention", "checkpoint_every": "recompute", "compile": "compiled"},
            **{"step_ms": "step, ms", "clips_per_s": "clips/s", "model_tflop_per_s": "model TFLOP/s"},
            **{"mfu": "MFU", "hfu": "HFU", "memory_gib": "GiB"},
        },
    ),
    "model memory": (
        "Memory of a clip in a model, MiB",
        {
            **{"encoder": "encoder", "frames": "frames", "method": "method"},
            **{"counted MiB a clip": "counted", "allocated MiB a clip": "allocated"},
            **{"peak MiB a clip": "peak of a step", "largest batch by slope": "largest batch"},
        },
    ),
    "largest batch": (
        "The largest batch that trains",
        {
            **{"encoder": "encoder", "frames": "frames", "method": "method"},
            **{"trained with": "clips", "clips_per_s": "clips/s", "note": "note"},
        },
    ),
    "library": (
        "Other libraries on the GPU",
        {
            **{
                "library": "library",
                "threads": "threads",
                "clips_per_s": "clips/s",
                "nvdec_percent": "NVDEC %",
            },
            "min_psnr_db": "worst, dB",
        },
    ),
    "memory": (
        "Memory over many batches: growth after the first quarter, MB",
        {
            **{"size": "size", "batches_read": "batches", "trainer_mb_growth_after_a_quarter": "trainer"},
            **{"largest_worker_mb_growth_after_a_quarter": "worker", "gpu_mb_growth_after_a_quarter": "GPU"},
        },
    ),
    "first batch": (
        "First batch",
        {
            **{"decoder": "decoder", "turn": "turn", "loader_made_s": "loader made, s"},
            **{"first_batch_s": "first batch, s", "second_batch_s": "second, s"},
        },
    ),
    "damage": (
        "Damaged packets",
        {"style": "style", "damage": "damage", "without_crc": "without CRC", "with_crc": "with CRC"},
    ),
    "tests": (
        "Tests marked gpu",
        {"passed": "passed", "failed": "failed", "skipped": "skipped", "failures": "failures"},
    ),
}


def summary(results: Sequence[PartResult], facts: dict[str, Any]) -> str:
    """Put everything on one page.

    Args:
        results: of the parts so far.
        facts: of the machine.

    Returns:
        Markdown.
    """
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
        *table([vars(r) for r in results], {n: n for n in ("part", "outcome", "seconds", "reason")}),
    ]
    for kind, (title, columns) in _TABLES.items():
        own = [row for row in rows if row["measured"] == kind]
        if own:
            lines += ["", f"## {title}", "", *table(own, columns)]
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
    checked = [row for row in rows if row["measured"] == "correctness" and "right" in row]
    wrong = [f"{row['style']} {row['size']} ({row['packets']})" for row in checked if not row["right"]]
    if not checked:
        return "frames right: not measured"
    return f"frames right: {len(checked) - len(wrong)} of {len(checked)}" + (
        f"; WRONG: {', '.join(wrong)}" if wrong else ""
    )


def _nvdec_verdict(rows: Sequence[Row]) -> str:
    title = "NVDEC >= 80 % flat out on balanced 512x288"
    wanted = {"measured": "throughput", "style": "balanced", "size": "512x288"}
    busy = [row for row in _select(rows, wanted) if "nvdec_percent" in row]
    if not busy:
        return f"{title}: not measured"
    best = max(busy, key=lambda row: row["nvdec_percent"])
    how = f"{best['nvdec_percent']} % with {best['threads']} threads and {best['graphs']} graphs"
    fastest = max(busy, key=lambda row: row["clips_per_s"])
    met = "met" if best["nvdec_percent"] >= 80 else "MISSED"
    return f"{title}: {met}, {how}; fastest {fastest['clips_per_s']} clips/s with {fastest['threads']} threads"


def _waiting_verdict(rows: Sequence[Row]) -> str:
    title = "ViT-B waits < 5 % for data"
    wanted = {"measured": "training", "model": "vit_b16", "decoder": "dali", "style": "balanced"}
    found = [row for row in _select(rows, wanted) if "data_wait_share" in row]
    if not found:
        return f"{title}: not measured"
    share = found[0]["data_wait_share"]
    return f"{title}: {'met' if share < 0.05 else 'MISSED'}, {share:.1%} at {found[0]['clips_per_s']} clips/s"


def _step_verdict(rows: Sequence[Row]) -> str:
    title = "fastest step of ViT-B, 4 frames"
    wanted = {"measured": "train step", "encoder": "vit", "size": "vit_b16", "frames": 4}
    found = [row for row in _select(rows, wanted) if "clips_per_s" in row]
    if not found:
        return f"{title}: not measured"
    best = max(found, key=lambda row: row["clips_per_s"])
    how = f"{best['attention']}{', compiled' if best['compile'] else ''}, {best['batch']} clips"
    share = "not known" if best["mfu"] is None else f"{best['mfu']:.1%}"
    return f"{title}: {best['clips_per_s']} clips/s ({how}), MFU {share}"


def _select(rows: Sequence[Row], wanted: Row) -> list[Row]:
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def table(rows: Iterable[Row], columns: dict[str, str]) -> list[str]:
    """Lines of a Markdown table; what kept a row from being measured stands in its last cell."""
    lines = ["| " + " | ".join(columns.values()) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = [_cell(row.get(name, "")) for name in columns]
        obstacle = row.get("not_run") or row.get("failure") or row.get("failures")
        if obstacle and not cells[-1]:
            cells[-1] = _cell(obstacle)
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _cell(value: Any) -> str:
    if isinstance(value, list):
        value = "; ".join(map(str, value))
    text = str(value).replace("|", "/").replace("\n", " ")
    return text if len(text) <= 160 else text[:157] + "..."


def _facts(row: Row) -> str:
    return "; ".join(f"{name} {value}" for name, value in row.items() if name != "measured")
