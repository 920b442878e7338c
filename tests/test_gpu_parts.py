"""Each part of the GPU suite, where a fake takes the GPU's place: what it notices, counts and refuses."""

import ctypes
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from avion_dali.decode import cpu_fused

pytest.importorskip("nvidia.dali")

from benchmarks import gpu_corpus, gpu_correctness, gpu_loading, gpu_models, gpu_others, gpu_rates
from benchmarks.gpu_correctness import everything_kept, mini_clips, planned
from benchmarks.gpu_parts import QUICK, NotRunError, Scale, Suite, attempt
from benchmarks.gpu_sampling import GpuSampler, Nvml, sampling


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    """A suite with chunks of two styles."""
    made = Suite(tmp_path_factory.mktemp("gpu_parts"), "cpu", QUICK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_corpus, "STYLES", {name: gpu_corpus.STYLES[name] for name in ("balanced", "vp9")})
        rows: list[dict] = []
        gpu_corpus.media(made, rows.append)
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
        gpu_corpus.draw_number(picture, number)
        scaled = np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BILINEAR))
        assert gpu_corpus.read_number(picture) == gpu_corpus.read_number(scaled) == number
    assert gpu_corpus.read_number(np.full((side, side, 3), 128, np.uint8)) == -1


def checked(suite: Suite, style: str) -> list:
    chunks = gpu_corpus.chunks_of(gpu_corpus.open_manifest(suite, style))
    return gpu_corpus.clips_to_check(chunks, count=8, frame_size=64)


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
            shown = [gpu_corpus.read_number(frame) for frame in frames[0]]
            assert shown == gpu_corpus.shown_numbers(clip)


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
    row = gpu_correctness.check(on_gpu, runner, "balanced", QUICK.size, "dropped")
    assert row["right"] is right
    assert set(row["clips_with_wrong_numbers"]) >= set(wrong) and row["failures"] == failures
    assert row["packets_per_clip"] > 4


def test_graphs_that_fail_have_no_rate(suite):
    class Broken:
        def put(self, inputs) -> None: ...

        def take(self) -> None:
            raise RuntimeError("no memory")

    supply = gpu_rates.make_supply(suite, "vp9", QUICK.size)
    feeder = gpu_rates._Feeder(Broken(), supply, QUICK)
    feeder.thread.start()
    feeder.thread.join()
    assert feeder.failure == "no memory"
    assert len(supply.batches) == QUICK.samples // QUICK.batch
    assert 4 < supply.packets_per_clip <= 60 and supply.kb_per_clip > 0.5
    assert {len(inputs[0]) for inputs in supply.batches} == {QUICK.batch}


class FakeLibrary:
    """NVIDIA's management library with one GPU; functions in `lacking` answer 3, not supported."""

    def __init__(self, lacking: set[str] = frozenset()) -> None:
        self.lacking = lacking
        self.numbers = {
            "nvmlDeviceGetDecoderUtilization": lambda busy, period: self._set(busy, 81),
            "nvmlDeviceGetUtilizationRates": lambda rates: setattr(rates._obj, "gpu", 97),
            "nvmlDeviceGetMemoryInfo": lambda memory: setattr(memory._obj, "used", 5_000_000_000),
            "nvmlDeviceGetClockInfo": lambda kind, clock: self._set(clock, 1500 + kind.value),
        }

    def _set(self, reference, value: int) -> None:
        reference._obj.value = value

    def __getattr__(self, name: str):
        def call(*arguments) -> int:
            if name in self.lacking:
                return 3
            if name in self.numbers:
                self.numbers[name](*arguments[1:])
            if name == "nvmlSystemGetDriverVersion":
                ctypes.memmove(arguments[0], b"580.1\0", 6)
            return 0

        return call


def test_utilisation_is_read():
    nvml = Nvml(FakeLibrary())
    sample = nvml.sample()
    assert (sample.nvdec_percent, sample.kernels_percent) == (81, 97)
    assert (sample.gpu_memory_mb, sample.video_clock_mhz) == (5000.0, 1503)
    assert nvml.driver() == "580.1"
    with pytest.raises(OSError, match="nvmlInit_v2 answered 3"):
        Nvml(FakeLibrary({"nvmlInit_v2"}))


def test_samples_are_summed_up_and_what_is_not_told_is_left_out():
    sampler = GpuSampler(Nvml(FakeLibrary({"nvmlDeviceGetDecoderUtilization"})))
    start = time.perf_counter()
    while not sampler.since(start):
        time.sleep(0.01)
    row = sampler.since(start)
    assert row == {"kernels_percent": 97, "gpu_memory_mb": 5000, "video_clock_mhz": 1503}
    assert sampler.memory_mb() == 5000
    sampler.close()
    assert sampler.since(time.perf_counter()) == {}


def test_nothing_is_sampled_without_a_gpu(monkeypatch):
    def no_library(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    with sampling() as sampler:
        assert sampler.since(0) == {} and sampler.memory_mb() is None


def library(decoded: list):
    """A GPU library that is cpu-fused in disguise, which is not made for threads."""
    one_at_a_time = threading.Lock()

    def decode(request) -> torch.Tensor:
        frames = np.empty(request.frames_shape, np.uint8)
        with one_at_a_time:
            cpu_fused.decode_clip(request, frames)
        decoded.append(request.sample_id)
        return torch.from_numpy(frames[0])

    return decode


def measured_library(suite: Suite, make) -> tuple[list[dict], dict]:
    found: list[dict] = []
    requests = [clip for clip in checked(suite, "balanced") if len(clip.parts) == 1]
    with sampling() as sampler:
        failure = attempt(
            lambda: gpu_others.measure_library(
                "x", make, requests, sampler=sampler, suite=suite, record=found.append
            )
        )
    return found, failure


def test_other_libraries_are_compared_before_they_are_timed(suite, monkeypatch):
    monkeypatch.setattr(gpu_others, "THREADS", (1, 2))
    decoded: list[int] = []
    found, failure = measured_library(suite, lambda: library(decoded))
    assert [row["threads"] for row in found] == [1, 2] and not failure
    assert all(row["clips_per_s"] > 0 and row["min_psnr_db"] == 99.0 for row in found)
    assert len(decoded) >= 9
    shuffled = measured_library(suite, lambda: lambda request: library([])(request).flip(0))
    assert shuffled[0] == [] and "other ones" in shuffled[1]["not_run"]

    def missing():
        raise ModuleNotFoundError("No module named 'x'")

    assert measured_library(suite, missing) == ([], {"failure": "ModuleNotFoundError: No module named 'x'"})


def test_whole_frames_are_cropped_and_scaled_as_requested(suite):
    clip = next(clip for clip in checked(suite, "balanced") if clip.sample_id % 2)
    w = clip.windows[0]
    frames = np.random.default_rng(0).integers(0, 256, (2, 96, 128, 3), dtype=np.uint8)
    found = gpu_others.crop_and_resize(torch.from_numpy(frames), clip).numpy()
    crop = Image.fromarray(frames[1, w.y : w.y + w.height, w.x : w.x + w.width])
    expected = np.asarray(crop.resize((64, 64), Image.Resampling.BILINEAR))
    assert np.abs(found[1].astype(int) - expected).max() <= 2


def test_a_training_takes_the_batch_that_fits(suite, monkeypatch):
    tried = []

    def train(suite, loader, micro_batch, sampler) -> dict:
        tried.append(micro_batch)
        if micro_batch > 4:
            raise torch.OutOfMemoryError
        return {"clips_per_s": 1.0}

    monkeypatch.setattr(gpu_loading, "train", train)
    source = gpu_loading.Source("vp9", "cpu-fused", workers=1)
    row = gpu_loading.first_that_fits(suite, source, (16, 8, 4, 2), None)
    assert row == {"micro_batch": 4, "clips_per_s": 1.0} and tried == [16, 8, 4]
    with pytest.raises(NotRunError, match="does not fit with 8 clips"):
        gpu_loading.first_that_fits(suite, source, (8,), None)


def test_steps_of_all_kinds_are_timed_most_important_first(tmp_path):
    cases = gpu_models.step_cases(Suite(tmp_path, "cuda", Scale()))
    assert len(set(cases)) == len(cases)
    assert (cases[0].encoder, cases[0].size, cases[0].attention) == ("vit", "vit_b16", "sdpa")
    assert {case.attention for case in cases} == {"sdpa", "flash-attn", "math", "xformers"}
    assert {(case.encoder, case.compile) for case in cases} >= {("vit", True), ("videomae", True)}
    assert {case.size for case in cases} == {"vit_b16", "vit_l14"} and {case.frames for case in cases} == {
        4,
        16,
    }
    tiny = gpu_models.step_cases(Suite(tmp_path, "cpu", QUICK))
    assert {(case.size, case.batch, case.compile) for case in tiny} == {("tiny", 2, False)}
    assert len(set(tiny)) == len(tiny) < len(cases)


def test_memory_is_drawn_on_as_a_line():
    mib = 2**20
    row = gpu_models.extrapolated((8, 16), (1_800 * mib, 2_600 * mib), room=100_000 * mib)
    assert row["peak MiB a clip"] == 100 and row["fixed MiB"] == 1_000
    assert row["largest batch by slope"] == 940  # 95 % of the room less what is fixed
    assert gpu_models.extrapolated((1, 2), (8, 9), room=3)["largest batch by slope"] == 0
    with pytest.raises(NotRunError, match="16 clips take no more memory than 8"):
        gpu_models.extrapolated((8, 16), (5, 5), room=100)


def test_peaks_are_those_of_whole_steps_after_the_first(monkeypatch):
    step, mib = FakeTrainer(99), 2**20

    def peak() -> int:
        return (1000 + 50 * step.steps[-1]) * mib

    fakes = {
        "max_memory_allocated": peak,
        "mem_get_info": lambda: (3_000 * mib, 0),
        "reset_peak_memory_stats": int,
    }
    for name, fake in {**fakes, "memory_reserved": lambda: 1_000 * mib}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    row = gpu_models.peak_of_clip(step, (4, 8))
    assert step.steps == [4, 4, 8]
    assert row == {"peak MiB a clip": 50, "fixed MiB": 1_000, "largest batch by slope": 56}


class FakeTrainer:
    """Takes a hundredth of a second for a clip; batches above `limit` do not fit."""

    def __init__(self, limit: int) -> None:
        self.limit, self.tried, self.steps = limit, [], []

    def fits(self, batch: int) -> bool:
        self.tried.append(batch)
        return batch <= self.limit

    def run(self, batch: int) -> float:
        self.steps.append(batch)
        return batch / 100 if len(self.steps) > 1 else 60.0


@pytest.mark.parametrize(
    ("limit", "expected", "most", "found"),
    [(99, 80, 1000, 80), (99, 110, 1000, 94), (5000, 900, 256, 256), (1, 2, 9, 1)],
)
def test_the_batch_that_should_fit_is_tried_and_timed(limit, expected, most, found):
    step = FakeTrainer(limit)
    row = gpu_models.train_with_most(step, expected, most=most)
    assert row["trained with"] == found <= limit and row["expected"] == expected
    assert row["clips_per_s"] == 100 and step.steps == [found] * gpu_models.TIMED
    assert ("note" in row) == (expected > most)
    assert len(step.tried) < 5


def test_a_model_that_never_fits_has_no_batch():
    with pytest.raises(NotRunError, match="not even one clip"):
        gpu_models.train_with_most(FakeTrainer(0), 100, most=1000)
    with pytest.raises(NotRunError, match="not measured"):
        gpu_models.largest_batch(gpu_models.Subject(), gpu_models.EFFICIENT, None)


def test_a_gpu_that_is_asked_for_must_be_there(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(NotRunError, match="driver|CUDA|GPU"):
        Suite(tmp_path, "cuda").require_device()
    Suite(tmp_path, "cpu").require_device()
    with pytest.raises(NotRunError, match="--device cpu"):
        Suite(tmp_path, "cpu").require_gpu()
