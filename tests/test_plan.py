"""`avion-dali plan` from its options to its table."""

import argparse
import math
import re

import make_videos
import pytest
import torch

from avion_dali.cli import plan
from avion_dali.contracts import UserError
from avion_dali.inspection import plan_measurements, plan_samples
from avion_dali.inspection.plan_forecast import ClipCost


def parse(*arguments):
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return make_videos.write_video(tmp_path_factory.mktemp("plan") / "video.mp4", frames=60)


QUICK = ("--seconds", 0.1, "--frames", 2, "--frame-size", 32, "--short-side", 96, "--workers", 2)


@pytest.fixture
def made_up_costs(monkeypatch):
    """Takes the loader's place where something else is tested."""
    monkeypatch.setattr(plan_measurements, "measure_loader", lambda *_, **__: ClipCost(10.0, 0.6, 4.0))


def rows_of(output):
    """The table, by profile and chunk length."""
    head, *lines = re.findall(r"^ *(?:profile|compat|balanced|as given) .*$", output, re.MULTILINE)
    names = re.split(r"  +", head.strip())
    rows = [dict(zip(names, re.split(r"  +", line.strip()), strict=True)) for line in lines]
    return {(row["profile"], int(row["chunk s"])): row for row in rows}


def test_profiles_and_lengths_are_compared(video, capsys):
    options = parse(
        *QUICK, "--videos", video, "--profiles", "compat", "balanced", "--chunk-seconds", 1, 20, "--disk", video
    )
    assert plan.run(options) == 0
    output = capsys.readouterr().out
    rows = rows_of(output)
    assert set(rows) == {(p, s) for p in ("compat", "balanced") for s in (1, 20)}
    # The GOP of compat outlasts a second; balanced lets most of its frames be left out.
    assert float(rows["balanced", 20]["decoded"]) < float(rows["compat", 20]["decoded"])
    assert float(rows["compat", 1]["decoded"]) < float(rows["compat", 20]["decoded"])
    # Each chunk begins with a keyframe, so short ones are larger.
    size = {key: float(row["GB"].replace(",", "")) for key, row in rows.items()}
    assert size["balanced", 1] > size["balanced", 20]
    assert all(float(row["clips/s"].replace(",", "")) > 0 for row in rows.values())
    assert re.search(r"recommended  --profile (compat|balanced) --chunk-seconds (1|20)", output)


def test_the_forecast_follows_from_the_measured_costs(video, made_up_costs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan, "available_cores", lambda: 2)
    monkeypatch.setattr(plan_measurements, "read_clips", lambda *_, **__: (0.1, 500.0))
    monkeypatch.setattr(plan_samples, "clip_needs", lambda _: (8, [1000, 3000]))
    folder = tmp_path / "chunks" / "v"
    folder.mkdir(parents=True)
    (folder / "0.mp4").write_bytes(video.read_bytes())
    assert plan.run(parse(*QUICK, "--chunks", tmp_path / "chunks")) == 0
    output = capsys.readouterr().out
    (row,) = rows_of(output).values()
    # Twice the pictures of the clips that were timed: 20 ms on one of two cores, and 0.6 ms of the trainer's.
    assert (row["decoded"], row["CPU ms"], row["reads"], row["KB read"]) == ("8.0", "20.0", "2", "4")
    assert (row["clips/s"], row["limited by"], row["cores"]) == ("97", "CPU cores", "2.1")
    assert "predicted    97 clips/s, limited by: CPU cores" in output
    assert "faster with  more cores, a profile with less CPU ms" in output
    assert "500 MB/s" in output


def test_chunks_are_judged_as_they_are(video, tmp_path, capsys):
    folder = tmp_path / "chunks" / "v"
    folder.mkdir(parents=True)
    (folder / "0.mp4").write_bytes(video.read_bytes())
    assert plan.run(parse(*QUICK, "--chunks", tmp_path / "chunks", "--step-seconds", 1000)) == 0
    output = capsys.readouterr().out
    assert set(rows_of(output)) == {("as given", 2)}
    assert rows_of(output)["as given", 2]["limited by"] == "model"
    assert "the smallest files that keep the model busy" in output
    assert "recommended  the chunks as they are" in output
    assert "faster with  a faster GPU or a smaller model" in output
    assert f"decoded   {tmp_path / 'chunks'}" in output


def test_damaged_chunks_are_named(video, tmp_path):
    folder = tmp_path / "chunks" / "v"
    folder.mkdir(parents=True)
    data = bytearray(video.read_bytes())
    (folder / "0.mp4").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="no chunk of .* can be used"):
        plan.run(parse(*QUICK, "--chunks", tmp_path / "chunks"))


def test_chunks_that_a_manifest_misses_are_named(video, tmp_path):
    (tmp_path / "v").mkdir()
    chunk = tmp_path / "v" / "0.mp4"
    chunk.write_bytes(video.read_bytes())
    plan_samples.write_sample_manifest(tmp_path, tmp_path / "manifest", clip_seconds=1.0)
    chunk.unlink()
    with pytest.raises(UserError, match=r"--chunks: .*0\.mp4: missing"):
        plan.run(parse(*QUICK, "--chunks", tmp_path / "manifest"))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--frames", 0), "--frames 0"),
        (("--clip-seconds", -1), "--clip-seconds -1"),
        (("--step-seconds", 0), "--step-seconds 0"),
        (("--chunk-seconds", 0, 5), "--chunk-seconds 0"),
        (("--short-side", 100), "--short-side 100"),
        (("--step-seconds", 1, "--model", "tiny"), "give only one of them"),
    ],
)
def test_senseless_options_are_named(arguments, named):
    with pytest.raises(UserError, match=named):
        plan.run(parse(*arguments))


def test_a_step_time_becomes_a_rate_and_a_busy_core_for_each_process():
    demand = plan.model_demand(parse("--global-batch", 1024, "--step-seconds", 4, "--processes", 8))
    assert demand.clips_per_s == pytest.approx(256)
    assert demand.clips_per_s * demand.core_ms / 1e3 == pytest.approx(8)  # cores
    assert math.isinf(plan.model_demand(parse()).clips_per_s)


def test_a_model_is_timed(monkeypatch):
    monkeypatch.setattr(plan, "MODEL_SECONDS", 0.0)
    options = parse("--model", "tiny", "--frames", 2, "--frame-size", 32)
    clip_ms, core_ms = plan.time_model(options, torch.device("cpu"), micro_batch=2)
    assert 0 < clip_ms < math.inf
    assert 0 < core_ms < math.inf
