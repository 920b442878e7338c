"""The GPU suite on a machine without a GPU: what it can do there, and that no part harms another."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import odd_parts
import pytest

pytest.importorskip("nvidia.dali")
from benchmarks.gpu import chunks, correctness, report, suite
from benchmarks.gpu.parts import QUICK, Part, PartResult
from benchmarks.machine import ROOT
from benchmarks.train.memory import METHODS

TESTS = Path(__file__).parent
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="parts end with the suite on Linux only"),
    pytest.mark.timeout(240),  # eight processes that import much
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu_suite")


@pytest.fixture(scope="module")
def run(folder: Path) -> subprocess.CompletedProcess:
    """The whole suite, as it is run on a GPU machine, but tiny."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--output", str(folder)]
    return subprocess.run(
        [*command, "--device", "cpu", "--quick"], cwd=ROOT, capture_output=True, text=True, timeout=220
    )


@pytest.fixture(scope="module")
def rows(run: subprocess.CompletedProcess, folder: Path) -> list[dict]:
    return json.loads((folder / "gpu_suite.json").read_text())["rows"]


def of(rows: list[dict], measured: str) -> list[dict]:
    return [row for row in rows if row["measured"] == measured]


def test_every_part_is_done_or_says_why_not(run, rows):
    assert run.returncode == 0, run.stdout + run.stderr
    ends = {row["part"]: (row["outcome"], row["reason"]) for row in of(rows, "part")}
    assert list(ends) == [part.name for part in suite.PARTS]
    without_gpu = ("not run", "no GPU (--device cpu)")
    needing = {"machine"}
    assert ends == {name: without_gpu if name in needing else ("done", "") for name in ends}
    assert not [row for row in rows if "failure" in row]


def test_frames_of_dali_are_right_and_other_codecs_say_why_not(rows):
    found = of(rows, "correctness")
    wanted = [*((style, "128x96") for style in chunks.STYLES), ("vp9", "126x96")]
    assert {(row["style"], row["size"], row["packets"]) for row in found} == {
        (*kind, packets) for kind in wanted for packets in correctness.PACKETS
    }
    for row in found:
        if row["style"] == "vp9":
            assert row["right"] and row["clips"] == QUICK.checked and row["min_psnr_db"] > 45
            assert row["clips_with_wrong_numbers"] == row["failures"] == []
        else:
            assert "does not decode" in row["not_run"]


def test_rates_by_threads_size_and_style(rows):
    found = of(rows, "throughput")
    measured = {(r["size"], r["threads"]) for r in found if "clips_per_s" in r}
    assert {("128x96", 2), ("128x96", 1), ("126x96", 2)} <= measured
    assert {row["style"] for row in found if "not_run" in row} == set(chunks.STYLES) - {"vp9"}
    for row in found:
        if "clips_per_s" in row:
            decoded_per_clip = row["frames_decoded_per_s"] / row["clips_per_s"]
            assert decoded_per_clip == pytest.approx(row["packets_per_clip"], rel=0.02)


def test_a_training_is_fed_by_each_decoder(rows):
    found = {row["decoder"]: row for row in of(rows, "training")}
    assert set(found) == {"dali", "cpu-fused", "none: one batch again and again"}
    for row in found.values():
        assert row["micro_batch"] == 4 and row["model"] == "tiny" and row["clips_per_s"] > 0
        assert 0 <= row["data_wait_share"] <= 1


def test_loaders_are_timed(rows):
    rates = {(row["style"], row["decoder"]): row for row in of(rows, "loader")}
    assert rates["vp9", "dali"]["clips_per_s"] > 0 and rates["vp9", "dali"]["left_to_cpu_fused"] == 0
    assert rates["compat", "cpu-fused"]["clips_per_s"] > 0
    assert "h264 chunks" in rates["compat", "dali"]["not_run"]


def test_models_of_all_kinds_are_stepped_and_weighed(rows):
    steps = of(rows, "train step")
    timed = [row for row in steps if "clips_per_s" in row]
    assert {row["encoder"] for row in timed} == {"vit", "timesformer", "videomae"}
    assert {row["attention"] for row in timed} == {"sdpa", "math"}
    assert {row["checkpoint_every"] for row in timed} == {0, 1} and not any(row["compile"] for row in timed)
    assert all(
        "need a GPU" in row["not_run"] or "pip install" in row["not_run"] for row in steps if row not in timed
    )
    weighed = {(row["encoder"], row["frames"], row["method"]): row for row in of(rows, "model memory")}
    assert len(weighed) == 12
    counted = [weighed["vit tiny", 4, method.name]["counted MiB a clip"] for method in METHODS]
    assert counted[0] > counted[1] > counted[2] > 0


def test_the_summary_names_parts_targets_and_obstacles(run, folder):
    text = (folder / "summary.md").read_text()
    assert text in run.stdout
    for part in suite.PARTS:
        assert f"| {part.name} | " in text
    assert "- frames right: 4 of 4\n" in text
    assert "- NVDEC >= 80 % flat out on balanced 512x288: not measured" in text
    assert "DALI does not decode h264 without a GPU" in text
    assert len(text.splitlines()) < 180


def options(folder: Path, budget_s: float = 60.0) -> argparse.Namespace:
    return argparse.Namespace(output=folder, budget_s=budget_s, device="cpu", quick=True)


def odd(*names: str, limit_s: float = 30.0) -> list[Part]:
    return [Part(name, odd_parts.__name__, name, limit_s) for name in names]


@pytest.fixture
def parts_can_be_odd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    monkeypatch.setattr(suite, "_LEAST_S", 0.1)


def test_parts_that_fail_die_or_cannot_run_leave_the_others(tmp_path, parts_can_be_odd):
    results = suite.run_parts(odd("failing", "dying", "unable", "good"), options(tmp_path))
    failing, dying, unable, good = results
    assert (failing.outcome, failing.reason) == ("failed", "ValueError: went wrong")
    assert "in failing" in failing.output_tail
    assert (dying.outcome, dying.reason) == ("failed", "its process was killed by SIGKILL")
    assert (unable.outcome, unable.reason) == ("not run", "no such thing here")
    assert (good.outcome, good.reason, good.rows) == ("done", "", [{"measured": "odd", "device": "cpu"}])
    written = json.loads((tmp_path / "gpu_suite.json").read_text())["rows"]
    assert [row["outcome"] for row in of(written, "part")] == ["failed", "failed", "not run", "done"]
    assert [(row["part"], row.get("value")) for row in of(written, "odd")] == [
        ("failing", 1),
        ("dying", 2),
        ("good", None),
    ]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pids: list[int], within_s: float = 5.0) -> bool:
    end = time.monotonic() + within_s
    while any(map(is_alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(is_alive, pids))


def test_a_part_that_overruns_is_killed_with_its_workers(tmp_path, parts_can_be_odd):
    parts = [*odd("endless", limit_s=4.0), *odd("good")]
    endless, good = suite.run_parts(parts, options(tmp_path))
    assert (endless.outcome, endless.reason) == ("killed", "not done after 4 s")
    assert "in endless" in endless.output_tail
    (row,) = endless.rows
    assert gone(row["pids"])
    assert good.outcome == "done"


def test_parts_get_what_is_left_of_the_budget(tmp_path, monkeypatch):
    clock, limits = iter([0.0, 10.0, 40.0, 56.0]), []

    def run_apart(part, _, *, seconds) -> PartResult:
        limits.append(seconds)
        return PartResult(part.name, "done")

    monkeypatch.setattr(suite, "run_apart", run_apart)
    monkeypatch.setattr(suite.time, "monotonic", lambda: next(clock))
    results = suite.run_parts(odd("good", "unable", "dying", limit_s=30.0), options(tmp_path, budget_s=60.0))
    assert limits == [30.0, 20.0]
    assert [r.outcome for r in results] == ["done", "done", "not run"]
    assert results[-1].reason == "no time left of 60 s"


def test_nothing_stays_when_the_suite_is_killed(tmp_path, parts_can_be_odd):
    code = (
        "import argparse, pathlib, odd_parts, test_gpu_suite as t; from benchmarks.gpu import suite as g;"
        f"g.run_parts(t.odd('endless', limit_s=60), t.options(pathlib.Path({str(tmp_path)!r})))"
    )
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS), str(ROOT)))}
    process = subprocess.Popen(command, env=environment, cwd=ROOT)
    written, pids = tmp_path / "parts" / "endless.json", []
    end = time.monotonic() + 60
    while not pids and time.monotonic() < end and process.poll() is None:
        time.sleep(0.05)
        pids = PartResult.read(written).rows[0]["pids"] if written.exists() else []
    process.kill()
    process.wait()
    assert len(pids) == 2
    assert gone(pids)


def test_targets_are_judged():
    size = {"size": "512x288"}
    step = {"measured": "train step", "encoder": "vit", "size": "vit_b16", "frames": 4, "batch": 128}
    nvdec = {"measured": "throughput", "style": "balanced", "size": "512x288"}
    rows = [
        {"measured": "correctness", "style": "hevc", "packets": "dropped", "right": False} | size,
        {"measured": "correctness", "style": "balanced", "packets": "dropped", "right": True} | size,
        {"measured": "correctness", "style": "vp9", "packets": "dropped", "not_run": "why"},
        nvdec | {"threads": 16, "nvdec_percent": 79.0, "clips_per_s": 3000.0},
        nvdec | {"threads": 8, "nvdec_percent": 70.0, "clips_per_s": 3100.0},
        {"measured": "training", "model": "vit_b16", "decoder": "dali", "style": "balanced"}
        | {"data_wait_share": 0.031, "clips_per_s": 800.0},
        step | {"attention": "sdpa", "compile": False, "clips_per_s": 900.0, "mfu": 0.44},
        step | {"attention": "flash-attn", "compile": True, "clips_per_s": 990.0, "mfu": 0.483},
        step | {"attention": "math", "compile": False, "not_run": "out of memory"},
        step | {"size": "tiny", "clips_per_s": 5000.0, "mfu": 0.1},
    ]
    frames, busy, waits, fastest = report.verdicts(rows)
    assert frames == "frames right: 1 of 2; WRONG: hevc 512x288 (dropped)"
    assert "MISSED, 79.0 % with 16 threads" in busy and "fastest 3100.0 clips/s with 8" in busy
    assert waits == "ViT-B waits < 5 % for data: met, 3.1% at 800.0 clips/s"
    assert (
        fastest == "fastest step of ViT-B, 4 frames: 990.0 clips/s (flash-attn, compiled, 128 clips), MFU 48.3%"
    )
    assert "met, 80.5 %" in report.verdicts([nvdec | rows[3] | {"nvdec_percent": 80.5}])[1]
    assert all("not measured" in verdict for verdict in report.verdicts([]))


def test_the_budget_is_what_one_machine_is_lent_for():
    parser = suite.build_parser()
    assert parser.parse_args(["--output", "x"]).budget_s == 480
    names = [part.name for part in suite.PARTS]
    assert len(set(names)) == len(names) and names[:2] == ["machine", "media"]
    assert sum(part.expected_s for part in suite.PARTS) <= suite.BUDGET_S
    assert all(0 < 1.5 * part.expected_s < part.limit_s for part in suite.PARTS)
