"""The GPU suite on a machine without a GPU: its stages, and that no part harms another."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import odd_parts
import pytest

pytest.importorskip("nvidia.dali")
from benchmarks.gpu import chunks, report, suite
from benchmarks.gpu.parts import Part, PartResult
from benchmarks.gpu.suite import STAGES, Stage
from benchmarks.machine import ROOT
from benchmarks.report import select

TESTS = Path(__file__).parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="parts end with the suite on Linux only")


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A single chunk: the command wants some."""
    folder = tmp_path_factory.mktemp("media")
    jobs = [job for job in chunks.media_jobs(folder, small=True) if job.path.parts[-3] == "balanced"]
    for job in jobs:
        chunks.encode(job)
    return folder


def command(*options: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *map(str, options)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_a_command_measures_parts_and_writes_three_files(media, tmp_path):
    done = command("--parts", "probe", "--media", media, "--output", tmp_path, "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"gpu_parts.json", "gpu_parts.md", "gpu_parts.log"}
    rows = json.loads((tmp_path / "gpu_parts.json").read_text())["rows"]
    assert [(row["outcome"], row["part"]) for row in select(rows, "part")] == [("done", "probe")]
    assert all(row["card"] and row["part"] == "probe" for row in rows)
    assert not [row for row in rows if "failure" in row]
    assert {row["codec"] for row in select(rows, "nvdec")} == {"h264", "mjpeg", "hevc", "vp8", "vp9", "av1"}
    assert select(rows, "yardstick")[0]["tflop_per_s"] > 0
    assert "no GPU (--device cpu)" in (tmp_path / "gpu_parts.md").read_text()
    assert "probe: done" in done.stdout and len(done.stdout.splitlines()) <= report.LINES


def test_missing_chunks_and_options_are_told(media, tmp_path, capsys):
    for options, told in (
        (
            ["--stage", "1", "--media", str(tmp_path), "--output", "x"],
            f"--media {tmp_path} has no chunks; make them",
        ),
        (["--stage", "1", "--output", "x"], "make them with --make-media DIR"),
        (["--media", str(media)], "--output, and --stage or --parts"),
    ):
        with pytest.raises(SystemExit):
            suite.main(options)
        assert told in capsys.readouterr().err


def make_stage(folder: Path, device: str = "cpu") -> Stage:
    return Stage("gpu_stage1", folder / "out", folder, folder, device)


def odd(*names: str, limit_s: float = 60.0) -> list[Part]:
    return [Part(name, f"{odd_parts.__name__}.{name}", limit_s) for name in names]


@pytest.fixture
def parts_can_be_odd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    monkeypatch.setattr(suite, "_LEAST_S", 0.1)
    monkeypatch.setattr(Stage, "_run_apart", _with_any_media(Stage._run_apart))


def _with_any_media(run_apart):
    """The process of a part wants chunks, too."""

    def run(stage: Stage, part: Part, seconds: float) -> PartResult:
        chunk = stage.media / "vp9" / "source_0" / "0.mp4"
        chunk.parent.mkdir(parents=True, exist_ok=True)
        chunk.touch()
        return run_apart(stage, part, seconds)

    return run


def test_parts_that_fail_die_or_cannot_run_leave_the_others(tmp_path, parts_can_be_odd):
    stage = make_stage(tmp_path)
    stage.run(odd("failing", "dying", "unable", "good"), limit_s=100)
    failing, dying, unable, good = stage.results
    assert (failing.outcome, failing.reason) == ("failed", "ValueError: went wrong")
    assert (dying.outcome, dying.reason) == ("failed", "its process ended with status -9")
    assert (unable.outcome, unable.reason) == ("not run", "no such thing here")
    assert (good.outcome, good.reason) == ("done", "")
    rows = json.loads((tmp_path / "out" / "gpu_stage1.json").read_text())["rows"]
    assert [(row["outcome"], row["rows"]) for row in select(rows, "part")] == [
        *(("failed", 1), ("failed", 1)),
        *(("not run", 0), ("done", 1)),
    ]
    assert [(row["part"], row.get("value")) for row in select(rows, "odd")] == [
        *(("failing", 1), ("dying", 2)),
        ("good", None),
    ]
    assert "in failing" in (tmp_path / "out" / "gpu_stage1.log").read_text()


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


def test_a_part_that_overruns_is_killed_with_its_workers_and_its_rows_are_kept(
    tmp_path, parts_can_be_odd, monkeypatch
):
    def wait(stage: Stage, process: subprocess.Popen, path: Path, end: float) -> bool:
        """Wait until the part hangs, however slowly it starts; its time is over soon after."""
        while not PartResult.read(path).rows and time.monotonic() < end:
            time.sleep(0.02)
        return original(stage, process, path, time.monotonic() + 0.1)

    original = Stage._wait
    monkeypatch.setattr(Stage, "_wait", wait)
    stage = make_stage(tmp_path)
    stage.run(odd("endless"), limit_s=60)
    (endless,) = stage.results
    assert (endless.outcome, endless.reason) == ("killed", "not done after 60 s")
    assert "in endless" in (tmp_path / "out" / "gpu_stage1.log").read_text()
    (row,) = endless.rows
    assert gone(row["pids"])


def test_a_process_that_does_not_end_is_left_behind(monkeypatch):
    class Stuck:
        sent = []

        def send_signal(self, number):
            self.sent.append(number)

        def kill(self):
            self.sent.append(signal.SIGKILL)

        def wait(self, timeout):
            raise subprocess.TimeoutExpired("part", timeout)

    monkeypatch.setattr(suite, "_STACKS_S", 0)
    assert "stuck in the driver" in suite.end_process(Stuck())
    assert Stuck.sent == [signal.SIGUSR1, signal.SIGKILL]


@pytest.mark.parametrize(("device", "limits"), [("cuda", [30.0, 20.0]), ("cpu", [60.0, 20.0])])
def test_parts_get_what_is_left_of_the_limit(tmp_path, monkeypatch, device, limits):
    clock, given = iter([0.0, 0.0, 40.0, 56.0]), []

    def run_apart(stage, part, seconds) -> PartResult:
        given.append(seconds)
        return PartResult(part.name, "done")

    monkeypatch.setattr(Stage, "_run_apart", run_apart)
    monkeypatch.setattr(suite.time, "monotonic", lambda: next(clock))
    stage = make_stage(tmp_path, device)
    stage.run(odd("good", "unable", "dying", limit_s=30.0), limit_s=60.0)
    assert given == limits
    assert [result.outcome for result in stage.results] == ["done", "done", "not run"]
    assert stage.results[-1].reason == "no time left of 60 s"


def test_nothing_stays_when_the_suite_is_killed_and_its_rows_are_written(tmp_path, parts_can_be_odd):
    code = (
        "import pathlib, test_gpu_suite as t; from benchmarks.gpu import suite;"
        "suite.Stage._run_apart = t._with_any_media(suite.Stage._run_apart);"
        f"t.make_stage(pathlib.Path({str(tmp_path)!r})).run(t.odd('endless'), limit_s=60)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS), str(ROOT)))}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=ROOT)
    written, pids = tmp_path / "out" / "gpu_stage1.json", []
    end = time.monotonic() + 60
    while not pids and time.monotonic() < end and process.poll() is None:
        time.sleep(0.05)
        rows = json.loads(written.read_text())["rows"] if written.exists() else []
        pids = [pid for row in select(rows, "odd") for pid in row["pids"]]
    process.kill()
    process.wait()
    assert len(pids) == 2
    assert gone(pids)


def test_targets_are_judged():
    step = {
        "measured": "train step",
        "encoder": "vit",
        "size": "vit_b16",
        "frames": 4,
        "batch": 128,
        "forced": "",
    }
    loader = {"measured": "loader", "chunks": "balanced", "decoder": "dali", "graphs": 2}
    trained = {"measured": "training", "model": "vit_b16", "encoder": "vit", "decoder": "dali", "graphs": 2}
    rows = [
        {"measured": "frames", "chunks": "hevc", "packets": "planned", "right": False},
        {"measured": "frames", "chunks": "hevc", "packets": "all kept", "right": True},
        {"measured": "frames", "chunks": "balanced", "packets": "planned", "right": True},
        {"measured": "frames", "chunks": "vp9", "packets": "planned", "not_run": "why"},
        loader | {"threads": 8, "nvdec_percent": 79.0, "clips_per_s": 3000.0},
        loader | {"threads": 4, "nvdec_percent": 70.0, "clips_per_s": 2900.0},
        trained | {"threads": 8, "gpu_idle_share": 0.031, "clips_per_s": 800.0},
        trained
        | {"threads": 4, "gpu_idle_share": 0.06, "clips_per_s": 700.0, "steps": 200}
        | {"hours_for_20m_clips": 7.94},
        step | {"attention": "sdpa", "compile": False, "clips_per_s": 900.0, "mfu": 0.44},
        step
        | {"attention": "sdpa", "forced": "cudnn", "compile": True, "clips_per_s": 1050.0, "mfu": 0.518}
        | {"compile_mode": "max-autotune-no-cudagraphs"},
        step | {"attention": "math", "compile": False, "not_run": "out of memory"},
        step | {"size": "tiny", "clips_per_s": 5000.0, "mfu": 0.1},
    ]
    assert report.verdicts(rows) == [
        "frames right: 1 of 2 styles; WRONG: hevc",
        "NVDEC >= 80 % flat out: MISSED, 79.0 % at 3000 clips/s with 2 graphs of 8 threads",
        "GPU idles < 5 % beside dali: met, 3.1% at 800 clips/s with 2 graphs of 8 threads",
        "MFU of ViT-B >= 50 %: met, 51.8% at 1050 clips/s "
        "(sdpa, cudnn, compiled, max-autotune-no-cudagraphs, 128 clips)",
        "20 million clips on one card: 7.94 h by dali, from 200 steps",
    ]
    assert report.verdicts([]) == []


def test_the_last_lines_fit_and_begin_with_failures():
    rows = [{"measured": "x", "number": n, "text": "long " * 99} for n in range(99)]
    results = [PartResult("a", "done", rows=[*rows, {"measured": "x", "failure": "broken"}])]
    lines = report.ending(results)
    assert len(lines) == report.LINES and max(map(len, lines)) <= report.WIDTH
    assert lines[1] == "x: failure=broken" and lines[-1] == "... and 42 rows more"


def test_every_stage_fits_its_limit_roughly_and_every_part_can_be_asked_for():
    parts = [part for own in STAGES.values() for part in own]
    assert len({part.name for part in parts}) == len(parts)
    for own in STAGES.values():
        assert 200 <= sum(part.limit_s for part in own) <= 400  # few parts will need all of theirs
    assert suite.build_parser().parse_args(["--stage", "1"]).limit_s == 200
