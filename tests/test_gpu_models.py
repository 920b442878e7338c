"""The models in the GPU suite: which steps are timed, what their rows say, and how operations are counted."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_benchmark_train_step import block_flops, embed_flops

from benchmarks.gpu import models
from benchmarks.gpu.parts import TINY, Scale, Suite
from benchmarks.train.step import COUNTED_TFLOP, PRESETS, count_flops, flops


@pytest.fixture
def suite() -> Suite:
    """A rehearsal; models need no chunks."""
    return Suite(Path(), Path(), "cpu", TINY)


@pytest.fixture
def rows() -> list[dict]:
    return []


def failures(rows: list[dict]) -> list[dict]:
    return [row for row in rows if "failure" in row]


def test_steps_name_their_kernels(suite, rows, monkeypatch):
    usual = models.step_cases(suite)
    chosen = [
        usual[0],
        next(s for s in usual if s.forced),
        next(s for s in usual if s.case.encoder == "videomae"),
    ]
    monkeypatch.setattr(models, "step_cases", lambda suite: chosen)
    models.steps(suite, rows.append)
    assert not failures(rows) and all(row["clips_per_s"] > 0 for row in rows)
    assert [row["forced"] for row in rows] == ["", "flash", ""]
    assert any("flash" in name for name in rows[1]["attention_kernels"]) and rows[0]["top_kernels"]


def test_memory_says_what_needs_a_gpu(suite, rows, monkeypatch):
    monkeypatch.setattr(models, "METHODS", models.METHODS[:2])
    models.memory(suite, rows.append)
    assert [row["measured"] for row in rows] == ["memory"] * 2 + ["largest batch"] * 2
    assert all("--device cpu" in row["not_run"] for row in rows[:2])
    assert all(row["clips"] == 2 and row["clips_per_s"] > 0 for row in rows[2:])


def test_steps_of_all_kinds_are_timed_most_important_first(suite):
    cases = models.step_cases(replace(suite, device="cuda", scale=Scale()))
    assert len(set(cases)) == len(cases)
    assert cases[0].case == models.Case(batch=128) and [step.forced for step in cases[:3]] == [
        "",
        "cudnn",
        "flash",
    ]
    plain = [step.case for step in cases]
    assert [case.compile for case in plain if case.compile_mode != "default"] == [True]
    assert {case.attention for case in plain} == {"sdpa", "flash-attn", "math", "xformers"}
    assert {(case.encoder, case.compile) for case in plain} >= {("vit", True), ("videomae", True)}
    assert {case.size for case in plain} == {"vit_b16", "vit_l14"} and {case.frames for case in plain} == {
        4,
        16,
    }
    # None of them makes the GPU wait for a count of operations.
    assert {(case.encoder, case.size, case.frames) for case in plain} == set(COUNTED_TFLOP)
    tiny = models.step_cases(suite)
    assert {(step.case.size, step.case.batch, step.case.compile) for step in tiny} == {("tiny", 2, False)}


@pytest.mark.parametrize("frames", [4, 16])
def test_counted_operations_of_vit_b_are_those_of_the_formula(frames):
    video, text = 12 * block_flops(1 + 196 * frames, 768), 12 * block_flops(77, 512)
    projections = 2 * 768 * 256 + 2 * 512 * 256
    expected = 3 * (video + text + projections) + 2 * embed_flops(196 * frames, 768, 768)
    assert COUNTED_TFLOP["vit", "vit_b16", frames][0] == pytest.approx(expected / 1e12, abs=6e-5)


@pytest.mark.parametrize(
    "case", [("vit", "vit_l14", 4), ("timesformer", "vit_b16", 4), ("videomae", "vit_b16", 16)], ids=str
)
def test_counted_operations_are_those_of_the_models(case, monkeypatch):
    """From models with one block and two: counted quickly, and those of any number follow from them."""
    size = case[1]
    preset, counts = PRESETS[size], []
    for video, text in ((1, 1), (2, 1), (1, 2)):
        monkeypatch.setitem(PRESETS, size, replace(preset, video_layers=video, text_layers=text))
        counts.append(np.array(count_flops(models.Case(*case, checkpoint_every=1))))
    least, per_block, per_text_block = counts[0], counts[1] - counts[0], counts[2] - counts[0]
    found = least + (preset.video_layers - 1) * per_block + (preset.text_layers - 1) * per_text_block
    assert COUNTED_TFLOP[case] == pytest.approx(found, abs=6e-5)
    assert flops(models.Case(*case, checkpoint_every=1)) == COUNTED_TFLOP[case]
    assert flops(models.Case(*case)) == (COUNTED_TFLOP[case][0],) * 2


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 100, 1000, 1500])
def test_largest_is_found_to_an_eighth(limit):
    asked = []

    def fits(number):
        asked.append(number)
        return number <= limit

    found = models.largest(fits, most=1000)
    most = min(limit, 1000)
    assert found <= most <= found + max(1, found // 8)
    assert max(asked) <= 1000 and len(asked) < 20
