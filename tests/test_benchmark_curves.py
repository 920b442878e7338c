"""Curves compared: what is concluded of invented runs, and real trainings with two decoders."""

import math
import statistics
from pathlib import Path

import make_videos
import pytest

from avion_dali.datasets.captions import build_captions_manifest
from benchmarks.train import curves
from benchmarks.train.curves import Run

DECODERS = ("dali", "cpu-fused")
STEPS = 3 * curves.WINDOW + 5


def invented(*, offset: float, spread: float = 0.1, seeds: int = 3) -> list[Run]:
    """Runs whose losses fall; `dali` lies higher by `offset`, each seed higher than the last by `spread`."""
    return [
        Run(
            decoder=decoder,
            seed=seed,
            losses=tuple(2 - step / 100 + seed * spread + shift for step in range(STEPS)),
            map_avg=0.5 + 0.01 * seed + shift,
            lost_when_frozen=0.4,
        )
        for seed in range(seeds)
        for decoder, shift in zip(DECODERS, (offset, 0.0), strict=True)
    ]


def verdict(rows: list[dict]) -> dict:
    (found,) = (row for row in rows if row["measured"] == "verdict")
    return found


def test_a_window_is_the_mean_of_its_steps():
    losses = tuple(float(step) for step in range(2 * curves.WINDOW + 7))
    middle = (curves.WINDOW - 1) / 2
    assert curves.windowed(losses) == [middle, middle + curves.WINDOW]
    assert curves.windowed(losses[: curves.WINDOW - 1]) == []


def test_equal_curves_differ_by_nothing():
    found = verdict(curves.compare(invented(offset=0.0), DECODERS))
    assert found["claim holds"]
    assert found["ratio"] == 0
    assert found["points where |difference| < spread"] == found["points"] == 3
    assert found["first step whose losses differ, by seed"] == [None, None, None]
    assert found["difference of mean mAP"] == 0


@pytest.mark.parametrize(("offset", "holds"), [(0.09, True), (-0.09, True), (0.11, False), (-0.11, False)])
def test_the_seeds_decide_what_is_a_difference(offset, holds):
    rows = curves.compare(invented(offset=offset), DECODERS)
    steps = [row for row in rows if row["measured"] == "step"]
    assert [row["step"] for row in steps] == [curves.WINDOW * n for n in (1, 2, 3)]
    for row in steps:
        # Seeds 0, 0.1 and 0.2 above each other: a deviation of 0.1, a range of 0.2.
        assert row["difference"] == pytest.approx(offset)
        assert row["spread"] == pytest.approx(0.1)
        assert row["range"] == pytest.approx(0.2)
        assert row["mean loss, dali"] - row["mean loss, cpu-fused"] == pytest.approx(offset)
    found = verdict(rows)
    assert found["claim holds"] is holds
    assert found["seeds"] == 3
    assert found["points where |difference| < spread"] == (3 if holds else 0)
    assert found["ratio"] == pytest.approx(abs(offset) / 0.1)
    assert found["difference of mean mAP"] == pytest.approx(offset)
    assert found["largest |difference| of one step's loss, same seed"] == pytest.approx(abs(offset))
    assert found["first step whose losses differ, by seed"] == [1, 1, 1]


def test_the_larger_spread_counts_and_finals_are_of_each_decoder():
    runs = [run for run in invented(offset=0.0) if run.decoder == "dali"]
    runs += [run for run in invented(offset=0.0, spread=0.5) if run.decoder == "cpu-fused"]
    rows = curves.compare(runs, DECODERS)
    assert rows[0]["spread"] == pytest.approx(0.5)
    finals = [row for row in rows if row["measured"] == "final"]
    assert [row["decoder"] for row in finals] == list(DECODERS)
    assert finals[0]["map_avg_by_seed"] == [0.5, 0.51, 0.52]
    assert finals[0]["map_avg_std"] == pytest.approx(statistics.stdev([0.5, 0.51, 0.52]))


def test_the_picture(tmp_path):
    path = tmp_path / "curves.png"
    curves.draw(curves.compare(invented(offset=0.05), DECODERS)).savefig(path)
    assert 5_000 < path.stat().st_size < 150_000


@pytest.mark.parametrize(
    "arguments", [["--seeds", "1"], ["--decoders", "dali", "dali"], ["--decoders", "auto", "dali"]]
)
def test_what_cannot_be_compared_is_refused(arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["curves", *arguments])
    with pytest.raises(SystemExit) as end:
        curves.main()
    assert end.value.code == 2
    assert "error" in capsys.readouterr().err


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """A video of three seconds with 16 captions: one step of the demo's batch."""
    folder = tmp_path / "chunks" / "a.mp4"
    folder.mkdir(parents=True)
    make_videos.write_video(folder / "0.mp4", frames=90, size=(96, 96))
    lines = [f"a,{i / 8:.2f},{i / 8 + 0.6:.2f},cut {i},cut{i % 2},a" for i in range(16)]
    (tmp_path / "captions.csv").write_text("\n".join(["video,start,end,text,verb,noun", *lines]) + "\n")
    build_captions_manifest(tmp_path / "chunks", tmp_path / "captions.csv", output=tmp_path / "m", jobs=1)
    return tmp_path / "m"


def test_decoders_of_equal_bytes_train_to_equal_curves(manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "make_data", lambda *_: (manifest, manifest))
    runs = curves.train_all(tmp_path / "runs", ["paper-fused", "cpu-fused"], seeds=1, epochs=2)
    assert [(run.decoder, run.seed) for run in runs] == [("paper-fused", 0), ("cpu-fused", 0)]
    paper, ours = runs
    assert len(ours.losses) == 2
    assert all(math.isfinite(loss) for loss in ours.losses)
    assert ours.losses == paper.losses
    assert ours.map_avg == paper.map_avg > 0
