"""Each part of the GPU suite, where a fake takes the GPU's place: what it notices, counts and refuses."""

import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pynvml
import pytest
import torch
from PIL import Image

from avion_dali.decode import cpu_fused

pytest.importorskip("nvidia.dali")

from benchmarks.gpu import chunks, correctness, device, loading, models, rates
from benchmarks.gpu.correctness import everything_kept, mini_clips, planned
from benchmarks.gpu.device import sampling
from benchmarks.gpu.parts import QUICK, NotRunError, Scale, Suite, attempt


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    """A suite with chunks of two styles."""
    made = Suite(tmp_path_factory.mktemp("gpu_parts"), "cpu", QUICK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "STYLES", {name: chunks.STYLES[name] for name in ("balanced", "vp9")})
        rows: list[dict] = []
        chunks.media(made, rows.append)
    assert [row["chunks"] for row in rows] == [QUICK.sources] * 3
    return made


def test_what_is_measured_apart_says_why_it_was_not(capsys):
    def broken() -> dict:
        raise RuntimeError("first\nsecond")

    def unable() -> dict:
        raise NotRunError("no")

    assert attempt(lambda: {"a": 1}) == {"a": 1}
    assert attempt(unable) == {"not_run": "no"}
    assert attempt(broken) == {"failure": "RuntimeError: first"}
    assert "in broken" in capsys.readouterr().err


@pytest.mark.parametrize(("size", "side"), [((512, 288), 224), ((382, 288), 224), ((128, 96), 64)])
def test_numbers_are_read_from_whole_pictures(size, side):
    rng = np.random.default_rng(0)
    for number in [0, 1, 299, 1023, *rng.integers(1024, size=20).tolist()]:
        picture = rng.integers(60, 200, (size[1], size[0], 3), dtype=np.uint8)
        chunks.draw_number(picture, number)
        scaled = np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BILINEAR))
        assert chunks.read_number(picture) == chunks.read_number(scaled) == number
    assert chunks.read_number(np.full((side, side, 3), 128, np.uint8)) == -1


def checked(suite: Suite, style: str) -> list:
    found = chunks.chunks_of(chunks.open_manifest(suite, style))
    return chunks.clips_to_check(found, count=8, frame_size=64)


def test_clips_to_check_are_of_all_kinds_and_show_their_numbers(suite):
    clips = checked(suite, "balanced")
    assert {len(clip.parts) for clip in clips[::2]} == {1, 2} == {len(clip.parts) for clip in clips[1::2]}
    assert any(clip.parts[0].frame_ids[-1] == 59 and clip.parts[0].frame_ids[0] == 0 for clip in clips)
    for clip in clips:
        is_whole = (clip.windows[0].width, clip.windows[0].height) == (128, 96)
        assert is_whole == (clip.sample_id % 2 == 0)
        frames = np.empty(clip.frames_shape, np.uint8)
        cpu_fused.decode_clip(clip, frames)
        if is_whole:
            shown = [chunks.read_number(frame) for frame in frames[0]]
            assert shown == chunks.shown_numbers(clip)


def test_all_packets_kept_give_the_frames_of_the_planned_ones(suite):
    fewer = 0
    for clip in checked(suite, "balanced"):
        for part in clip.parts:
            kept, dropped = everything_kept(part), planned(part)
            assert kept.stream == dropped.stream
            all_packets = [payload for run in kept.runs for payload in run.payloads]
            few_packets = [payload for run in dropped.runs for payload in run.payloads]
            assert set(few_packets) <= set(all_packets)
            assert sum(len(run.wanted) for run in kept.runs) == len(part.frame_ids)
            fewer += len(all_packets) - len(few_packets)
    assert fewer > 100
    on_gpu = replace(suite, device="cuda")
    minis, count = mini_clips(on_gpu, checked(suite, "balanced"), everything_kept)
    assert len(minis) == 8 and count > 100
    with pytest.raises(NotRunError, match="left to cpu-fused: DALI does not decode h264"):
        mini_clips(suite, checked(suite, "balanced"), planned)


class FakeRunner:
    """Takes the frames of `cpu-fused` for those of DALI, and may spoil them."""

    def __init__(self, clips: list, spoil) -> None:
        self.clips, self.spoil, self.queued = {clip.sample_id: clip for clip in clips}, spoil, []

    def put(self, inputs) -> None:
        self.queued.append([int(sample_id) for sample_id in inputs[-1]])

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        ids = self.queued.pop(0)
        batch = np.empty((len(ids), *self.clips[ids[0]].frames_shape), np.uint8)
        for row, sample_id in enumerate(ids):
            cpu_fused.decode_clip(self.clips[sample_id], batch[row])
        return torch.from_numpy(self.spoil(batch, ids)), torch.tensor(ids)


def refuse_one(batch, ids):
    if 5 in ids:
        raise RuntimeError("Critical error\nError in stage encountered:\nno such frame\nmore")
    return batch


def brighter(batch, ids):
    return np.where(batch < 254, batch + 2, batch).astype(np.uint8)


@pytest.mark.parametrize(
    ("spoil", "right", "wrong", "failures"),
    [
        (lambda batch, ids: batch, True, [], []),
        (lambda batch, ids: batch[:, :, ::-1].copy(), False, [0, 2, 4, 6], []),
        (lambda batch, ids: np.roll(batch, 1, axis=0), False, [0, 2, 4, 6], []),
        (brighter, False, [], []),
        (refuse_one, False, [4, 6], ["no such frame"]),
    ],
    ids=["right", "order", "clips", "brighter", "error"],
)
def test_wrong_frames_are_noticed(suite, spoil, right, wrong, failures):
    runner, on_gpu = FakeRunner(checked(suite, "balanced"), spoil), replace(suite, device="cuda")
    row = correctness.check(on_gpu, runner, "balanced", QUICK.size, "dropped")
    assert row["right"] is right
    assert set(row["clips_with_wrong_numbers"]) >= set(wrong) and row["failures"] == failures
    assert row["packets_per_clip"] > 4


def test_graphs_that_fail_have_no_rate(suite, monkeypatch):
    class Broken:
        def put(self, inputs) -> None: ...

        def take(self) -> None:
            raise RuntimeError("no memory")

    supply = rates.make_supply(suite, "vp9", QUICK.size)
    monkeypatch.setattr(rates, "GraphRunner", lambda settings: Broken())
    found = rates.rate(suite, rates.Cell("vp9", QUICK.size, 2), supply, None)
    assert found == {"failure": "no memory"}
    assert len(supply.batches) == QUICK.samples // QUICK.batch
    assert 4 < supply.packets_per_clip <= 60 and supply.kb_per_clip > 0.5
    assert {len(inputs[0]) for inputs in supply.batches} == {QUICK.batch}


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> object:
    """NVIDIA's management library with one GPU, by its identifier, which does not tell about its decoders."""

    def refuse(gpu) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    gpu = object()
    numbers = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": {"GPU-12-34": gpu}.__getitem__,
        "nvmlDeviceGetDecoderUtilization": refuse,
        "nvmlDeviceGetUtilizationRates": lambda gpu: SimpleNamespace(gpu=97),
        "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(used=5_000_000_000),
        "nvmlDeviceGetClockInfo": lambda gpu, kind: 1500 + kind,
    }
    for name, function in numbers.items():
        monkeypatch.setattr(pynvml, name, function)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="12-34"))
    return gpu


def test_what_a_gpu_tells_is_read(one_gpu, monkeypatch):
    assert device.open_gpu() is one_gpu
    told = {"kernels_percent": 97, "gpu_memory_mb": 5000.0, "video_clock_mhz": 1500 + pynvml.NVML_CLOCK_VIDEO}
    assert device.read(one_gpu) == told
    monkeypatch.setattr(pynvml, "nvmlDeviceGetDecoderUtilization", lambda gpu: [81, 100_000])
    assert device.read(one_gpu) == told | {"nvdec_percent": 81}


def test_samples_are_summed_up_and_what_is_not_told_is_left_out(one_gpu):
    start = time.perf_counter()
    with sampling() as sampler:
        while not sampler.since(start):
            time.sleep(0.01)
        row = sampler.since(start)
    assert row == {"kernels_percent": 97, "gpu_memory_mb": 5000, "video_clock_mhz": 1503}
    assert sampler.since(time.perf_counter()) == {}


def test_nothing_is_sampled_without_a_driver(monkeypatch):
    def no_library() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", no_library)
    with sampling() as sampler:
        assert sampler.since(0) == {}


def test_a_training_takes_the_batch_that_fits(suite, monkeypatch):
    tried = []

    def train(suite, loader, micro_batch, sampler) -> dict:
        tried.append(micro_batch)
        if micro_batch > 4:
            raise torch.OutOfMemoryError
        return {"clips_per_s": 1.0}

    monkeypatch.setattr(loading, "train", train)
    source = loading.Source("vp9", "cpu-fused", workers=1)
    row = loading.first_that_fits(suite, source, (16, 8, 4, 2), None)
    assert row == {"micro_batch": 4, "clips_per_s": 1.0} and tried == [16, 8, 4]
    with pytest.raises(NotRunError, match="does not fit with 8 clips"):
        loading.first_that_fits(suite, source, (8,), None)


def test_steps_of_all_kinds_are_timed_most_important_first(tmp_path):
    cases = models.step_cases(Suite(tmp_path, "cuda", Scale()))
    assert len(set(cases)) == len(cases)
    assert (cases[0].encoder, cases[0].size, cases[0].attention) == ("vit", "vit_b16", "sdpa")
    assert {case.attention for case in cases} == {"sdpa", "flash-attn", "math", "xformers"}
    assert {(case.encoder, case.compile) for case in cases} >= {("vit", True), ("videomae", True)}
    assert {case.size for case in cases} == {"vit_b16", "vit_l14"} and {case.frames for case in cases} == {
        4,
        16,
    }
    tiny = models.step_cases(Suite(tmp_path, "cpu", QUICK))
    assert {(case.size, case.batch, case.compile) for case in tiny} == {("tiny", 2, False)}
    assert len(set(tiny)) == len(tiny) < len(cases)


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


class FakeStep:
    """Takes a hundredth of a second for a clip, the first time a minute; batches above `limit` do not fit."""

    def __init__(self, limit):
        self.limit, self.timed = limit, []

    def fits(self, batch):
        return batch <= self.limit

    def run(self, batch):
        self.timed.append(batch)
        return batch / 100 if len(self.timed) > 1 else 60.0


def test_the_largest_batch_is_timed(monkeypatch):
    step = FakeStep(96)
    monkeypatch.setattr(models, "TowerStep", lambda subject, method: step)
    row = models.largest_batch(models.Subject(), models.METHODS[1])
    assert row == {"trained with": 96, "clips_per_s": 100} and step.timed == [96] * models.TIMED
    step.limit = 0
    with pytest.raises(NotRunError, match="not even one clip"):
        models.largest_batch(models.Subject(), models.METHODS[1])


def test_a_gpu_that_is_asked_for_must_be_there(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(NotRunError, match="driver|CUDA|GPU"):
        Suite(tmp_path, "cuda").require_device()
    Suite(tmp_path, "cpu").require_device()
    with pytest.raises(NotRunError, match="--device cpu"):
        Suite(tmp_path, "cpu").require_gpu()
