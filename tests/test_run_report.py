"""The report of any run: put together from the folder, never in the way of a finished training."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_report import Page
from toy_training import make_loop

from avion_dali.engine.run_log import LOG_NAME
from avion_dali.report.run_report import REPORT_NAME, last_metrics, report_run, resources, write_run_report


def write_lines(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def header(**more) -> dict:
    return {
        "kind": "header",
        "step": 0,
        "world_size": 2,
        "device": "cuda:0",
        "energy_source": "GPU (NVML)",
    } | more


def test_resources_add_up_over_starts():
    rows = [
        header(),
        {"kind": "train", "step": 1, "elapsed_s": 1800.0, "energy_j": 3.6e6},
        {"kind": "end", "step": 1, "elapsed_s": 3600.0, "energy_j": 7.2e6, "stopped_by": "SIGTERM"},
        header(world_size=4),
        {"kind": "train", "step": 2, "elapsed_s": 1800.0, "energy_j": 3.6e6},
    ]
    found = resources(rows)
    assert found["starts"] == 2 and found["hours"] == pytest.approx(1.5)
    assert found["GPU-hours"] == pytest.approx(2 * 1.0 + 4 * 0.5)
    energy, carbon = (value for name, value in found.items() if "kWh" in name)
    assert energy == pytest.approx(3.0) and carbon == pytest.approx(3.0 * 1.1 * 0.385)


def test_energy_that_could_not_be_read_is_not_a_number():
    found = resources([header(device="cpu"), header(energy_source="could not be read")])
    assert found["energy"] == "could not be read" and "GPU-hours" in found
    assert resources([]) == {}


def test_last_metrics():
    rows = [
        {"kind": "evaluation", "step": 1, "map": 0.1},
        {"kind": "evaluation", "step": 2, "map": 0.2, "x": None},
    ]
    assert last_metrics([*rows, {"kind": "train", "step": 3}]) == {"map": 0.2}
    assert last_metrics([]) == {}


def test_the_report_of_a_training(tmp_path):
    failure = {"sample_id": 7, "kind": "corrupt", "path": "<a>.mp4", "cause": "bytes differ"}
    write_lines(tmp_path / "quarantine.jsonl", [failure, failure, {**failure, "kind": "timeout"}])
    make_loop(tmp_path, evaluate=lambda: {"score": 0.25}).run()
    report_run(tmp_path)
    page = Page((tmp_path / REPORT_NAME).read_text())
    cells = [text.strip() for text in page.texts if text.strip()]
    for name, value in (("score", "0.25"), ("corrupt", "2"), ("timeout", "1"), ("starts", "1")):
        assert cells[cells.index(name) + 1] == value, name
    assert any("<a>.mp4: corrupt: bytes differ (sample 7)" in cell for cell in cells)
    assert len(page.all("svg")) == 4


def test_a_report_that_fails_costs_nothing_but_a_warning(tmp_path, caplog):
    (tmp_path / REPORT_NAME).mkdir()
    make_loop(tmp_path).run()
    report_run(tmp_path)
    assert "report" in caplog.text and "could not be written" in caplog.text
    (tmp_path / LOG_NAME).write_text('{"no": "kind"}\n')
    report_run(tmp_path)
    assert caplog.text.count("could not be written") >= 2


def test_title_and_metrics_may_be_given(tmp_path):
    write_lines(tmp_path / LOG_NAME, [header()])
    path = write_run_report(tmp_path, title="A & B", metrics={"m": 1.5})
    texts = Page(path.read_text()).texts
    assert "A & B" in texts and "1.5" in texts


def test_odd_texts_and_damaged_rows_do_not_stop_the_report(tmp_path):
    rows = [
        header(config={"name": "a\x00b\ud800"}, best_metric=["x"], world_size="two"),
        {"kind": "evaluation", "step": 1, "recall\x00\ud83d of \x1b[31mred": 0.5, "ma$p_{x": 0.1},
        {"kind": "train", "step": 1, "loss": 1.0, "elapsed_s": "long"},
    ]
    write_lines(tmp_path / LOG_NAME, rows)
    with (tmp_path / LOG_NAME).open("ab") as log:
        log.write(
            b'[1, 2]\n7\nnull\n{"kind": 3}\n{"step": "x", "kind": "train"}\n\xff\xfe\n' + b"[" * 100_000 + b"\n"
        )
        log.write(json.dumps({"kind": "train", "step": 2, "loss": 0.5}).encode() + b"\n" + b'{"kind": "tra')
    write_lines(
        tmp_path / "quarantine.jsonl", [{"kind": "corrupt", "path": "a\x1b]0;x\x07\udcff.mp4"}, [], {"kind": 1}]
    )
    write_run_report(tmp_path)
    page = (tmp_path / REPORT_NAME).read_text(encoding="utf-8")
    assert "8 damaged lines of the log are left out" in page
    assert "2 optimizer steps" in page
    assert r"a\x1b]0;x\x07\udcff.mp4" in page
    assert not any(character in page for character in "\x00\x1b\x07")


def test_a_matplotlibrc_in_the_working_directory_is_not_followed(tmp_path, monkeypatch):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from avion_dali.report.charts import draw_charts\n"
        "rows = [{'kind': 'train', 'step': step, 'loss': 1.0} for step in (1, 2)]\n"
        "assert draw_charts(rows)['Loss'].startswith('<svg')\n"
        "import matplotlib; assert matplotlib.rcParams['text.usetex'] is True\n"
    )
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\ntext.latex.preamble: \\input{/etc/passwd}\n")
    root = str(Path(__file__).resolve().parents[1])
    monkeypatch.delenv("MATPLOTLIBRC", raising=False)
    done = subprocess.run([sys.executable, "-c", code, root], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
