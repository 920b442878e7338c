"""The loader benchmark and the ablation at tiny size: they measure the product's own loader and loop."""

import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from avion_dali.data.manifest import Manifest
from avion_dali.data.planner import Planner
from avion_dali.data.probe import probe_chunk
from avion_dali.decode import cpu_fused, reference
from avion_dali.decode.decoders import DecodeClip
from benchmarks import corpus, media
from benchmarks.corpus import CLIP_KINDS, FOUR, STRIDED
from benchmarks.loader import report, runs, stand_ins
from benchmarks.loader.measure import LoaderBench, process_read_bytes
from benchmarks.train import ablation

linux = pytest.mark.skipif(sys.platform != "linux", reason="processor time and memory are read from /proc")
BENCH = LoaderBench(
    ("balanced",),
    workers=(1,),
    simulated_workers=(3,),
    rounds=1,
    seconds=0.05,
    warm_s=0.05,
    micro_batch=4,
    frame_size=32,
)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    path = tmp_path_factory.mktemp("sources") / "hand_held.mp4"
    return [media.write_video(path, media.SCENES["hand_held"], frames=120, size=(64, 48))]


@pytest.fixture(scope="module")
def chunks(videos: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus.chunk_sources(videos, tmp_path_factory.mktemp("corpus") / "balanced", "balanced")


@pytest.fixture(scope="module")
def manifest(chunks: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return corpus.kind_manifest(chunks, tmp_path_factory.mktemp("manifest"), FOUR, samples=40)


def decoded(decode_clip: DecodeClip, manifest: Manifest, rows: int) -> list[np.ndarray]:
    planner = Planner(manifest, FOUR.rules(32), seed=0)
    clips = []
    for row in range(rows):
        frames = np.zeros(planner.rules.clip_shape, np.uint8)
        decode_clip(planner.plan(row, 0), frames)
        clips.append(frames)
    return clips


@pytest.mark.parametrize("kind", CLIP_KINDS, ids=lambda kind: kind.name)
def test_clips_of_every_kind_span_what_they_say(kind, chunks, tmp_path):
    manifest = corpus.kind_manifest(chunks, tmp_path, kind, samples=30)
    planner = Planner(manifest, kind.rules(32), seed=0)
    for row in range(30):
        request = planner.plan(row, 0)
        (part,) = request.parts
        assert len(request.gather) == kind.num_frames
        assert kind.num_frames - len(part.frame_ids) <= 2  # neighbours may fall on one frame
        assert part.frame_ids[-1] - part.frame_ids[0] < kind.seconds * media.FPS
        assert part.chunk.index is not None


def test_strided_clips_take_one_frame_of_each_four(chunks, tmp_path):
    planner = Planner(corpus.kind_manifest(chunks, tmp_path, STRIDED, samples=20), STRIDED.rules(32), seed=0)
    gaps = np.concatenate([np.diff(planner.plan(row, 0).parts[0].frame_ids) for row in range(20)])
    assert gaps.min() >= 1
    assert gaps.max() <= 7
    assert abs(gaps.mean() - 4) < 0.3


def test_a_repeated_chunk_shows_its_pictures_again(chunks, tmp_path):
    (source,) = chunks.glob("*/0.mp4")
    target = tmp_path / "long" / "v" / "0.mp4"
    corpus.repeat_chunk(source, target, 3)
    facts, short = probe_chunk(target), probe_chunk(source)
    assert (facts.num_frames, facts.fps, facts.is_cfr) == (3 * short.num_frames, short.fps, True)
    assert target.stat().st_size > 2.5 * source.stat().st_size
    manifest = corpus.kind_manifest(target.parents[1], tmp_path / "manifest", FOUR, samples=1)
    rules = FOUR.rules(32)
    request = Planner(manifest, rules, seed=0).plan(0, 0)
    (part,) = request.parts
    clips = []
    for shift in (0, short.num_frames, 2 * short.num_frames):
        ids = tuple(i % short.num_frames + shift for i in part.frame_ids)
        moved = type(part)(part.chunk, tuple(sorted(ids)))
        frames = np.zeros(rules.clip_shape, np.uint8)
        cpu_fused.decode_clip(
            type(request)(0, 0, (moved,), request.gather, request.windows, (False,), 32), frames
        )
        clips.append(frames)
    assert clips[0].std() > 5
    np.testing.assert_array_equal(clips[0], clips[1])
    np.testing.assert_array_equal(clips[0], clips[2])


def test_cropping_afterwards_gives_the_reference_clip(manifest):
    wanted, found = (decoded(d, manifest, 6) for d in (reference.decode_clip, ablation.crop_afterwards))
    for a, b in zip(wanted, found, strict=True):
        np.testing.assert_array_equal(a, b)


def test_worker_counts_double_up_to_all_cores():
    assert [runs.worker_counts(n) for n in (1, 2, 6, 8)] == [(1,), (1, 2), (1, 2, 4, 6), (1, 2, 4, 8)]


def test_a_simulated_decoder_sleeps_as_its_profile_and_clip_do(manifest, monkeypatch):
    slept = []
    monkeypatch.setattr(stand_ins.time, "sleep", slept.append)
    request = Planner(manifest, FOUR.rules(32), seed=0).plan(0, 0)
    seconds = {stand_ins.sleep_key("balanced", 4): 0.25, stand_ins.sleep_key("balanced", 16): 9.0}
    stand_ins.sleep_instead(request, np.zeros(0, np.uint8), seconds=seconds)
    assert slept == [0.25]


def rate_row(workers: int, clips_per_s: float, cpu_ms: float) -> dict[str, object]:
    what = {"measured": "loading", "profile": "balanced", "clip": "4", "decoder": "cpu-fused"}
    return {**what, "workers": workers, "clips_per_s": clips_per_s, "worker_cpu_ms_per_clip": cpu_ms}


def test_the_best_round_counts():
    rows = [rate_row(1, 10, 9.0), rate_row(2, 16, 9.5), rate_row(1, 8, 8.5), rate_row(2, 19, 9.0)]
    best = report.best_of_rounds(rows)
    numbers = [(r["workers"], r["clips_per_s"], r["worker_cpu_ms_per_clip"], r["rounds"]) for r in best]
    assert numbers == [(1, 10, 8.5, 2), (2, 19, 9.0, 2)]


@linux
def test_every_measurement_runs(manifest, monkeypatch):
    kept = {("balanced", FOUR.name): manifest}
    monkeypatch.setattr(runs, "CLIP_KINDS", (FOUR,))
    rows = runs.run_all(kept, BENCH)
    measured = [row["measured"] for row in rows]
    assert measured == ["start-up of one worker", "loading", "loading", "transport", "simulated"]
    start_up, ours, paper, transport, simulated = rows
    assert 0 < start_up["worker_private_memory_mb"] <= start_up["worker_memory_mb"]
    assert {ours["decoder"], paper["decoder"]} == {"cpu-fused", "paper-fused"}
    # Only the packet plan leaves packets in the file.
    assert 0 < ours["kb_read_per_clip"] < paper["kb_read_per_clip"]
    assert transport["trainer_ceiling_clips_per_s"] > 0
    assert simulated["workers"] == 3
    table = report.tables(rows)
    assert f"| {FOUR.name} | balanced | `cpu-fused` |" in table


def test_the_fastest_round_of_each_case_counts():
    gone, slow, fast = {"batch": 32}, {"batch": 8, "clips_per_s": 2.0}, {"batch": 8, "clips_per_s": 3.0}
    best = report.best_of_rounds([slow, gone, fast, gone], ("batch",))
    assert best == [{**fast, "rounds": 2}, {**gone, "rounds": 2}]


@linux
def test_the_ablation_says_where_a_step_goes(videos, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "LONG_REPEATS", 2)
    monkeypatch.setattr(ablation, "SAMPLES", 64)
    manifests = ablation.prepare(videos, tmp_path, {"balanced"})
    frames = [manifests[f"{s} s", "balanced"].chunk(0).ref.num_frames for s in (15, 300)]
    assert frames == [120, 240]
    bench = ablation.AblationBench("cpu", "tiny", 32, batches=(4,), workers=1, steps=1)
    cases = [ablation.Case("15 s", "merged", "math", "balanced"), ablation.CASES[-2]]
    rows = [
        ablation.run_case(case, manifests[case.chunk, "balanced"], bench, batch=4, folder=tmp_path)
        for case in cases
    ]
    for row in rows:
        assert 0 <= row["load_overhead_s"] <= row["step_s"]
        assert row["clips_per_s"] == pytest.approx(4 / row["step_s"], rel=0.05)
    assert rows[1]["kb_read_per_clip"] > 0
    gone = {
        "measured": "training",
        "batch": 4,
        "chunk": "15 s",
        "crop": "merged",
        "attention": "math",
        "profile": "compat",
    }
    lines = ablation.tables([*rows, {**gone, "out_of_memory": True}]).splitlines()
    assert len(lines) == 5
    assert "out of memory" in lines[-1]
    ablation.draw(rows).savefig(tmp_path / "ablation.png")
    assert (tmp_path / "ablation.png").stat().st_size < 150_000


@linux
def test_read_bytes_are_those_of_the_files(tmp_path):
    from os import getpid

    before = process_read_bytes(getpid())
    path = tmp_path / "file"
    path.write_bytes(bytes(300_000))
    with closing(path.open("rb", buffering=0)) as file:
        file.read()
    assert 300_000 <= process_read_bytes(getpid()) - before < 320_000
