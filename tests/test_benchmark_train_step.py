import pytest
import torch

from benchmarks.train.step import (
    Case,
    Step,
    against_open_clip,
    count_flops,
    measure_case,
    peak_tflops,
    time_steps,
)

SMALL = Case(size="tiny", frames=2, frame_size=32, batch=3)


def block_flops(tokens: int, width: int, *, keys: int | None = None) -> float:
    """Of one block forwards: four maps of the width's square, an MLP of eight, two products of attention."""
    return 24 * tokens * width**2 + 4 * tokens * (keys or tokens) * width


def embed_flops(tokens: int, values: int, width: int) -> float:
    return 2 * tokens * values * width


def test_flops_of_vit_b_are_those_of_the_formula():
    video = 12 * block_flops(785, 768) + 2 * 768 * 256
    text = 12 * block_flops(77, 512) + 2 * 512 * 256
    # Backwards costs twice as much, but for the patches, which need no gradient.
    expected = 3 * (video + text) + 2 * embed_flops(784, 768, 768)
    model, hardware = count_flops(Case())
    assert model * 1e12 == pytest.approx(expected, rel=1e-3)
    assert hardware == model


def test_flops_of_videomae_are_those_of_the_tubes_it_sees():
    seen, tubes, hidden = 8 * (196 - 176), 8 * 196, 8 * 176
    encoder = 12 * block_flops(seen, 768) + 2 * seen * 768 * 384
    decoder = 4 * block_flops(tubes, 384) + 2 * hidden * 384 * 1536
    expected = 3 * (encoder + decoder) + 2 * embed_flops(seen, 1536, 768)
    assert count_flops(Case(encoder="videomae", frames=16))[0] * 1e12 == pytest.approx(expected, rel=1e-3)


def test_recomputation_counts_for_the_hardware_only():
    plain = count_flops(SMALL)[0]
    model, hardware = count_flops(Case(**{**vars(SMALL), "checkpoint_every": 1}))
    assert model == plain
    assert 1.15 * plain < hardware < 4 / 3 * plain


def test_the_longest_name_says_the_peak():
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989.0
    assert peak_tflops("NVIDIA H100 PCIe") == 756.0
    assert peak_tflops("Voodoo 2") is None


def test_warm_steps_are_run_and_not_counted():
    calls = []
    timing = time_steps(lambda: calls.append(1), torch.device("cpu"), warm=2, steps=3)
    assert len(calls) == 5 and len(timing.wall_s) == len(timing.cpu_s) == 3


@pytest.mark.parametrize("encoder", ["vit", "timesformer", "videomae"])
def test_steps_train_the_model(encoder):
    case = Case(**{**vars(SMALL), "encoder": encoder, "frame_size": 64})
    step = Step(case, "cpu", dtype=torch.float32)
    before = [parameter.detach().clone() for parameter in step.model.parameters() if parameter.requires_grad]
    torch.manual_seed(1)
    first = float(step.loss().detach())
    step.run()
    after = [parameter for parameter in step.model.parameters() if parameter.requires_grad]
    assert sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) > 0.9 * len(after)
    assert 0 < first < 10


def test_a_row_says_what_and_how_fast():
    row = measure_case(SMALL, "cpu", warm=0, steps=1)
    assert row["encoder"] == "vit" and row["attention"] == "sdpa" and row["batch"] == 3
    assert row["clips_per_s"] == pytest.approx(3000 / row["step_ms"], rel=0.02)
    assert row["mfu"] is None and "memory_gib" not in row


def test_a_kernel_that_is_not_there_is_reported():
    row = measure_case(Case(**{**vars(SMALL), "attention": "flash-attn"}), "cpu")
    assert "flash-attn" in row["not_run"] and "clips_per_s" not in row


@pytest.mark.parametrize("frames", [1, 2])
def test_open_clips_tower_is_ours(frames):
    row = against_open_clip(Case(**{**vars(SMALL), "frames": frames}), rounds=1)
    assert row["largest_difference_of_outputs"] < 1e-4
    assert row["wall_ratio"] == pytest.approx(row["ours_s"] / row["open_clip_s"], rel=0.1)
