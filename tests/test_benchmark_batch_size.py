"""Batch sizes compared: how a training follows from its setting, what is concluded, and real trainings."""

from __future__ import annotations

import json
from pathlib import Path

import make_videos
import pytest

from avion_dali.cli.demo import demo_config
from avion_dali.contracts import UserError
from avion_dali.datasets.captions import build_captions_manifest
from benchmarks.train import batch_size
from benchmarks.train.batch_size import Setting


def invented(batch: int, rule: str, seed: int, map_avg: float) -> dict:
    setting = Setting(batch, rule, seed)
    return {
        "measured": "run",
        **vars(setting),
        "learning_rate": 5e-4 * setting.rate_factor,
        "steps": 1024 // batch,
        "map_avg": map_avg,
        "chance": 0.14,
        "lost_when_frozen": 0.3,
    }


RUNS = [
    *(invented(8, "fixed", seed, 0.50 + seed / 50) for seed in range(2)),
    *(invented(16, "fixed", seed, 0.54 + seed / 50) for seed in range(2)),
    *(invented(64, "fixed", seed, 0.40 + seed / 50) for seed in range(2)),
    *(invented(8, "sqrt", seed, 0.49) for seed in range(2)),
    *(invented(64, "sqrt", seed, 0.57 + seed / 25) for seed in range(2)),
]


def of(rows: list[dict], measured: str) -> list[dict]:
    return [row for row in rows if row["measured"] == measured]


def test_every_batch_is_trained_by_both_rules_but_the_one_where_they_agree():
    chosen = list(batch_size.settings((8, 16, 32), seeds=2))
    assert len(set(chosen)) == len(chosen) == 2 * 5
    assert {(s.global_batch, s.rule) for s in chosen if s.seed == 1} == {
        *((batch, "fixed") for batch in (8, 16, 32)),
        *((batch, "sqrt") for batch in (8, 32)),
    }
    assert len({setting.name for setting in chosen}) == len(chosen)


@pytest.mark.parametrize(
    ("batch", "rule", "micro", "factor"),
    [(64, "sqrt", 16, 2.0), (4, "sqrt", 4, 0.5), (64, "fixed", 16, 1.0), (16, "sqrt", 16, 1.0)],
)
def test_the_rate_follows_and_large_batches_are_accumulated(batch, rule, micro, factor):
    base = demo_config(Path("out"), (Path("a"), Path("b")), decoder="cpu-fused")
    config = batch_size.configured(base, Setting(batch, rule, seed=3), epochs=5)
    assert (config.optim.global_batch, config.optim.micro_batch) == (batch, micro)
    assert config.optim.learning_rate == pytest.approx(factor * base.optim.learning_rate)
    assert config.optim.warmup_learning_rate == pytest.approx(factor * base.optim.warmup_learning_rate)
    assert (config.optim.epochs, config.run.seed, config.run.eval_every) == (5, 3, 5)
    assert config.output_dir == f"out/batch{batch}_{rule}_seed3"
    assert base.optim.global_batch == batch_size.RATE_BATCH


def test_means_are_over_seeds_and_the_middle_batch_counts_for_both_rules():
    rows = batch_size.compare(RUNS)
    assert of(rows, "run") == RUNS
    means = {(row["rule"], row["global_batch"]): row for row in of(rows, "mean")}
    assert set(means) == {(rule, batch) for rule in batch_size.RULES for batch in (8, 16, 64)}
    assert means["fixed", 8]["map_avg"] == pytest.approx(0.51) and means["fixed", 8]["steps"] == 128
    assert means["fixed", 8]["range"] == pytest.approx(0.02)
    assert means["sqrt", 16] == means["fixed", 16] | {"rule": "sqrt"}
    assert means["sqrt", 64]["learning_rate"] == pytest.approx(1e-3)


def test_table_and_picture(tmp_path):
    rows = batch_size.compare(RUNS)
    lines = batch_size.tables(rows).splitlines()
    assert lines[2:] == [
        "| 8 | 128 | 0.510 | 0.490 |",
        "| 16 | 64 | 0.550 | 0.550 |",
        "| 64 | 16 | 0.410 | 0.590 |",
    ]
    assert {line.count("|") for line in lines} == {5}
    picture = tmp_path / "batch_size.png"
    batch_size.draw(rows).savefig(picture)
    assert 5_000 < picture.stat().st_size < 150_000


@pytest.mark.parametrize("batch", ["24", "0", "-8"])
def test_batches_that_cannot_be_accumulated_are_refused(batch, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["batch_size", "--batches", "16", batch])
    with pytest.raises(SystemExit) as end:
        batch_size.main()
    assert end.value.code == 2 and "multiples of 16" in capsys.readouterr().err


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """A video of three seconds with 32 captions."""
    folder = tmp_path / "chunks" / "a.mp4"
    folder.mkdir(parents=True)
    make_videos.write_video(folder / "0.mp4", frames=90, size=(96, 96))
    lines = [f"a,{i / 16:.2f},{i / 16 + 0.6:.2f},cut {i},cut{i % 2},a" for i in range(32)]
    (tmp_path / "captions.csv").write_text("\n".join(["video,start,end,text,verb,noun", *lines]) + "\n")
    build_captions_manifest(tmp_path / "chunks", tmp_path / "captions.csv", output=tmp_path / "m", jobs=1)
    return tmp_path / "m"


def test_trainings_take_the_steps_of_their_batch(manifest, tmp_path):
    base = demo_config(tmp_path / "runs", (manifest, manifest), decoder="cpu-fused")
    small = batch_size.train(base, Setting(8, "fixed", 0), 1)
    (large,) = batch_size.train_all(base, [Setting(32, "sqrt", 0)], epochs=1, jobs=1)
    assert (small["steps"], large["steps"]) == (4, 1)
    assert small["samples"] == large["samples"] == 32
    assert large.items() >= vars(Setting(32, "sqrt", 0)).items()
    assert large["learning_rate"] == pytest.approx(2**0.5 * small["learning_rate"])
    assert 0 < small["map_avg"] <= 1 and small["chance"] == large["chance"]
    with pytest.raises(UserError, match="fewer than one global batch"):
        batch_size.train(base, Setting(64, "fixed", 0), 1)


def test_a_training_that_was_stopped_has_no_result(manifest, tmp_path, monkeypatch):
    base = demo_config(tmp_path / "runs", (manifest, manifest), decoder="cpu-fused")
    setting = Setting(16, "fixed", 0)
    log = tmp_path / "runs" / setting.name / "log.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text(json.dumps({"kind": "end", "step": 1, "stopped_by": "SIGTERM"}) + "\n")
    monkeypatch.setattr(batch_size, "train_and_report", lambda config: None)
    with pytest.raises(RuntimeError, match="batch16_fixed_seed0 was stopped by SIGTERM after step 1"):
        batch_size.train(base, setting, 1)
